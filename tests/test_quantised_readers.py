"""Trained entries of a quantised layer: whoever reads, copies, moves, merges or saves it gets them, or a clear error.

Each path is tried in three states (sparsified, desparsified, adapter loaded), for int8, nf4 and nf4 with double
quantisation. A path either gives the weights that the model computes with, or raises with nothing written and the
model computing what it did.
"""

import copy
import inspect
import io
import pickle
import warnings

import bitsandbytes as bnb
import pytest
import torch
from conftest import assert_close, fine_tune, token_batch
from quantized_models import KINDS, effective, load_quantized, save_original
from torch import nn

from speft_optim import (
    SparseAdamW,
    desparsify,
    load_adapter,
    merge_adapters,
    save_adapter,
    unload_adapter,
)
from speft_optim.weights.bnb import quantized_linears
from speft_optim.weights.quantized_state import _unseal
from speft_optim.weights.storage import frozen_weight

STATES = ["sparsified", "desparsified", "loaded"]
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    # Rows of whole blocks: bitsandbytes itself is wrong about others on the CPU.
    return save_original(tmp_path_factory.mktemp("base") / "llama", intermediate_size=128)


@pytest.fixture(scope="module")
def models(original, tmp_path_factory):
    """A trained model of each kind in each state, to be copied by the tests."""
    made = {}
    for kind in KINDS:
        base = load_quantized(original, kind)
        for state in STATES:
            model = copy.deepcopy(base)
            fine_tune(model, lr=0.1)
            if state == "desparsified":
                desparsify(model)
            elif state == "loaded":
                adapter = tmp_path_factory.mktemp("adapter") / "a.safetensors"
                save_adapter(model, adapter)
                model = copy.deepcopy(base)
                load_adapter(model, adapter)
            made[kind, state] = model
    return made


@pytest.fixture(params=[(kind, state) for kind in KINDS for state in STATES], ids="-".join)
def model(request, models):
    return copy.deepcopy(models[request.param])


def zero_trained_values(model):
    for _, module in quantized_linears(model):
        for _, values in frozen_weight(module).overlays:
            values.detach().zero_()


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

    # transformers 4 also asks for a dtype.
    dtypes = [torch.float32] if "dtype" in inspect.signature(dequantize_bnb_weight).parameters else []
    return dequantize_bnb_weight(module.weight, *dtypes, state=module.state if is_int8(module) else None)


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


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, pickled, saved_whole, parent_copied])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", STATES)
def test_a_copy_that_was_never_called_compiles(models, kind, state, copied):
    module = models[kind, state].get_submodule(LAYER)
    twin = copied(module)
    torch._dynamo.reset()
    near(by_compiled_forward(twin), frozen_weight(module).dense(torch.float32))


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


# ---------------------------------------------------------------------------------------------------------------------
# The whole model: replaced, merged, saved


def loss_of(model):
    with torch.no_grad():
        return model(**token_batch(0)).loss.item()


def plain(folder, kind="AutoModelForCausalLM"):
    import transformers as tf

    return getattr(tf, kind).from_pretrained(folder, dtype=torch.float32)


def holds(model, expected):
    """Whether a plain model has the trained weights, rounded to bf16 at most."""
    for name, weight in expected.items():
        near(model.get_parameter(name), weight)


def test_a_dequantised_model_is_the_trained_one_and_so_is_what_it_saves(model, tmp_path):
    expected, loss, untrained = effective(model), loss_of(model), copy.deepcopy(model)
    for _, module in quantized_linears(untrained):
        frozen_weight(module)._carry([])
    assert abs(loss_of(untrained) - loss) > 0.05
    dense = model.dequantize()
    assert next(quantized_linears(dense), None) is None
    holds(dense, expected)
    assert loss_of(dense) == pytest.approx(loss, abs=5e-3)
    dense.save_pretrained(tmp_path / "saved")
    holds(plain(tmp_path / "saved"), expected)
    if "_before_sparsify" in dense.__dict__:
        desparsify(dense)
        assert loss_of(dense) == pytest.approx(loss, abs=5e-3)


def by_root(model, folder):
    model.save_pretrained(folder)
    return plain(folder), ""


def by_options(model, folder):
    model.save_pretrained(folder, safe_serialization=True, max_shard_size="20KB")
    return plain(folder), ""


def by_inner_model(model, folder):
    model.model.save_pretrained(folder)
    return plain(folder, "AutoModel"), "model."


def by_copy_of_inner_model(model, folder):
    copy.deepcopy(model.model).save_pretrained(folder)
    return plain(folder, "AutoModel"), "model."


def by_export(model, folder):
    from speft_optim import export_merged

    export_merged(model, folder)
    return plain(folder), ""


