"""The AdamW step of many weights in one Triton launch, which also writes the new values into the weights.

The launch reads the addresses of all tensors from a table, so that many small weights cost no more than a large one. A
program takes one block of 256 entries, which is also the block whose eight-bit moments share a scale. To write an entry
into its matrix, the program finds the entry's row by binary search in the row pointers.
"""

import functools
from collections.abc import Callable, Iterable

import torch
import triton
import triton.language as tl

from speft_optim.kernels.adamw import Update
from speft_optim.kernels.blockwise import BLOCK, blocks_in, code_bounds, dynamic_codes
from speft_optim.kernels.magnitudes import LEAST, MOST, TINY

_LEAST, _MOST = tl.constexpr(LEAST), tl.constexpr(MOST)
_TINY = tl.constexpr(TINY)


def fused_adamw(
    updates: Iterable[Update],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    magnitude_power: float = 0.0,
) -> Callable[[], None]:
    """Return a function that launches the fused AdamW kernel, once for each kind of update.

    The arithmetic and the options are those of `adamw.adamw_`. Arguments are uploaded now, so calling the function
    costs only the launch; it updates the tensors of `updates` in place.
    """
    kinds: dict[tuple, list[Update]] = {}
    for update in updates:
        if update.values.numel():
            kinds.setdefault(update.kind, []).append(update)
    launches = []
    for (device, eight_bits, dtype, by_magnitude), same in kinds.items():
        blocks = torch.tensor([0, *(blocks_in(update.values.numel()) for update in same)]).cumsum(0)
        steps = [[lr / (1 - beta1**update.step), (1 - beta2**update.step) ** 0.5] for update in same]
        table = torch.tensor([update.addresses() for update in same])
        signs = (True, False) if eight_bits else ()
        books = [book(signed, device) for signed in signs for book in (dynamic_codes, code_bounds)] or [None] * 4
        launch = functools.partial(
            _adamw[(int(blocks[-1]),)],
            table.to(device, non_blocking=True),
            torch.tensor(steps, dtype=torch.float32).to(device, non_blocking=True),
            blocks.to(device, torch.int32, non_blocking=True),
            len(same),
            *books,
            beta1,
            1 - beta1,
            beta2,
            1 - beta2,
            eps,
            1 - lr * weight_decay,
            -1.0 if maximize else 1.0,
            same[0].mean,
            POWER=magnitude_power if by_magnitude else 0.0,
            EIGHT_BITS=eight_bits,
            WEIGHT=None if dtype is None else getattr(tl, str(dtype).removeprefix("torch.")),
            FIELDS=table.shape[1],
            BLOCK=BLOCK,
        )
        # The updates are kept with the launch, since the table holds only the addresses of their tensors.
        launches.append((launch, same))

    def take_step() -> None:
        for launch, same in launches:
            with torch.cuda.device_of(same[0].values):
                launch()
            written = [update.values for update in same]
            written += [update.weight for update in same if update.weight is not None]
            # Autograd and `SparseWeight` detect writes by the version counter, which a kernel does not advance.
            torch.autograd.graph.increment_version(written)

    return take_step


@triton.jit
def _last_not_above(starts, count, wanted):
    """Return the index of the last of `count` sorted numbers that is at most `wanted`; the first always is."""
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        above = tl.load(starts + middle) > wanted
        low = tl.where(above, low, middle)
        high = tl.where(above, middle, high)
    return low


@triton.jit
def _row_of(entry, row_pointers, rows):
    """Return the last row that begins at or before each entry."""
    row = tl.zeros_like(entry)
    step = 1
    while step < rows:
        step *= 2
    while step > 1:
        step //= 2
        probe = row + step
        begins = tl.load(row_pointers + tl.minimum(probe, rows))
        row = tl.where((probe < rows) & (begins <= entry), probe, row)
    return row


@triton.jit
def _encode(numbers, scale, bounds):
    """Return the nearest code of each number: how many of the 255 midpoints between codes lie below number / scale."""
    share = tl.div_rn(numbers, tl.zeros_like(numbers) + tl.maximum(scale, _TINY))
    code = tl.zeros_like(numbers).to(tl.int32)
    for bit in tl.static_range(7, -1, -1):
        probe = code + ((1 << bit) - 1)
        code = tl.where(tl.load(bounds + probe) < share, code + (1 << bit), code)
    return code


