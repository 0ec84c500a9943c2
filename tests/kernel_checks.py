"""Each kernel against its plain PyTorch twin; run by test_triton.py under the interpreter, by test_gpu.py on a GPU."""

import copy

import pytest
import torch
from torch import nn

import speft_optim.kernels.sampling as definition
from speft_optim import Mask, Masks, SparseAdamW, sparsify
from speft_optim.kernels import launch, sampling_triton
from speft_optim.kernels.adamw import Update, adamw_, fused_adamw
from speft_optim.kernels.dequantize import dequantize_4bit, dequantize_int8
from speft_optim.kernels.entries import scatter_entries_
from speft_optim.kernels.launch import launches
from speft_optim.kernels.magnitudes import POWERS, mean_power
from speft_optim.kernels.overlay import overlay_
from speft_optim.optim import step as optimizer_step
from speft_optim.optim.moments import new_moments_, store_moments_, stored_moments, unpack_moments

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter takes a second for what a GPU does at once.
STEPS = 6 if DEVICE == "cuda" else 2
# The interpreter takes the bits of bf16 operands of a product for integers.
MULTIPLIED = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]
# (shape, share of entries): short and long rows, empty and full ones, more rows than entries.
MATRICES = [((7, 40), 0.3), ((130, 33), 0.1), ((3, 700), 0.9), ((1, 300), 1.0), ((200, 5), 0.5)]


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def mask_of(shape, share, seed=0):
    count = torch.Size(shape).numel()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    mask = Mask(order[: round(share * count)].to(DEVICE), shape)
    assert "columns" in mask.packed()
    return mask


def assert_written(weight, expected):
    """Equal; but the interpreter cuts bf16 off where a GPU rounds, so that there the last bit is not looked at."""
    if weight.dtype == torch.bfloat16 and not weight.is_cuda:
        torch.testing.assert_close(weight, expected, rtol=2**-7, atol=0)
    else:
        assert torch.equal(weight, expected)


