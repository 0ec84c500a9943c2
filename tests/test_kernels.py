"""The definitions of the operations against plainer ones: a matmul and a lookup, torch's own AdamW, a case by hand."""

import math

import pytest
import torch
from conftest import assert_close, draw
from torch.utils._python_dispatch import TorchDispatchMode

from speft_optim.kernels.adamw import adamw_
from speft_optim.kernels.entries import gather_entries, scatter_entries_
from speft_optim.kernels.product import accumulate_product_
from speft_optim.kernels.sampling import from_panels


def positions(count, share, dtype=torch.int32, seed=0):
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[: round(share * count)].sort().values.to(dtype)


class Watch(TorchDispatchMode):
    """Entries of the largest tensor any operation gives out, and the number of matrix products."""

    entries = products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.products += function is torch.ops.aten.mm.default
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("tokens, rows, columns", [(5, 7, 11), (1, 1, 13), (6, 13, 1), (0, 4, 3), (33, 16, 8)])
def test_sampled_gradient_is_the_product_looked_up(tokens, rows, columns, share, dtype):
    left, right = draw(tokens, rows, dtype=dtype), draw(tokens, columns, dtype=dtype, seed=1)
    indices = positions(rows * columns, share)
    # Low precision is compared with the product of the same operands in fp64, not in low precision.
    expected = (left.double().T @ right.double()).view(-1)[indices.long()]
    for panel_bytes in (1, 4 * columns * 3, 4 * columns * rows, 2**27):
        actual = from_panels(left, right, indices, panel_bytes)
        assert actual.dtype == torch.float32 and actual.shape == indices.shape
        assert_close(actual, expected, atol=1e-5)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_sampled_gradient_takes_strided_operands_and_both_index_dtypes(index_dtype):
    left, right = draw(7, 9).T, draw(11, 9).T
    assert not left.is_contiguous()
    indices = positions(77, 0.4, index_dtype)
    expected = (left.T @ right).reshape(-1)[indices.long()]
    for panel_bytes in (1, 100, 2**27):
        assert_close(from_panels(left, right, indices, panel_bytes), expected, atol=1e-6)


def test_sampled_gradient_never_holds_more_than_a_panel_and_skips_empty_ones():
    left, right = draw(3, 64), draw(3, 32, seed=1)
    indices = torch.tensor([5, 6, 64 * 32 - 1], dtype=torch.int32)
    with Watch() as seen:
        actual = from_panels(left, right, indices, panel_bytes=4 * 32 * 4)
    # Panels of four rows: the entries lie in the first and the last of sixteen.
    assert seen.entries <= max(left.numel(), 4 * 32) and seen.products == 2
    assert_close(actual, (left.T @ right).view(-1)[indices.long()], atol=1e-6)


