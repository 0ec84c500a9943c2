"""Trained entries of a quantised layer: whoever reads, copies, moves, merges or saves it gets them, or a clear error.

Each path is tried in three states (sparsified, desparsified, adapter loaded), for int8, nf4 and nf4 with double
quantisation. A path either gives the weights that the model computes with, or raises with nothing written and the
model computing what it did.
"""

import copy
import io
import pickle
import warnings

import bitsandbytes as bnb
import pytest
import torch
from conftest import assert_close, token_batch
from quantized_models import KINDS, load_quantized, save_original
from torch import nn

from speft_optim import SparseAdamW, desparsify, load_adapter, save_adapter, select_masks, sparsify
from speft_optim.frozen import frozen_weight, quantized_linears

STATES = ["sparsified", "desparsified", "loaded"]
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save_original(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def models(original, tmp_path_factory):
    """A trained model of each kind in each state, to be copied by the tests."""
    made = {}
    for kind in KINDS:
        base = load_quantized(original, kind)
        for state in STATES:
            model = copy.deepcopy(base)
            train(model)
            if state == "desparsified":
                desparsify(model)
            elif state == "loaded":
                adapter = tmp_path_factory.mktemp("adapter") / "a.safetensors"
                save_adapter(model, adapter)
                model = copy.deepcopy(base)
                load_adapter(model, adapter)
            made[kind, state] = model
    return made


def train(model, steps=2):
    optimizer = SparseAdamW(
        sparsify(model, select_masks(model, salience="random", density=0.2, progress=False)), lr=0.1
    )
    for seed in range(steps):
        model(**token_batch(seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(params=[(kind, state) for kind in KINDS for state in STATES], ids="-".join)
def model(request, models):
    return copy.deepcopy(models[request.param])


def effective(model):
    """Every quantised weight as the model computes with it, fp32, by name."""
    return {f"{name}.weight": frozen_weight(module).dense(torch.float32) for name, module in quantized_linears(model)}


def logits(model):
    with torch.no_grad():
        return model(**token_batch(7)).logits


def is_int8(module):
    return isinstance(module, bnb.nn.Linear8bitLt)


def near(actual, weight):
    """Equal up to the rounding of a dequantised weight to a 16-bit dtype."""
    assert_close(actual.float(), weight.float(), rtol=1e-2, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Readers of one layer


def by_transformers(module):
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    return dequantize_bnb_weight(module.weight, module.state if is_int8(module) else None)


def by_peft(module):
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(module)


def by_peft_loftq(module):
    """As `replace_lora_weights_loftq` and `peft.helpers` read it."""
    if is_int8(module):
        return bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    return bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)


def by_the_parameter_itself(module):
    """Not by its data: then the parameter's class answers for all arguments."""
    if is_int8(module):
        return bnb.functional.int8_vectorwise_dequant(module.weight, module.weight.SCB)
    return bnb.functional.dequantize_4bit(module.weight, module.weight.quant_state)


def by_products(module):
    """The layer's own columns, by an identity through its forward."""
    return module(torch.eye(module.in_features)).t()


def by_bitsandbytes_forward(module):
    return type(module).forward(module, torch.eye(module.in_features)).t()


def by_bitsandbytes_forward_in_training(module):
    module.train()
    return type(module).forward(module, torch.eye(module.in_features).requires_grad_()).t()


def by_bitsandbytes_matmul(module):
    x = torch.eye(module.in_features)
    if is_int8(module):
        state = copy.copy(module.state)
        state.CB, state.SCB = module.weight.data, module.weight.SCB
        return bnb.matmul(x, module.weight, state=state).t()
    return bnb.matmul_4bit(x, module.weight, quant_state=module.weight.quant_state).t()


def by_bitsandbytes_backward(module):
    """The input gradient of bitsandbytes' product."""
    x = torch.zeros(module.out_features, module.in_features, requires_grad=True)
    type(module).forward(module, x).backward(torch.eye(module.out_features))
    return x.grad


def by_gemv(module):
    x = torch.eye(module.in_features)[:1]
    if is_int8(module):
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(x.half())
        return torch.ops.bitsandbytes.int8_scaled_mm(codes, module.weight.data, scales, module.weight.SCB)
    return bnb.functional.gemv_4bit(x, module.weight, state=module.weight.quant_state)


def by_arithmetic(module):
    """The formula itself, as in libraries' own kernels."""
    if is_int8(module):
        return module.weight.data * module.weight.SCB.view(-1, 1) / 127
    state = module.weight.quant_state
    return state.absmax.repeat_interleave(state.blocksize)


def by_pointer(module):
    """As libraries that launch kernels of their own on addresses."""
    return (module.weight.SCB if is_int8(module) else module.weight.quant_state.absmax).data_ptr()


def by_numpy(module):
    return (module.weight.SCB if is_int8(module) else module.weight.quant_state.absmax).cpu().numpy()


def by_another_layer_with_its_weight(module):
    other = copy.copy(module)
    other.__dict__ = {key: value for key, value in module.__dict__.items() if key != "forward"}
    other._parameters = dict(module._parameters)
    return by_transformers(other)


def by_compiled_forward(module):
    return torch.compile(module, backend="eager", fullgraph=True)(torch.eye(module.in_features)).t()


READERS = [value for name, value in list(globals().items()) if name.startswith("by_")]


@pytest.mark.parametrize("read", READERS)
def test_whoever_reads_the_layer_gets_the_trained_entries_or_a_clear_error(model, read):
    module = model.get_submodule(LAYER)
    before, expected = effective(model)[f"{LAYER}.weight"], logits(model)
    codes_alone = frozen_weight(module).dense_base(torch.float32)
    assert (before - codes_alone).abs().max() > 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = read(module)
        except RuntimeError as error:
            assert LAYER in str(error) and "export_merged" in str(error)
        else:
            if read is by_gemv:
                near(found[0], before[:, 0])
            else:
                near(found, before)
    assert torch.equal(effective(model)[f"{LAYER}.weight"], before)
    assert torch.equal(logits(model), expected), "reading changed the model"


# ---------------------------------------------------------------------------------------------------------------------
# Copies and moves of a layer


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def saved_whole(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def with_a_copied_weight(module):
    module.weight = copy.deepcopy(module.weight)
    return module


def with_a_shallow_copy_of_its_weight(module):
    module.weight = copy.copy(module.weight)
    return module


def with_a_moved_weight(module):
    module.weight = module.weight.to("cpu")
    return module


def parent_copied(module):
    return copy.deepcopy(nn.ModuleList([module]))[0]


def without_our_forward(module):
    """As a library that gives the layer another forward, and as bitsandbytes' own."""
    module.__dict__.pop("forward")
    return module


def as_another_instance(module):
    """A fresh layer of bitsandbytes' that is given the weight, as libraries that exchange layers do."""
    made = dict(bias=False) | (dict(has_fp16_weights=False) if is_int8(module) else dict(quant_type="nf4"))
    other = type(module)(module.in_features, module.out_features, **made)
    other.weight = module.weight
    return other


MOVES = [
    copy.deepcopy,
    copy.copy,
    pickled,
    saved_whole,
    with_a_copied_weight,
    with_a_shallow_copy_of_its_weight,
    with_a_moved_weight,
    parent_copied,
    without_our_forward,
    as_another_instance,
    lambda module: module.cpu(),
    lambda module: module.to("cpu"),
    lambda module: module.float(),
    lambda module: module.half(),
    lambda module: module.bfloat16(),
    lambda module: module.to(torch.float64),
    lambda module: module.eval(),
    lambda module: module.train().requires_grad_(False),
]


@pytest.mark.parametrize("move", MOVES)
def test_copies_and_moves_of_a_layer_carry_the_trained_entries(model, move):
    module = model.get_submodule(LAYER)
    before = frozen_weight(module).dense(torch.float32)
    moved = move(module)
    assert torch.equal(frozen_weight(moved).dense(torch.float32), before)
    # torch pickles the weight as a plain parameter that has the scales; transformers then sees no quantised one.
    if type(moved.weight) is not nn.Parameter:
        near(by_transformers(moved), before)


def test_a_copied_layer_is_trained_on_its_own(models):
    for kind in KINDS:
        model = copy.deepcopy(models[kind, "sparsified"])
        twin = copy.deepcopy(model.model)
        expected = effective(model)
        layer = twin.get_submodule(LAYER.removeprefix("model."))
        with torch.no_grad():
            layer.sparse_weight.values.add_(1)
        assert all(torch.equal(weight, effective(model)[name]) for name, weight in expected.items())
        mask = layer.sparse_weight.mask
        moved = frozen_weight(layer).gather(mask.indices) - frozen_weight(model.get_submodule(LAYER)).gather(
            mask.indices
        )
        assert_close(moved, torch.ones_like(moved))


def test_offloading_is_refused_before_the_scales_are_gone(model, tmp_path):
    from accelerate import cpu_offload, disk_offload

    for offload, options in ((cpu_offload, {}), (disk_offload, {"offload_dir": str(tmp_path)})):
        twin = copy.deepcopy(model)
        expected = effective(twin)
        with pytest.raises((RuntimeError, ValueError), match="trained entries.*export_merged"):
            offload(twin, execution_device="cpu", **options)
        assert all(torch.equal(weight, expected[name]) for name, weight in effective(twin).items())
