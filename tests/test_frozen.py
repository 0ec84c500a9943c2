"""One interface to dense, int8 and 4-bit weights: every way to read an entry agrees with the definition."""

import copy
import sys

import bitsandbytes as bnb
import pytest
import torch
from conftest import assert_close
from torch import nn

from speft_optim.masks.mask import Mask, find
from speft_optim.weights.bnb import is_quantized_linear, settle_storage
from speft_optim.weights.four_bit import FourBitWeight
from speft_optim.weights.int8 import Int8Weight
from speft_optim.weights.products import is_linear
from speft_optim.weights.storage import DenseWeight, frozen_weight
from speft_optim.weights.targets import all_targets, find_targets

KINDS = ["dense", "int8", "nf4", "double", "stored-bf16"]
SHAPES = [(64, 128), (30, 50), (7, 96), (5, 13), (1, 64), (1, 1), (96, 192)]


def layer(kind, shape, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    rows, columns = shape
    weight = torch.randn(rows, columns, dtype=dtype)
    if kind == "dense":
        module = nn.Linear(columns, rows, bias=False, dtype=dtype)
        module.weight.data.copy_(weight)
        return module, weight
    if kind == "int8":
        module = bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
        module.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    else:
        storage = torch.bfloat16 if kind == "stored-bf16" and weight.numel() % 4 == 0 else torch.uint8
        options = dict(quant_type="nf4", compress_statistics=kind == "double", quant_storage=storage)
        module = bnb.nn.Linear4bit(columns, rows, bias=False, **options)
        module.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, module=module, **options)
    return module.to("cpu"), weight