def by_accelerator(model, folder):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.unwrap_model(model).save_pretrained(folder, state_dict=accelerator.get_state_dict(model))
    return plain(folder), ""


def by_wrapper(model, folder):
    nn.DataParallel(model).module.save_pretrained(folder)
    return plain(folder), ""


SAVES = [by_root, by_options, by_inner_model, by_copy_of_inner_model, by_export, by_accelerator, by_wrapper]


@pytest.mark.parametrize("save", SAVES)
def test_whatever_saves_the_model_writes_the_trained_weights(model, save, tmp_path):
    expected = effective(model)
    found, prefix = save(model, tmp_path / "saved")
    holds(found, {name.removeprefix(prefix): weight for name, weight in expected.items()})


def states_of_torch(model, folder):
    torch.save(model.state_dict(), folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


def state_of_inner_model(model, folder):
    return {f"model.{key}": part for key, part in model.model.state_dict().items()}


def states_that_keep_parameters(model, folder):
    return model.state_dict(keep_vars=True)


def states_of_layers(model, folder):
    return {
        f"{name}.{key}": part
        for name, module in quantized_linears(model)
        for key, part in copy.deepcopy(module).state_dict().items()
    }


def state_of_accelerate(model, folder):
    from accelerate import Accelerator
    from safetensors.torch import load_file

    Accelerator(cpu=True).save_model(model, str(folder))
    return load_file(folder / "model.safetensors")


STATE_DICTS = [
    states_of_torch,
    states_that_keep_parameters,
    state_of_inner_model,
    states_of_layers,
    state_of_accelerate,
]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("read", STATE_DICTS)
def test_state_dicts_carry_the_trained_entries_and_are_plain_tensors(model, read, assign, tmp_path):
    expected = effective(model)
    state = read(model, tmp_path)
    assert not any(type(part).__name__ == "TrainedScales" for part in state.values())
    assert all(f"{name.removesuffix('weight')}trained_values" in state for name in expected)
    fresh = copy.deepcopy(model)
    zero_trained_values(fresh)
    assert not torch.equal(effective(fresh)[f"{LAYER}.weight"], expected[f"{LAYER}.weight"])
    fresh.load_state_dict(state, strict=False, assign=assign)
    assert all(torch.equal(weight, expected[name]) for name, weight in effective(fresh).items())
    assert torch.equal(logits(fresh), logits(model))


def test_saving_by_the_class_is_refused_before_anything_is_written(model, tmp_path):
    import transformers as tf

    for part in (model, model.model):
        for save in (type(part).save_pretrained, tf.PreTrainedModel.save_pretrained):
            with pytest.raises(ValueError, match="The quantised weights alone are not the trained model"):
                save(part, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_inner_models_get_no_quantiser_for_good(models):
    for kind in KINDS:
        model = copy.deepcopy(models[kind, "loaded"])
        assert model.model.hf_quantizer is model.hf_quantizer
        unload_adapter(model)
        assert "hf_quantizer" not in model.model.__dict__
        assert model.hf_quantizer.is_serializable()


# ---------------------------------------------------------------------------------------------------------------------
# Models that do not know of trained entries, and checkpoints of torch.distributed


def into_torch(plain, model, folder):
    plain.load_state_dict(model.state_dict(), strict=False)


def into_torch_by_assignment(plain, model, folder):
    plain.load_state_dict(model.state_dict(), strict=False, assign=True)


def into_a_parent(plain, model, folder):
    nn.ModuleList([plain]).load_state_dict(nn.ModuleList([model]).state_dict(), strict=False)


def into_accelerate(plain, model, folder):
    from accelerate import Accelerator, load_checkpoint_and_dispatch

    Accelerator(cpu=True).save_model(model, str(folder))
    load_checkpoint_and_dispatch(plain, str(folder), device_map={"": "cpu"}, strict=False)


def into_safetensors(plain, model, folder):
    from safetensors.torch import load_model, save_model

    save_model(model, str(folder / "model.safetensors"))
    load_model(plain, str(folder / "model.safetensors"), strict=False)


def into_distributed(plain, model, folder):
    import torch.distributed.checkpoint as dcp

    dcp.save(model.state_dict(), checkpoint_id=folder)
    try:
        dcp.load(plain.state_dict(), checkpoint_id=folder)
    except dcp.api.CheckpointException as error:  # It derives from BaseException.
        raise RuntimeError(str(error)) from error


PLAIN_LOADERS = [value for name, value in list(globals().items()) if name.startswith("into_")]


@pytest.mark.parametrize("load", PLAIN_LOADERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_quantised_model_refuses_a_state_with_trained_entries(models, original, kind, load, tmp_path):
    # accelerate, not strict, has its own trouble with any state of 4-bit layers: it looks up the last words.
    refusal = "(?i)size mismatch|tensor of shape|Missing key|Params4bit.*has no attribute '_parameters'"
    with pytest.raises((RuntimeError, ValueError, AttributeError), match=refusal):
        load(load_quantized(original, kind), models[kind, "sparsified"], tmp_path)


def test_from_pretrained_refuses_a_checkpoint_of_such_a_state(model, tmp_path):
    import transformers as tf
    from safetensors.torch import save_file

    model.config.save_pretrained(tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    kind, said = RuntimeError, "issues during automatic conversion of the weights"
    if int(tf.__version__.partition(".")[0]) < 5:  # what the seal says is taken for a dtype or an attribute
        kind, said = AttributeError, "of a quantised weight with trained entries|sealed_SCB"
    with pytest.raises(kind, match=said):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")


def test_a_state_whose_trained_entries_were_left_out_is_refused(model):
    state = {key: part for key, part in model.state_dict().items() if "trained_" not in key}
    with pytest.raises(RuntimeError, match="was saved with trained entries, but .*trained_indices is not in the state"):
        model.load_state_dict(state, strict=False)


def without(key):
    return lambda state: {name: part for name, part in state.items() if not name.endswith(key)}


def changed(key, change):
    return lambda state: {name: change(part) if name.endswith(key) else part for name, part in state.items()}


DAMAGES = {
    "fewer values": (changed("trained_values", lambda part: part[:-1]), "not one position for each"),
    "fewer positions": (changed("trained_indices", lambda part: part[1:]), "not one position for each"),
    "no values": (without("trained_values"), "trained_values is missing"),
    "values of integers": (changed("trained_values", lambda part: part.long()), "no tensor of floating-point numbers"),
    "positions of numbers": (changed("trained_indices", lambda part: part.float()), "needs integer positions"),
    "positions outside": (changed("trained_indices", lambda part: part + 2**20), "lies outside"),
    "positions in another order": (changed("trained_indices", lambda part: part.flip(0)), "does not increase"),
    "no scales": (without(("sealed_SCB", "absmax")), "sealed_SCB is not|without its absmax"),
}


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_refused_and_changes_no_trained_entry(models, kind, damage):
    change, said = DAMAGES[damage]
    model = copy.deepcopy(models[kind, "sparsified"])
    expected, state = effective(model), change(model.state_dict())
    with pytest.raises(RuntimeError, match=said):
        model.load_state_dict(state, strict=False)
    assert all(torch.equal(weight, expected[name]) for name, weight in effective(model).items())


@pytest.mark.parametrize("assign", [False, True])
def test_a_merged_state_gives_its_trained_entries(model, assign):
    expected = effective(model)
    zero_trained_values(model)
    model.load_state_dict(expected, strict=False, assign=assign)
    assert all(torch.equal(weight, expected[name]) for name, weight in effective(model).items())


def test_a_state_that_was_saved_without_a_seal_loads(model):
    expected, state = effective(model), model.state_dict()
    for key in [key.removesuffix("trained_values") for key in state if key.endswith("trained_values")]:
        _unseal(state, key)
    zero_trained_values(model)
    model.load_state_dict(state)
    assert all(torch.equal(weight, expected[name]) for name, weight in effective(model).items())


def through_distributed_checkpoint(model, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    dcp.save(get_model_state_dict(model), checkpoint_id=folder)
    zero_trained_values(model)
    state = {key: part.clone() for key, part in get_model_state_dict(model).items()}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state)


def through_full_distributed_state(model, folder):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = {key: part.clone() for key, part in get_model_state_dict(model, options=options).items()}
    zero_trained_values(model)
    set_model_state_dict(model, state, options=options)


def through_accelerate_state(model, folder):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model)
    accelerator.save_state(str(folder))
    zero_trained_values(model)
    accelerator.load_state(str(folder))


def through_safetensors(model, folder):
    from safetensors.torch import load_model, save_model

    save_model(model, str(folder / "model.safetensors"))
    zero_trained_values(model)
    load_model(model, str(folder / "model.safetensors"))


ROUND_TRIPS = [value for name, value in list(globals().items()) if name.startswith("through_")]


@pytest.mark.parametrize("trip", ROUND_TRIPS)
def test_what_a_checkpoint_saves_of_a_model_it_loads_into_it(model, trip, tmp_path):
    expected, expected_logits = effective(model), logits(model)
    trip(model, tmp_path)
    assert all(torch.equal(weight, expected[name]) for name, weight in effective(model).items())
    assert torch.equal(logits(model), expected_logits)


def lora(model, **options):
    peft = pytest.importorskip("peft")
    options = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj"], **options}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
    return wrapped


def disturb(wrapped):
    """Make of the LoRA factors a change that is felt."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_a_merged_lora_change_arrives_at_every_entry_and_the_trained_ones_stay(models, kind, state, options):
    model = copy.deepcopy(models[kind, state])
    before = effective(model)
    wrapped = lora(model, **options)
    disturb(wrapped)
    base = wrapped.get_base_model()
    change = {
        f"{name}.weight": layer.get_delta_weight("default").detach()
        for name, layer in base.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    expected = logits(wrapped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = wrapped.merge_and_unload(safe_merge=True)
    after = effective(merged)
    for name, weight in before.items():
        if name not in change:
            assert torch.equal(after[name], weight)
        else:
            # The trained entries were quantised anew with the rest, so they are off by the quantisation error.
            step = 0.01 if kind == "int8" else 0.2
            target = weight + change[name] if not options.get("use_dora") else after[name]
            assert (after[name] - target).abs().max() < step * target.abs().max()
            assert not frozen_weight(merged.get_submodule(name.removesuffix(".weight"))).overlays
    error = (logits(merged) - expected).norm() / expected.norm()
    assert error < 0.25


@pytest.mark.parametrize("kind", KINDS)
def test_merging_and_unmerging_keeps_the_trained_function(models, kind):
    model = copy.deepcopy(models[kind, "desparsified"])
    before = effective(model)
    wrapped = lora(model)
    disturb(wrapped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.merge_adapter()
        wrapped.unmerge_adapter()
    for name, layer in wrapped.get_base_model().named_modules():
        if hasattr(layer, "get_delta_weight"):
            weight, base = before[f"{name}.weight"], layer.get_base_layer()
            step = 0.02 if kind == "int8" else 0.4
            assert (frozen_weight(base).dense(torch.float32) - weight).abs().max() < step * weight.abs().max()


@pytest.mark.parametrize("init", ["gaussian", "olora", "pissa", "orthogonal"])
@pytest.mark.parametrize("kind", KINDS)
def test_lora_initialisations_keep_the_trained_function_or_raise(models, kind, init):
    model = copy.deepcopy(models[kind, "desparsified"])
    expected = logits(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = lora(model, init_lora_weights=init)
    except (TypeError, RuntimeError) as error:
        # peft's own refusals of quantised weights.
        assert "PiSSA" in str(error) or "require gradients" in str(error)
        assert torch.equal(logits(model), expected)
    else:
        error = (logits(wrapped) - expected).norm() / expected.norm()
        assert error < 0.25, error


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kind", KINDS)
def test_preparing_for_kbit_training_keeps_the_trained_function(models, kind, state):
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(models[kind, state])
    expected = effective(model)
    prepared = peft.prepare_model_for_kbit_training(model)
    assert all(torch.equal(weight, expected[name]) for name, weight in effective(prepared).items())


def test_adapters_unload_to_the_base_and_merge_for_good(models):
    for kind in KINDS:
        model = copy.deepcopy(models[kind, "loaded"])
        expected = effective(model)
        merged = copy.deepcopy(model)
        merge_adapters(merged)
        near(by_transformers(merged.get_submodule(LAYER)), expected[f"{LAYER}.weight"])
        unload_adapter(model)
        layer = model.get_submodule(LAYER)
        assert not frozen_weight(layer).overlays and "forward" not in layer.__dict__
        scales = layer.weight.SCB if is_int8(layer) else layer.weight.quant_state.absmax
        assert type(scales) is torch.Tensor
        near(by_transformers(layer), frozen_weight(layer).dense_base(torch.float32))


def requantised(module):
    """As peft's merge leaves the layer: with a new parameter, of what transformers or peft dequantised."""
    weight = by_transformers(module)
    if is_int8(module):
        module.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
        module.state.reset_grads()
    else:
        kwargs = {key: part for key, part in module.weight.__dict__.items() if key not in ("data", "requires_grad")}
        kwargs["bnb_quantized"] = False
        module.weight = bnb.nn.Params4bit(weight, requires_grad=False, **kwargs).to("cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_quantised_anew_in_training_computes_on_and_is_not_trained_in_silence(models, kind):
    model = copy.deepcopy(models[kind, "sparsified"])
    loss = loss_of(model)
    optimizer = SparseAdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _, module in quantized_linears(model):
        before = frozen_weight(module).dense(torch.float32)
        requantised(module)
        after = frozen_weight(module)
        assert not after.overlays and (after.dense(torch.float32) - before).abs().max() < 0.2 * before.abs().max()
    assert loss_of(model) == pytest.approx(loss, abs=0.2)
    model(**token_batch(0)).loss.backward()
    with pytest.raises(ValueError, match="was quantised anew, its trained entries with it.*call desparsify"):
        optimizer.step()
    merged = effective(model)
    desparsify(model)
    assert all(torch.equal(weight, merged[name]) for name, weight in effective(model).items())