def test_kernels_run_here():
    assert launches(draw(3)) and not launches(draw(3, 4).t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape, share", MATRICES)
def test_lay_over_is_scatter(shape, share, dtype):
    mask, weight = mask_of(shape, share), draw(*shape, dtype=dtype)
    values, expected, version = draw(len(mask), seed=1), weight.clone(), weight._version
    scatter_entries_(expected, mask.indices, values)
    overlay_(weight, mask.positions, values)
    assert_written(weight, expected)
    assert weight._version > version


@pytest.mark.parametrize("processes", [2, 5])
@pytest.mark.parametrize("shape, share", MATRICES)
def test_rows_divided_over_processes_get_their_own_entries(shape, share, processes):
    """Each writes a part of the values into its rows, in memory where other rows follow; some have no rows at all."""
    weight, mask = draw(*shape), mask_of(shape, share)
    values = draw(len(mask), seed=1)
    expected = scatter_entries_(weight.clone(), mask.indices, values)
    part, indices = -(-shape[0] // processes), mask.indices.long()
    for number in range(processes):
        first, last = (min(place * part, shape[0]) for place in (number, number + 1))
        begin, end = ((indices < row * shape[1]).sum().item() for row in (first, last))
        own = Mask(indices[begin:end] - first * shape[1], (last - first, shape[1]))
        overlay_(weight[first:last], own.positions, values[begin:end])
    assert_written(weight, expected)


def test_an_uneven_mask_with_empty_rows():
    """All entries in two rows of 150, in the last group of rows among them."""
    positions = torch.cat([torch.arange(5 * 60, 6 * 60), torch.arange(149 * 60, 150 * 60, 2)])
    mask, weight = Mask(positions.to(DEVICE), (300, 60)), draw(300, 60)
    assert "columns" not in mask.packed()
    mask = Mask(torch.cat([positions, torch.arange(200 * 60, 212 * 60)]).to(DEVICE), (300, 60))
    assert "columns" in mask.packed()
    values, expected = draw(len(mask), seed=1), weight.clone()
    scatter_entries_(expected, mask.indices, values)
    overlay_(weight, mask.positions, values)
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("overlaid", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape, share", MATRICES)
def test_int8_weights_with_overlaid_values(shape, share, dtype, overlaid):
    codes = torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.int8)
    scales, mask = draw(shape[0], seed=1).abs(), mask_of(shape, share)
    values = draw(len(mask), seed=2)
    expected = (codes.float() * (scales * (1 / 127))[:, None]).to(dtype)
    if overlaid:
        scatter_entries_(expected, mask.indices, values)
    overlay = (mask.positions, values) if overlaid else (None, None)
    assert_written(dequantize_int8(codes, scales, dtype, *overlay), expected)


@pytest.mark.parametrize("overlaid", [True, False])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape, share, size", [((9, 64), 0.2, 64), ((5, 4480), 0.02, 64), ((70, 256), 0.1, 128)])
def test_4bit_weights_with_overlaid_values(shape, share, size, dtype, double, overlaid):
    """The longest rows take more than one turn of the kernel's loop, the last not a whole one."""
    runs, source = torch.Size(shape).numel() // size, torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (runs * size // 2, 1), generator=source).to(DEVICE, torch.uint8)
    table, mask = draw(16, seed=1), mask_of(shape, share)
    values = draw(len(mask), seed=2)
    scales, second = draw(runs, seed=3).abs(), None
    exact = scales
    if double:
        scales = torch.randint(0, 256, (runs,), generator=source).to(DEVICE, torch.uint8)
        second = draw(256, seed=4), draw(-(-runs // 8), seed=5), 8, draw(1, seed=6)[0]
        exact = second[0][scales.int()] * second[1][torch.arange(runs, device=DEVICE) // 8] + second[3]
    pairs = torch.stack([codes >> 4, codes & 15], dim=1).flatten()
    expected = (table[pairs.int()].view(runs, size) * exact[:, None]).to(dtype).view(shape)
    if overlaid:
        scatter_entries_(expected, mask.indices, values)
    overlay = (mask.positions, values) if overlaid else (None, None)
    actual = dequantize_4bit(codes, table, scales, size, second, torch.Size(shape), dtype, *overlay)
    assert_written(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape, share", MATRICES)
@pytest.mark.parametrize("panel_bytes", [1, 4 * 33 * 50, 2**27])
def test_sampled_gradient_is_the_product_looked_up(shape, share, dtype, panel_bytes):
    mask = mask_of(shape, share)
    left, right = draw(19, shape[0], dtype=dtype), draw(19, shape[1], dtype=dtype, seed=1)
    expected = (left.double().T @ right.double()).view(-1)[mask.indices.long()]
    for actual in (
        sampling_triton.from_panels(left, right, mask.positions, panel_bytes),
        mask.sampled_gradient(left, right),
    ):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-4)


def concentrated_mask(rows, columns, share, seed=0):
    """Entries drawn with weights that differ much between rows and between columns; some rows are empty."""
    source = torch.Generator().manual_seed(seed)
    falls = [
        (torch.rand(size, generator=source) ** 6)[torch.randperm(size, generator=source)] for size in (rows, columns)
    ]
    chances = (falls[0][:, None] * falls[1][None, :]).flatten()
    positions = chances.multinomial(round(share * rows * columns), generator=source)
    mask = Mask(positions.to(DEVICE), (rows, columns))
    assert "columns" in mask.packed()
    return mask


CONCENTRATED = [(150, 200, 0.03), (65, 300, 0.05), (64, 128, 0.05), (3, 400, 0.06), (130, 60, 0.05)]


@pytest.fixture
def any_size(monkeypatch):
    """Blocks for matrices so small that they never pay."""
    monkeypatch.setattr(definition, "LARGEST_COST", float("inf"))


@pytest.mark.parametrize("rows, columns, share", CONCENTRATED)
def test_blocks_of_rows_need_the_columns_of_their_entries_and_no_others(rows, columns, share, any_size):
    mask = concentrated_mask(rows, columns, share)
    found = mask._row_blocks
    lines = [set() for _ in range(rows)]
    for position in mask.indices.tolist():
        lines[position // columns].add(position % columns)
    order, starts, tiles = found.order.tolist(), found.starts.tolist(), found.tiles.tolist()
    counts = [len(lines[row]) for row in order]
    assert sorted(order) == [row for row in range(rows) if lines[row]] and counts == sorted(counts, reverse=True)
    needed = [sorted(set().union(*(lines[row] for row in order[i : i + 64]))) for i in range(0, len(order), 64)]
    assert found.columns.tolist() == sum(needed, []) and starts == [0, *torch.tensor([*map(len, needed)]).cumsum(0)]
    assert tiles == [[block, first] for block, columns in enumerate(needed) for first in range(0, len(columns), 128)]
    assert 2**found.halvings >= max(map(len, needed)) > 2**found.halvings // 2
    assert found.nbytes == 4 * len(order) + 2 * len(found.columns) + 4 * len(starts) + 8 * len(tiles)


@pytest.mark.parametrize("tokens", [1, 130])
@pytest.mark.parametrize("dtype", MULTIPLIED)
@pytest.mark.parametrize("rows, columns, share", CONCENTRATED)
def test_sampled_gradient_of_blocks_is_the_product_looked_up(
    rows, columns, share, dtype, tokens, any_size, monkeypatch
):
    """In runs of 64 tokens, the last not a whole one; the left operand as backward gives it, not always contiguous."""
    monkeypatch.setattr(definition, "OPERAND_BYTES", 2 * (rows + columns) * 64)
    mask = concentrated_mask(rows, columns, share)
    left, right = draw(rows, tokens, dtype=dtype).t(), draw(tokens, columns, dtype=dtype, seed=1)
    expected = (left.double().T @ right.double()).view(-1)[mask.indices.long()]
    actual = sampling_triton.from_blocks(left, right, mask.positions, mask._row_blocks)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-4)


def test_the_product_is_formed_in_blocks_where_that_pays(monkeypatch):
    """Not for uniform or dense masks, small matrices, few tokens or fp32; positions are looked at once."""
    monkeypatch.setattr(sampling_triton, "from_blocks", lambda *_: "blocks")
    monkeypatch.setattr(sampling_triton, "from_panels", lambda *_: "panels")

    def formed_in_blocks(mask, tokens=512, dtype=torch.bfloat16):
        left, right = (torch.empty(tokens, size, dtype=dtype, device=DEVICE) for size in mask.shape)
        return mask.sampled_gradient(left, right) == "blocks"

    corner = torch.cartesian_prod(torch.arange(400), torch.arange(20)) @ torch.tensor([4096, 1])
    mask = Mask(corner.to(DEVICE), (2048, 4096))
    at_rest = mask.nbytes
    assert not formed_in_blocks(mask, tokens=500) and not formed_in_blocks(mask, dtype=torch.float32)
    assert mask.nbytes == at_rest
    assert formed_in_blocks(mask) and mask.nbytes - at_rest == mask._row_blocks.nbytes > 0
    if DEVICE == "cuda":
        assert mask.to("cpu").nbytes == at_rest
    assert copy.deepcopy(mask).nbytes == at_rest
    uniform = Mask(torch.arange(0, 2048 * 4096, 97).to(DEVICE), (2048, 4096))
    at_rest = uniform.nbytes
    assert not formed_in_blocks(uniform) and uniform.nbytes == at_rest
    assert not formed_in_blocks(Mask((corner // 4096 * 256 + corner % 4096).to(DEVICE), (400, 256)))


def test_strided_values_are_overlaid_as_scatter_does():
    mask, weight = mask_of((7, 40), 0.3), draw(7, 40)
    values, expected = draw(2 * len(mask), seed=1)[::2], weight.clone()
    scatter_entries_(expected, mask.indices, values)
    overlay_(weight, mask.positions, values)
    assert torch.equal(weight, expected)


def state_of(values, bits):
    state = {}
    new_moments_(state, values, bits)
    return state


STEPPED = [
    (32, None, True),
    (32, torch.float32, False),
    (32, torch.bfloat16, False),
    (8, None, True),
    (8, torch.float16, False),
    (8, torch.bfloat16, False),
]
# The power changes the length of a step, of either width of moments, and not how it is written into a weight.
POWERED = [(*case, power) for power in POWERS for case in STEPPED]
POWERED = [case for case in POWERED if DEVICE == "cuda" or case[3] == POWERS[-1] or case[1] is None]


@pytest.mark.parametrize("bits, dtype, maximize, power", POWERED)
def test_one_launch_steps_many_weights_as_the_reference_does(bits, dtype, maximize, power):
    """Weights of several sizes and step counts in one call; compared over some steps, moments and weight included."""
    options = dict(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, maximize=maximize)
    options["magnitude_power"] = power
    cases = []
    for number, (shape, share) in enumerate(MATRICES):
        mask = mask_of(shape, share, seed=number)
        values = draw(len(mask), seed=number)
        weight = None if dtype is None else draw(*shape, dtype=dtype, seed=number)
        cases.append((mask, values, state_of(values, bits), weight))
    twins = copy.deepcopy([case[1:] for case in cases])
    for step in range(1, STEPS + 1):
        gradients = [draw(len(case[0]), seed=100 * step + n) * 10.0 ** (n - 2) for n, case in enumerate(cases)]
        ours, theirs = (
            mean_power(parts, power) if power else None
            for parts in ([case[1] for case in cases], [twin[0] for twin in twins])
        )
        updates = [
            Update(values, gradient, *stored_moments(state), step + number, weight, mask.positions, mean=ours)
            for number, ((mask, values, state, weight), gradient) in enumerate(zip(cases, gradients, strict=True))
        ]
        fused_adamw(updates, **options)()
        for number, ((values, state, _), gradient) in enumerate(zip(twins, gradients, strict=True)):
            first, second = unpack_moments(state)
            adamw_(values, gradient, first, second, step=step + number, mean=theirs, **options)
            store_moments_(state, first, second)
    for (mask, values, state, weight), (expected, expected_state, expected_weight) in zip(cases, twins, strict=True):
        if bits == 32:
            pairs = [(values, expected), *zip(unpack_moments(state), unpack_moments(expected_state), strict=True)]
            for ours, theirs in pairs:
                # Where gradients cancel, the last bits of the summands are more than those of the sum.
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))
        else:
            # A moment on the border of two codes may fall to either side.
            for ours, theirs in zip(stored_moments(state)[0], stored_moments(expected_state)[0], strict=True):
                assert float(((ours.int() - theirs.int()).abs() > 0).float().mean()) < 0.02
            assert float(((values - expected).abs() > 1e-4 * expected.abs() + 1e-5).float().mean()) < 0.02
        if weight is not None:
            scatter_entries_(expected_weight, mask.indices, values)
            assert_written(weight, expected_weight)


@pytest.mark.parametrize("processes", [2, 5])
@pytest.mark.parametrize("shape, share", MATRICES)
def test_a_step_is_written_into_the_rows_that_a_process_holds(shape, share, processes):
    """All values are stepped in each process; some have no rows at all."""
    options = dict(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, maximize=False)
    mask, weight, start = mask_of(shape, share), *(draw(*shape) for _ in range(2))
    rows = -(-shape[0] // processes)
    for number in range(processes):
        values, gradient = draw(len(mask), seed=1), draw(len(mask), seed=2)
        moments = stored_moments(state_of(values, 32))
        first, last = (min(place * rows, shape[0]) for place in (number, number + 1))
        fused_adamw([Update(values, gradient, *moments, 1, weight[first:last], mask.positions, first)], **options)()
        # The others' rows are as before.
        expected = scatter_entries_(start.clone(), mask.indices, values)
        assert torch.equal(weight[:last], expected[:last]) and torch.equal(weight[last:], start[last:])


@pytest.mark.parametrize("bits", [32, 8])
def test_blocks_of_zeros_and_of_one_entry_stay_finite(bits):
    mask = Mask(torch.arange(0, 770, 3).to(DEVICE), (7, 110))
    values = draw(len(mask))
    kept, state = values.clone(), state_of(values, bits)
    assert len(mask) == 257
    options = dict(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, maximize=False)
    for step in (1, 2):
        fused_adamw([Update(values, torch.zeros_like(values), *stored_moments(state), step)], **options)()
    assert torch.equal(values, kept)
    assert all(not moment.any() for moment in unpack_moments(state))


@pytest.mark.parametrize("bits", [32, 8])
def test_a_model_trains_by_kernels_as_without_them(bits, monkeypatch):
    """Gradient hooks, sampled gradients, clipping, the step and what it writes, over some steps."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(40, 60), nn.Linear(60, 30)])}).to(DEVICE)
    twin = copy.deepcopy(model)
    masks = Masks({f"blocks.{n}.weight": mask_of(shape, 0.2) for n, shape in enumerate([(60, 40), (30, 60)])})
    losses = []
    for trained in (model, twin):
        if trained is twin:
            monkeypatch.setattr(launch, "_FOUND", False)
        optimizer = SparseAdamW(sparsify(trained, masks), lr=1e-2, weight_decay=0.1, state_bits=bits)
        for step in range(STEPS):
            x = draw(9, 40, seed=step)
            for layer in trained["blocks"]:
                x = layer(x).tanh()
            loss = (x - 0.5).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(trained.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4 if bits == 32 else 1e-2)
    if bits == 32:
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_codes_stay_whatever_dtype_they_are_stored_in(storage):
    """A quantised weight stored under a floating dtype looks like a dense weight, whose entries a step writes."""
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4", compute_dtype=torch.float32, quant_storage=storage)
    weight = draw(32, 64).cpu()
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", quant_storage=storage, module=layer)
    model = nn.Sequential(layer).to(DEVICE)
    codes = layer.weight.detach().clone().view(torch.uint8)
    values = sparsify(model, Masks({"0.weight": Mask(torch.arange(0, 2000, 3), (32, 64))}))
    optimizer, start = SparseAdamW(values, lr=1e-2), values[0].detach().clone()
    for _ in range(2):
        model(draw(5, 64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    copied = copy.deepcopy(model)
    assert not torch.equal(values[0], start)
    for other in (model, copied):
        assert torch.equal(other[0].weight.detach().view(torch.uint8), codes)
    assert torch.equal(copied(draw(5, 64)), model(draw(5, 64)))


@pytest.mark.parametrize("change", ["layout", "dtype", "device", "length"])
def test_moments_that_no_longer_fit_are_no_business_of_a_kernel(change):
    """It gets addresses, and would read and write past moments of another layout, dtype, device or length."""
    parameter = nn.Parameter(draw(2, 3, 4, 4).to(memory_format=torch.channels_last))
    twin = nn.Parameter(parameter.detach().clone(memory_format=torch.preserve_format))
    optimizers = SparseAdamW([parameter], lr=0.1), torch.optim.AdamW([twin], lr=0.1)

    def step(seed):
        for optimizer, trained in zip(optimizers, (parameter, twin), strict=True):
            trained.grad = draw(2, 3, 4, 4, seed=seed).to(trained)
            optimizer.step()

    step(1)
    if change == "layout":
        parameter.data = parameter.data.contiguous()
        step(2)
        torch.testing.assert_close(parameter, twin)
        return
    state = optimizers[0].state[parameter]
    for key in ("exp_avg", "exp_avg_sq"):
        moment = state[key]
        state[key] = dict(dtype=moment.bfloat16(), device=moment.to("meta"), length=moment[:1])[change]
    with pytest.raises(RuntimeError):
        step(2)


def test_scales_of_another_length_are_no_business_of_a_kernel():
    values = nn.Parameter(draw(600))
    optimizer = SparseAdamW([values], lr=0.1, state_bits=8)
    values.grad = draw(600, seed=1)
    optimizer.step()
    state = optimizer.state[values]
    state["exp_avg_scale"] = state["exp_avg_scale"][:1]
    with pytest.raises(RuntimeError):
        optimizer.step()


@pytest.mark.parametrize("bits", [8, 32])
def test_hyper_parameters_may_be_tensors_and_a_bad_gradient_ignored(bits):
    """As in plain PyTorch: a block with NaN is NaN in its moments from then on, and hides it in no code."""
    number = torch.tensor
    options = dict(betas=(number(0.9), number(0.99)), eps=number(1e-8), weight_decay=number(0.1), lr=number(0.1))
    results = []
    for kernels_run in (True, False):
        values = nn.Parameter(draw(300))
        optimizer = SparseAdamW([values], **options, state_bits=bits, on_nonfinite="ignore")
        with pytest.MonkeyPatch.context() as patch:
            if not kernels_run:
                patch.setattr(optimizer_step, "launches", lambda tensor: False)
            for step in range(3):
                values.grad = draw(300, seed=step + 1)
                if step == 1:
                    values.grad[7] = float("nan")
                optimizer.step()
        results.append(values.detach().isfinite())
    assert torch.equal(*results) and int(results[0].sum()) == (44 if bits == 8 else 299)