def by_definition(module, kind):
    """The dequantised weight from the formulas, entry by entry."""
    if kind == "dense":
        return module.weight.detach().clone()
    if kind == "int8":
        scales = module.weight.SCB * (1 / 127)
        return torch.stack([row.float() * scale for row, scale in zip(module.weight, scales, strict=True)])
    state, shape = module.weight.quant_state, module.weight.quant_state.shape
    scales = state.absmax
    if state.nested:
        blocks = torch.arange(len(scales)) // state.state2.blocksize
        scales = state.state2.code[scales.int()] * state.state2.absmax[blocks] + state.offset
    data = module.weight.detach().reshape(-1).view(torch.uint8).tolist()
    codes = [half for byte in data for half in (byte >> 4, byte & 15)][: shape.numel()]
    entries = [state.code[code] * scales[place // state.blocksize] for place, code in enumerate(codes)]
    return torch.stack(entries).view(shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_all_ways_to_read_agree_with_the_definition(kind, shape):
    module, original = layer(kind, shape)
    weight, expected = frozen_weight(module), by_definition(module, kind)
    assert weight.shape == expected.shape == shape
    assert torch.equal(weight.dense(torch.float32), expected)
    assert torch.equal(weight.dense(torch.bfloat16), expected.to(torch.bfloat16))
    everything = torch.arange(expected.numel(), dtype=torch.int32)
    assert torch.equal(weight.gather(everything), expected.view(-1))
    for first in range(0, shape[0], 3):
        last = min(shape[0], first + 5)
        assert torch.equal(weight.rows(first, last), expected[first:last])
    # A wrong layout would be off by far more than the quantisation error.
    step = {"dense": 0, "int8": 0.01}.get(kind, 0.2)
    assert (expected - original).abs().max() <= step * original.abs().max()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_reads_what_the_definition_says(kind, shape):
    module, _ = layer(kind, shape)
    expected = by_definition(module, kind).cuda()
    weight = frozen_weight(module.to("cuda"))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(weight.dense(dtype), expected.to(dtype))
    everything = torch.arange(expected.numel(), dtype=torch.int32, device="cuda")
    assert torch.equal(weight.gather(everything), expected.view(-1))
    assert torch.equal(weight.rows(0, shape[0]), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["int8", "nf4", "double"])
def test_a_layer_quantised_and_trained_on_the_cpu_moves_to_a_gpu_and_back(kind):
    module, _ = layer(kind, (96, 192))
    expected = by_definition(module, kind)
    places = torch.arange(0, expected.numel(), 7)
    frozen_weight(module).put(Mask(places, expected.shape), torch.full((len(places),), 3.0))
    expected.view(-1)[places] = 3.0
    for device in ("cuda", "cpu", "cuda"):
        module = module.to(device)
        weight = frozen_weight(module)
        assert weight.scales.device == module.weight.device == weight.dense(torch.float32).device
        weight.place_scales()
        assert torch.equal(weight.dense(torch.float32).cpu(), expected)
        if kind == "int8":
            theirs = bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
        else:
            theirs = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert_close(theirs.cpu().float(), expected)


@pytest.mark.parametrize("trained", [False, True])
def test_scales_that_were_left_on_another_device_are_read_beside_the_codes_and_placed_there_when_asked(trained):
    """As bitsandbytes leaves those of an int8 weight that was quantised on the CPU and moved to a GPU."""
    module, _ = layer("int8", (30, 50))
    if trained:
        frozen_weight(module).put(Mask(torch.tensor([7]), (30, 50)), torch.tensor([3.0]))
    weight, before = frozen_weight(module), module.weight.SCB
    # The one other device that is everywhere.
    weight.device = torch.device("meta")
    assert weight.scales.is_meta and module.weight.SCB is before
    weight.place_scales()
    assert weight.scales.is_meta and module.weight.SCB.is_meta
    assert len(frozen_weight(module).overlays) == trained


def test_reads_as_bitsandbytes_does_where_that_is_right():
    for kind, shape in (("nf4", (64, 128)), ("double", (16, 64)), ("nf4", (30, 50))):
        module, _ = layer(kind, shape, torch.bfloat16)
        theirs = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert torch.equal(frozen_weight(module).dense(torch.bfloat16), theirs)
    module, _ = layer("int8", (30, 50))
    theirs = bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    assert_close(frozen_weight(module).dense(torch.float32), theirs)


def test_int8_state_is_found_before_and_after_first_forward():
    module, _ = layer("int8", (30, 50))
    before = frozen_weight(module).dense(torch.float32)
    module(torch.randn(2, 50))
    assert module.weight.SCB is None and module.state.SCB is not None
    assert torch.equal(frozen_weight(module).dense(torch.float32), before)


def in_evaluation(kind):
    """A layer that bitsandbytes has computed in evaluation, in the CPU's other layout where there is one."""
    module, _ = layer(kind, (64, 128), torch.bfloat16)
    module.eval()
    before = frozen_weight(module).dense(torch.float32)
    with torch.no_grad():
        module(torch.randn(2, 128))
    if bnb.functional.has_avx512bf16():
        assert kind == "int8" or module.weight.quant_state.packing_format_for_cpu
    return module, before


def storage(module):
    """All that a layer's weight is stored as: tensors by identity, place and content."""
    held = dict(vars(module.weight))
    if hasattr(module, "state"):
        held |= {f"state.{key}": part for key, part in vars(module.state).items()}
    if (state := held.get("quant_state")) is not None:
        held |= {f"quant_state.{key}": part for key, part in vars(state).items()}
    held["codes"] = module.weight.data
    return {
        key: (part.data_ptr(), part.dtype, part.shape, part.stride(), part.tolist())
        if isinstance(part, torch.Tensor)
        else id(part)
        for key, part in held.items()
    }


@pytest.mark.parametrize("kind", ["int8", "nf4", "double"])
def test_a_read_changes_nothing_of_a_layer_in_any_layout_and_settling_changes_no_entry(kind):
    module, before = in_evaluation(kind)
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"proj": module})])})
    kept = storage(module)
    (target,) = find_targets(model).values()
    read = frozen_weight(module).dense(torch.float32)
    assert target.shape == (64, 128) and torch.equal(target.rows(3, 9), read[3:9])
    assert torch.equal(frozen_weight(module).gather(torch.arange(64 * 128)), read.view(-1))
    assert storage(module) == kept
    # bitsandbytes itself rounds the scales to bf16 on the way, where this processor has such a layout at all.
    assert_close(read, before, rtol=2e-2, atol=2e-2)
    settle_storage(model)
    assert torch.equal(frozen_weight(module).dense(torch.float32), read)
    assert kind == "int8" or not getattr(module.weight.quant_state, "packing_format_for_cpu", False)


@pytest.mark.parametrize("kind", ["int8", "nf4", "double"])
def test_entries_can_be_put_into_a_layer_in_any_layout(kind):
    module, _ = in_evaluation(kind)
    expected = frozen_weight(module).dense(torch.float32)
    weight = frozen_weight(module)
    weight.put(Mask(torch.tensor([7]), (64, 128)), torch.tensor([3.0]))
    expected.view(-1)[7] = 3.0
    assert torch.equal(weight.dense(torch.float32), expected)
    assert torch.equal(frozen_weight(module).dense(torch.float32), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(30, 50), (8, 64)])