@triton.jit
def _adamw(
    table,
    steps,
    blocks,
    count,
    first_codes,
    first_bounds,
    second_codes,
    second_bounds,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    keep,
    sign,
    mean,
    POWER: tl.constexpr,
    EIGHT_BITS: tl.constexpr,
    WEIGHT: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    number = _last_not_above(blocks, count, tl.program_id(0))
    block = tl.program_id(0) - tl.load(blocks + number)
    fields = table + number * FIELDS
    entries = tl.load(fields)
    values = tl.load(fields + 1).to(tl.pointer_type(tl.float32))
    gradients = tl.load(fields + 2).to(tl.pointer_type(tl.float32))
    MOMENT: tl.constexpr = tl.uint8 if EIGHT_BITS else tl.float32
    firsts = tl.load(fields + 3).to(tl.pointer_type(MOMENT))
    seconds = tl.load(fields + 4).to(tl.pointer_type(MOMENT))
    rate = tl.load(steps + 2 * number)
    root_correction = tl.load(steps + 2 * number + 1)

    entry = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < entries
    value = tl.load(values + entry, inside, other=0.0)
    gradient = sign * tl.load(gradients + entry, inside, other=0.0)
    if EIGHT_BITS:
        first_scales = tl.load(fields + 5).to(tl.pointer_type(tl.float32))
        second_scales = tl.load(fields + 6).to(tl.pointer_type(tl.float32))
        first = tl.load(first_codes + tl.load(firsts + entry, inside, other=0)) * tl.load(first_scales + block)
        second = tl.load(second_codes + tl.load(seconds + entry, inside, other=0)) * tl.load(second_scales + block)
    else:
        first = tl.load(firsts + entry, inside, other=0.0)
        second = tl.load(seconds + entry, inside, other=0.0)

    first = first + rest1 * (gradient - first)
    second = beta2 * second + rest2 * gradient * gradient
    denominator = tl.div_rn(tl.sqrt_rn(second), tl.zeros_like(second) + root_correction) + eps
    if POWER > 0.0:
        magnitude = tl.abs(value) if POWER == 1.0 else tl.sqrt_rn(tl.abs(value))
        relative = tl.div_rn(magnitude, tl.zeros_like(magnitude) + tl.maximum(tl.load(mean), _TINY))
        denominator = tl.div_rn(denominator, tl.minimum(tl.maximum(relative, _LEAST), _MOST))
    value = keep * value - rate * tl.div_rn(first, denominator)

    tl.store(values + entry, value, inside)
    if EIGHT_BITS:
        # Beyond the last entry a moment was decoded from code 0, whose number is not zero.
        first = tl.where(inside, first, 0.0)
        second = tl.where(inside, second, 0.0)
        # A NaN moment makes its scale NaN, as `amax` in PyTorch does; a maximum in Triton drops it.
        nan_if_any = tl.where(tl.max((second != second).to(tl.int32), 0) > 0, float("nan"), 0.0)
        first_scale = tl.max(tl.abs(first), 0) + nan_if_any
        second_scale = tl.max(second, 0) + nan_if_any
        tl.store(first_scales + block, first_scale)
        tl.store(second_scales + block, second_scale)
        tl.store(firsts + entry, _encode(first, first_scale, first_bounds).to(tl.uint8), inside)
        tl.store(seconds + entry, _encode(second, second_scale, second_bounds).to(tl.uint8), inside)
    else:
        tl.store(firsts + entry, first, inside)
        tl.store(seconds + entry, second, inside)
    if WEIGHT is not None:
        weight = tl.load(fields + 7).to(tl.pointer_type(WEIGHT))
        row_pointers = tl.load(fields + 8).to(tl.pointer_type(tl.int32))
        columns = tl.load(fields + 9).to(tl.pointer_type(tl.uint16))
        rows, width = tl.load(fields + 10), tl.load(fields + 11)
        first_row, own_rows = tl.load(fields + 12), tl.load(fields + 13)
        row = _row_of(entry, row_pointers, rows.to(tl.int32)).to(tl.int64) - first_row
        column = tl.load(columns + entry, inside, other=0).to(tl.int64)
        tl.store(weight + row * width + column, value.to(WEIGHT), inside & (row >= 0) & (row < own_rows))