@pytest.mark.parametrize("operation", ["sampled", "accumulated"])
def test_products_are_fp32_also_inside_the_users_autocast(operation):
    left, right = draw(9, 5), draw(9, 6, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        if operation == "sampled":
            actual = from_panels(left, right, torch.arange(30, dtype=torch.int32)).view(5, 6)
        else:
            actual = torch.zeros(5, 6)
            accumulate_product_(actual, left, right)
    assert actual.dtype == torch.float32
    assert_close(actual, left.double().T @ right.double(), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulated_product_adds(dtype):
    left, right, total = draw(9, 5, dtype=dtype), draw(9, 6, dtype=dtype, seed=1), draw(5, 6, seed=2)
    expected = total.double() + left.double().T @ right.double()
    accumulate_product_(total, left, right)
    assert_close(total, expected, atol=1e-5)


LAYOUTS = {
    "contiguous": lambda dtype: draw(4, 6, dtype=dtype),
    "transposed": lambda dtype: draw(6, 4, dtype=dtype).T,
    "strided": lambda dtype: draw(8, 12, dtype=dtype)[::2, 1::2],
    "slice of a stack": lambda dtype: draw(3, 4, 6, dtype=dtype)[1],
    "channels last": lambda dtype: draw(2, 3, 4, 5, dtype=dtype).to(memory_format=torch.channels_last),
    "permuted 3-D": lambda dtype: draw(3, 4, 5, dtype=dtype).permute(2, 0, 1),
    "vector": lambda dtype: draw(9, dtype=dtype),
    "scalar": lambda dtype: draw(dtype=dtype),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gather_and_scatter_mean_row_major_positions_in_any_layout(layout, index_dtype, dtype):
    weight = LAYOUTS[layout](dtype)
    for share in (0.0, 0.4, 1.0):
        indices = positions(weight.numel(), share, index_dtype)
        before, strides, pointer = weight.clone(), weight.stride(), weight.data_ptr()
        entries = gather_entries(weight, indices)
        assert entries.dtype == dtype and torch.equal(entries, weight.reshape(-1)[indices.long()])
        new = draw(len(indices), seed=3)
        assert scatter_entries_(weight, indices, new) is weight
        expected = before.reshape(-1).clone()
        expected[indices.long()] = new.to(dtype)
        assert torch.equal(weight.reshape(-1), expected)
        assert (weight.stride(), weight.data_ptr()) == (strides, pointer)


def test_scatter_rounds_to_nearest_once():
    weight = torch.zeros(3, dtype=torch.bfloat16)
    scatter_entries_(weight, torch.arange(3), torch.tensor([0.995, 1 + 2**-9, 1e-3]))
    assert weight.tolist() == [0.99609375, 1.0, torch.tensor(1e-3).bfloat16().item()]


@pytest.mark.parametrize("size", [(257,), (), (0,)])
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, maximize=False),
        dict(lr=3e-2, betas=(0.5, 0.9), eps=1e-4, weight_decay=0.0, maximize=True),
        dict(lr=0.0, betas=(0.0, 0.0), eps=1e-12, weight_decay=0.3, maximize=False),
    ],
)
def test_adamw_is_bit_equal_to_torch(options, tensor_lr, size):
    start = draw(*size)
    theirs = torch.nn.Parameter(start.clone())
    lr = torch.tensor(options["lr"]) if tensor_lr else options["lr"]
    optimizer = torch.optim.AdamW([theirs], **{**options, "lr": lr}, foreach=False)
    ours, exp_avg, exp_avg_sq = start.clone(), torch.zeros(size), torch.zeros(size)
    rest = {key: options[key] for key in ("eps", "weight_decay", "maximize")}
    for step in range(1, 6):
        gradient = draw(*size, seed=step) * 10.0 ** (step - 4)
        kept = gradient.clone()
        theirs.grad = gradient.clone()
        optimizer.step()
        betas = dict(zip(("beta1", "beta2"), options["betas"], strict=True))
        adamw_(ours, gradient, exp_avg, exp_avg_sq, step=step, lr=lr, **betas, **rest)
        assert torch.equal(gradient, kept)
        assert torch.equal(ours, theirs.detach())
        assert torch.equal(exp_avg, optimizer.state[theirs]["exp_avg"])
        assert torch.equal(exp_avg_sq, optimizer.state[theirs]["exp_avg_sq"])


def test_adamw_by_hand():
    """Two steps on one number: theta = 1, g = 2 then -1, lr 0.1, betas (0.5, 0.75), decay 0.5, eps 0."""
    value, mean, square = torch.ones(1), torch.zeros(1), torch.zeros(1)
    options = dict(lr=0.1, beta1=0.5, beta2=0.75, eps=0.0, weight_decay=0.5, maximize=False)
    adamw_(value, torch.tensor([2.0]), mean, square, step=1, **options)
    # m = 1, v = 1; m_hat = 2, v_hat = 4: theta = 1 - 0.05 - 0.1 * 2 / 2
    assert (mean.item(), square.item()) == (1.0, 1.0) and value.item() == pytest.approx(0.85, abs=1e-7)
    adamw_(value, torch.tensor([-1.0]), mean, square, step=2, **options)
    # m = 0.5 - 0.5 = 0, v = 0.75 + 0.25 = 1: theta = 0.85 - 0.05 * 0.85
    assert (mean.item(), square.item()) == (0.0, 1.0) and value.item() == pytest.approx(0.8075, abs=1e-7)
    adamw_(value, torch.tensor([-1.0]), mean, square, step=3, **options)
    # m = -0.5, m_hat = -0.5 / (1 - 1/8); v = 1, v_hat = 1 / (1 - 27/64)
    expected = 0.8075 * 0.95 + 0.1 * (0.5 / (7 / 8)) / math.sqrt(1 / (37 / 64))
    assert value.item() == pytest.approx(expected, abs=1e-7)