def test_overlays_are_seen_by_all_ways_to_read(kind, shape):
    module, _ = layer(kind, shape)
    expected, generator = by_definition(module, kind).view(-1), torch.Generator().manual_seed(1)
    for share in (10, 4):
        places = torch.randperm(expected.numel(), generator=generator)[: expected.numel() // share].sort().values
        values = torch.randn(len(places), generator=generator)
        frozen_weight(module).put(Mask(places, shape), values)
        expected[places] = values
    weight = frozen_weight(module)
    assert torch.equal(weight.dense(torch.float32), expected.view(shape))
    assert torch.equal(weight.rows(2, 7), expected.view(shape)[2:7])
    places = torch.randperm(expected.numel(), generator=generator)
    assert torch.equal(weight.gather(places), expected[places])
    weight.put(Mask(torch.empty(0, dtype=torch.int32), shape), torch.empty(0))
    assert torch.equal(weight.dense(torch.float32), expected.view(shape))


def test_attached_values_are_followed_released_ones_are_kept():
    module, _ = layer("nf4", (8, 64))
    weight, values = frozen_weight(module), torch.zeros(3)
    mask = Mask(torch.tensor([1, 100, 511]), (8, 64))
    weight.put(Mask(torch.tensor([0, 1]), (8, 64)), torch.tensor([5.0, 6.0]))
    weight.attach(mask, values)
    values.fill_(7.0)
    assert frozen_weight(module).gather(torch.tensor([0, 1, 100, 511])).tolist() == [5, 7, 7, 7]
    weight.put(Mask(torch.tensor([2, 100]), (8, 64)), torch.tensor([3.0, 4.0]))
    assert values.tolist() == [7, 4, 7], "an entry set from outside must reach the values that are trained"
    frozen_weight(module).release(values)
    values.fill_(0.0)
    assert frozen_weight(module).gather(torch.tensor([0, 1, 2, 100, 511])).tolist() == [5, 7, 3, 4, 7]
    assert len(frozen_weight(module).overlays) == 1


def test_targets_have_logical_shapes_and_are_linear():
    block = nn.ModuleList([nn.ModuleDict({"proj": layer("nf4", (30, 50))[0], "other": layer("int8", (7, 96))[0]})])
    model = nn.ModuleDict({"blocks": block})
    targets = find_targets(model)
    assert {name: tuple(target.shape) for name, target in targets.items()} == {
        "blocks.0.proj.weight": (30, 50),
        "blocks.0.other.weight": (7, 96),
    }
    for target in targets.values():
        assert target.matrix_shape == target.shape and is_linear(*target.sites[0])
        assert torch.equal(target.rows(0, 3), frozen_weight(*target.sites[0]).dense(torch.float32)[:3])


def test_a_target_gives_a_quantised_weight_without_its_trained_entries():
    for kind in KINDS:
        module, _ = layer(kind, (30, 50))
        before = frozen_weight(module).dense(torch.float32).clone()
        mask = Mask(torch.arange(0, 1500, 7), (30, 50))
        frozen_weight(module).attach(mask, torch.full((len(mask),), 9.0))
        base = find_targets(module, ["weight"])["weight"].dequantized_base(torch.float32)
        # A dense weight holds its trained entries itself.
        assert base is None if kind == "dense" else torch.equal(base, before)


def test_kinds_are_told_apart():
    assert isinstance(frozen_weight(layer("int8", (4, 4))[0]), Int8Weight)
    assert isinstance(frozen_weight(layer("nf4", (4, 64))[0]), FourBitWeight)
    plain = nn.Linear(4, 4)
    assert isinstance(frozen_weight(plain), DenseWeight) and not is_quantized_linear(plain)
    waiting = bnb.nn.Linear4bit(64, 4)
    assert not is_quantized_linear(waiting), "its weight is dense until it is moved to a device"
    assert not is_quantized_linear(bnb.nn.Linear8bitLt(8, 4, has_fp16_weights=True))
    assert all(isinstance(frozen_weight(*t.sites[0]), DenseWeight) for t in all_targets(plain).values())


def test_a_copied_layer_reads_the_same_weight():
    for kind in ("int8", "nf4", "double"):
        module, _ = layer(kind, (30, 50))
        module(torch.randn(2, 50))
        twin = copy.deepcopy(module)
        assert torch.equal(frozen_weight(twin).dense(torch.float32), frozen_weight(module).dense(torch.float32))


def test_find_meets_brute_force():
    generator = torch.Generator().manual_seed(0)
    for size in (0, 1, 5, 40):
        have = torch.randperm(60, generator=generator)[:size].sort().values
        want = torch.randperm(70, generator=generator)[:30]
        place, inside = find(have.int(), want)
        assert inside.tolist() == [int(w) in have.tolist() for w in want]
        assert torch.equal(have[place[inside]], want[inside])


def test_bitsandbytes_is_never_imported_for_dense_models():
    import subprocess

    code = (
        "import sys, torch, speft_optim\n"
        "m = torch.nn.ModuleDict({'b': torch.nn.ModuleList([torch.nn.Linear(4, 4)])})\n"
        "masks = speft_optim.select_masks(m, salience='magnitude', density=0.5)\n"
        "speft_optim.sparsify(m, masks); speft_optim.desparsify(m)\n"
        "assert 'bitsandbytes' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
