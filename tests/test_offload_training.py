"""Training with the base in host memory gives what a resident model gives, bit for bit, and leaves the model whole."""

import copy
import gc
import pickle
import threading
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    CHANGES_OF_VALUES,
    OPTIONS,
    Setup,
    attach,
    equal_states,
    every,
    moved_blocks,
    random_masks,
    some_entries,
    tiny_model,
    token_batch,
    train,
    weights_of,
)
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint as checkpoints

from speft_optim import (
    MaskSchedule,
    SparseAdamW,
    desparsify,
    export_merged,
    load_adapter,
    save_adapter,
    select_masks,
    sparsify,
)
from speft_optim.offload import activations
from speft_optim.offload import head as head_copies
from speft_optim.offload.activations import HostActivations
from speft_optim.offload.host_parameter import HostParameter
from speft_optim.offload.host_weight import HostWeight
from speft_optim.offload.lookup import on_host, sent
from speft_optim.offload.quantized import HostQuantized
from speft_optim.offload.training import OffloadedBase
from speft_optim.weights.attached import record_of, sparse_weights
from speft_optim.weights.bnb import is_quantized_linear
from speft_optim.weights.sparse_weight import SparseWeight
from speft_optim.weights.storage import frozen_weight
from speft_optim.weights.targets import all_targets

KINDS = ["llama", "qwen2", "gemma2", "gpt2"]


def offloaded(model="llama", dtype=torch.float32, targets=None, masks=None, **options):
    """What `attach` gives, of a model that stays in host memory."""
    model = tiny_model(model, dtype) if isinstance(model, str) else model
    masks = random_masks(model, targets) if masks is None else masks
    values = sparsify(model, masks, offload="cpu")
    return Setup(model, masks, values, SparseAdamW(values, **{**OPTIONS, **options}))


def state(model):
    """All that `sparsify` and a device may change in a model but its weights."""
    hooks = [len(getattr(m, kind)) for m in model.modules() for kind in ("_forward_hooks", "_forward_pre_hooks")]
    attributes = [sorted(vars(module)) for module in model.modules()]
    return hooks, attributes, [(id(p), type(p), p.requires_grad, sorted(vars(p))) for p in model.parameters()]


def assert_equal(one, other):
    """Weights, values and optimizer states are equal."""
    assert equal_states(one.model.state_dict(), other.model.state_dict())
    assert equal_states(one.optimizer.state_dict(), other.optimizer.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_training_equals_that_of_a_resident_model(kind, dtype):
    """With weight decay, accumulation and 8-bit moments."""
    resident, host = attach(kind, dtype, state_bits=8), offloaded(kind, dtype, state_bits=8)
    assert train(host.model, host.optimizer, 3, parts=2) == train(resident.model, resident.optimizer, 3, parts=2)
    assert_equal(resident, host)
    assert not equal_states(host.model.state_dict(), tiny_model(kind, dtype).state_dict())


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_weights_of_every_kind_may_be_masked(kind):
    """Embeddings, tied or not, norms and biases."""
    resident, host = attach(kind, targets=every), offloaded(kind, targets=every)
    assert train(host.model, host.optimizer, 3) == train(resident.model, resident.optimizer, 3)
    assert_equal(resident, host)


def test_other_optimizers_and_clipping_train_as_on_a_resident_model():
    results = []
    for setup in (attach(), offloaded()):
        optimizer = torch.optim.SGD(setup.values, lr=0.5, momentum=0.9)
        for step in range(3):
            setup.model(**token_batch(step)).loss.backward()
            norm = nn.utils.clip_grad_norm_(setup.model.parameters(), 0.1)
            optimizer.step()
            setup.model.zero_grad()
        results.append((norm, weights_of(setup.model)))
    assert torch.equal(results[0][0], results[1][0]) and equal_states(results[0][1], results[1][1])


def test_dropout_is_the_same_in_the_recomputation():
    results = []
    for make in (attach, offloaded):
        setup = make(tiny_model("llama", attention_dropout=0.4).train())
        torch.manual_seed(0)
        losses = train(setup.model, setup.optimizer, 3)
        results.append((losses, weights_of(setup.model)))
    # The state after a step goes on from that of the forward.
    assert results[0][0] == results[1][0] and equal_states(results[0][1], results[1][1])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_transformers_changes_nothing(reentrant):
    calls, results = [], []
    for make in (attach, offloaded):
        setup = make(tiny_model("llama").train())
        setup.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        setup.model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
        losses = train(setup.model, setup.optimizer, 2)
        results.append((losses, weights_of(setup.model), setup.model.model.layers[0].gradient_checkpointing))
    assert results[0][0] == results[1][0] and equal_states(results[0][1], results[1][1]) and results[1][2]
    assert len(calls) == 8, "twice a step"


@pytest.mark.parametrize("source", ["batches", "training"])
def test_masks_move_as_on_a_resident_model(source):
    data = [token_batch(seed) for seed in range(2)] if source == "batches" else None
    options = dict(progress=False, interval=2) if source == "batches" else dict(window=1, interval=2)
    results = []
    for setup in (attach(), offloaded()):
        MaskSchedule(setup.model, setup.optimizer, data, **options)
        losses = train(setup.model, setup.optimizer, 7)
        moved = {weight.name: weight.mask for weight in sparse_weights(setup.model)}
        results.append((losses, weights_of(setup.model), setup.optimizer.state_dict()))
        assert any(moved[name] != setup.masks[name] for name in moved)
    assert equal_states(*results)


def test_a_loss_from_before_desparsify_says_so():
    setup = offloaded()
    loss = setup.model(**token_batch()).loss
    desparsify(setup.model)
    with pytest.raises(RuntimeError, match="computed before desparsify.*call backward before"):
        loss.backward()


def test_no_trained_value_is_lost_where_a_selection_fails_to_write_it(monkeypatch):
    """The weight counted as up to date before the write; entries that left fell back to what they were before."""
    results = []
    for fails in (False, True):
        setup = offloaded()
        data = [token_batch(seed) for seed in range(2)]
        schedule = MaskSchedule(setup.model, setup.optimizer, data, interval=100, progress=False)
        train(setup.model, setup.optimizer, 3)
        if fails:

            def no_room(*args):
                raise torch.OutOfMemoryError("no room")

            with monkeypatch.context() as patch:
                patch.setattr("speft_optim.offload.host_weight.scatter_entries_", no_room)
                with pytest.raises(torch.OutOfMemoryError):
                    schedule.reselect()
        schedule.reselect()
        masks = {weight.name: weight.mask.indices for weight in sparse_weights(setup.model)}
        results.append((weights_of(setup.model), masks))
    assert equal_states(*results)


def test_a_model_can_be_selected_and_trained_without_ever_being_moved():
    """All addresses of its weights stay, from selection to the end."""
    model = tiny_model("gemma2")
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    batches = [token_batch(seed) for seed in range(2)]
    masks = select_masks(model, batches, density=0.1, offload="cpu", progress=False)
    setup = offloaded(model, masks=masks)
    train(model, setup.optimizer)
    again = select_masks(model, batches, density=0.1, progress=False)
    assert select_masks(model, batches, density=0.1, offload="cpu", progress=False) == again
    train(model, setup.optimizer)
    desparsify(model)
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses


def test_host_weights_fall_behind_and_catch_up_when_they_are_used():
    resident, host = attach(), offloaded()
    for setup in (resident, host):
        train(setup.model, setup.optimizer)
    (name, *_), weight = host.masks, host.model.get_parameter(next(iter(host.masks)))
    memory = torch.frombuffer((weight_memory(host, name)), dtype=torch.float32).view(weight.shape)
    expected, before = resident.model.get_parameter(name).detach(), tiny_model().get_parameter(name).detach()
    assert torch.equal(memory, before) and weight.shape == before.shape
    model = host.model
    model.zero_grad()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == sum(
        map(len, host.values)
    )
    model.train().eval()
    assert torch.equal(memory, before), "these read no entry"
    assert torch.equal(weight.sum().detach(), expected.sum())
    assert torch.equal(memory, expected)


def weight_memory(setup, name):
    """The bytes of a weight, looked at past the parameter."""
    import ctypes

    weight = setup.model.get_parameter(name)
    return (ctypes.c_char * (weight.numel() * weight.element_size())).from_address(weight.data_ptr())


READERS = {
    "state_dict": lambda model: model.state_dict(),
    "its entries": lambda model: {name: parameter.detach() for name, parameter in model.named_parameters()},
    "a copied weight": lambda model: {name: copy.deepcopy(parameter) for name, parameter in model.named_parameters()},
    "a pickled weight": lambda model: {n: pickle.loads(pickle.dumps(p)) for n, p in model.named_parameters()},
    "a block's state": lambda model: model.model.layers[1].state_dict(),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("verify", [True, False])
def test_all_ways_to_read_the_weights_give_the_newest(reader, verify):
    results = []
    for offload in (None, "cpu"):
        model = tiny_model()
        values = sparsify(model, random_masks(model), verify=verify, offload=offload)
        train(model, SparseAdamW(values, **OPTIONS))
        results.append({key: part.detach().clone() for key, part in READERS[reader](model).items()})
    assert equal_states(*results)


def test_saved_models_and_adapters_equal_those_of_a_resident_model(tmp_path):
    for name, setup in (("resident", attach("qwen2")), ("host", offloaded("qwen2"))):
        train(setup.model, setup.optimizer)
        setup.model.save_pretrained(tmp_path / name / "model")
        train(setup.model, setup.optimizer, first=2)
        save_adapter(setup.model, tmp_path / name / "adapter")
        train(setup.model, setup.optimizer, first=4)
        export_merged(setup.model, tmp_path / name / "merged")
    for part in ("model/model.safetensors", "adapter/adapter.safetensors", "merged/model.safetensors"):
        assert (tmp_path / "host" / part).read_bytes() == (tmp_path / "resident" / part).read_bytes()


def test_an_adapter_is_loaded_onto_a_model_in_host_memory(tmp_path):
    resident = attach()
    train(resident.model, resident.optimizer)
    save_adapter(resident.model, tmp_path)
    host = offloaded()
    train(host.model, host.optimizer, first=5)
    load_adapter(host.model, tmp_path)
    assert equal_states(host.model.state_dict(), resident.model.state_dict())
    batch = token_batch(9)
    assert torch.equal(host.model(**batch).logits, resident.model(**batch).logits)


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped():
    whole = offloaded()
    train(whole.model, whole.optimizer, 2)
    saved = copy.deepcopy((whole.model.state_dict(), whole.optimizer.state_dict()))
    losses = train(whole.model, whole.optimizer, 2, first=2)
    resumed = offloaded(tiny_model())
    train(resumed.model, resumed.optimizer, 1, first=7)
    resumed.model.load_state_dict(saved[0])
    resumed.optimizer.load_state_dict(saved[1])
    assert train(resumed.model, resumed.optimizer, 2, first=2) == losses
    assert_equal(whole, resumed)


@pytest.mark.parametrize("verify", [True, False])
def test_gradients_are_verified_as_on_a_resident_model(verify, caplog):
    """A layer whose output is changed before the gradient hook sees it stays on the dense gradient."""
    results = []
    for offload in (None, "cpu"):
        caplog.clear()
        model = tiny_model()
        values = sparsify(model, random_masks(model), verify=verify, offload=offload)
        up = model.model.layers[1].mlp.up_proj
        up.register_forward_hook(lambda module, args, output: 2.0 * output, prepend=True)
        optimizer = SparseAdamW(values, **OPTIONS)
        losses = train(model, optimizer, 3)
        results.append((losses, weights_of(model), [record.getMessage() for record in caplog.records]))
    assert equal_states(*results)
    assert any("up_proj.weight is used otherwise" in message for message in results[1][2]) == verify


def test_training_goes_on_after_inference_mode():
    """With more blocks than buffers, so that the next step begins with copies that were made there."""
    resident, host = (make(tiny_model(num_hidden_layers=4)) for make in (attach, offloaded))
    losses = []
    for setup in (resident, host):
        losses.append(train(setup.model, setup.optimizer, 1))
        with torch.inference_mode():
            losses[-1].append(float(setup.model(**token_batch(5)).loss))
        losses[-1] += train(setup.model, setup.optimizer, 2, first=1)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("change", ["load", "assign", "copy", "entry"])
def test_changes_from_outside_win_as_on_a_resident_model(change):
    results = []
    for setup in (attach(), offloaded()):
        train(setup.model, setup.optimizer)
        weight = setup.model.model.layers[1].mlp.up_proj.weight
        if change in ("load", "assign"):
            setup.model.load_state_dict(tiny_model(seed=change == "assign").state_dict(), assign=change == "assign")
        with torch.no_grad():
            if change == "copy":
                weight.copy_(tiny_model().model.layers[1].mlp.up_proj.weight)
            elif change == "entry":
                weight[3:5] = 0.25
        losses = train(setup.model, setup.optimizer, 2, first=2)
        results.append((losses, weights_of(setup.model)))
        desparsify(setup.model)
        results[-1] += (weights_of(setup.model),)
    assert results[0][0] == results[1][0]
    assert equal_states(results[0], results[1])


def masked_weight(model, name):
    """The masked weight of a name."""
    return next(weight for weight in sparse_weights(model) if weight.name == name)


def test_a_change_through_memory_shared_before_the_last_step_is_refused():
    setup = offloaded()
    name = next(iter(setup.masks))
    shared = setup.model.state_dict()[name]
    train(setup.model, setup.optimizer)
    mask, values = setup.masks[name], masked_weight(setup.model, name).values
    newest = values.detach().clone()
    shared.zero_()
    with pytest.raises(ValueError, match=rf"{name} was changed through a tensor that shared its memory"):
        setup.model(**token_batch())
    # The refusal loses neither the last steps nor the change, whatever is tried next.
    expected = torch.zeros(mask.shape).view(-1).index_copy_(0, mask.indices.long(), newest).view(mask.shape)
    assert torch.equal(setup.model.state_dict()[name], expected) and torch.equal(values, newest)
    setup.model(**token_batch())
    assert torch.equal(values, newest)
    shared.zero_()
    setup.model(**token_batch())
    assert not values.any()  # It was up to date, so the change wins.


def test_desparsify_refuses_such_a_change_before_it_undoes_anything():
    setup = offloaded()
    name = list(setup.masks)[-1]
    shared = setup.model.state_dict()[name]
    train(setup.model, setup.optimizer)
    shared.zero_()
    before, mask = state(setup.model), setup.masks[name]
    newest = masked_weight(setup.model, name).values.detach().clone()
    with pytest.raises(ValueError, match=rf"{name} was changed through a tensor that shared its memory"):
        desparsify(setup.model)
    assert state(setup.model) == before
    desparsify(setup.model)
    assert not sparse_weights(setup.model)
    assert torch.equal(shared.view(-1)[mask.indices.long()], newest)


@pytest.mark.parametrize("kind", KINDS)
def test_desparsify_leaves_the_model_as_it_was(kind):
    model = tiny_model(kind)
    for parameter in list(model.parameters())[::3]:
        parameter.requires_grad_(False)
    before = state(model)
    setup = offloaded(model)
    train(model, setup.optimizer)
    trained = {name: part.clone() for name, part in model.state_dict().items()}
    desparsify(model)
    assert state(model) == before
    assert equal_states(model.state_dict(), trained)
    resident = attach(kind)
    train(resident.model, resident.optimizer)
    assert equal_states(model.state_dict(), resident.model.state_dict())


def test_evaluation_and_generation_equal_those_of_a_resident_model():
    resident, host = attach("qwen2"), offloaded("qwen2")
    batch = token_batch(3)
    for setup in (resident, host):
        train(setup.model, setup.optimizer)
    with torch.no_grad():
        assert torch.equal(host.model(**batch).logits, resident.model(**batch).logits)
    choose = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected = resident.model.generate(ids, attention_mask=mask, **choose)
    assert torch.equal(host.model.generate(ids, attention_mask=mask, **choose), expected)
    assert train(host.model, host.optimizer, first=2) == train(resident.model, resident.optimizer, first=2)


def test_decoding_while_gradients_are_recorded_is_refused_instead_of_wrong():
    model = offloaded().model
    ids = token_batch()["input_ids"]
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="fills no cache. Decode under torch.no_grad"):
        model(ids[:, :1], past_key_values=cache, use_cache=True)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="fills no cache. Decode under torch.no_grad"):
        model(ids[:, :1], past_key_values=cache, use_cache=True)


def test_a_cache_of_linear_attention_alone_is_left_out_or_refused():
    """Transformers raises where such a cache is asked for its length."""
    import transformers as tf

    config = tf.MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2, state_size=4)
    results = []
    for make in (attach, offloaded):
        torch.manual_seed(0)
        setup = make(tf.MambaForCausalLM(config).eval())
        losses = train(setup.model, setup.optimizer, 2)
        results.append((losses, weights_of(setup.model)))
    assert equal_states(*results)
    ids = token_batch()["input_ids"]
    with torch.no_grad():
        cache = setup.model(ids, use_cache=True).cache_params
    with pytest.raises(ValueError, match="fills no cache. Decode under torch.no_grad"):
        setup.model(ids[:, :1], cache_params=cache, use_cache=True)


def test_trainer_trains_and_resumes_as_with_a_resident_model(tmp_path):
    from test_scripts import Samples, halving, trainer_arguments
    from transformers import Trainer

    results = []
    runs = [("resident", attach, None), ("host", offloaded, None), ("host", offloaded, "checkpoint-2")]
    for folder, make, checkpoint in runs:
        setup = make()
        addresses = [parameter.data_ptr() for parameter in setup.model.parameters()]
        arguments = trainer_arguments(
            tmp_path / folder, max_steps=4, save_strategy="steps", save_steps=2, gradient_checkpointing=True
        )
        optimizers = (setup.optimizer, halving(setup.optimizer))
        trainer = Trainer(
            setup.model, arguments, train_dataset=Samples(), eval_dataset=Samples(), optimizers=optimizers
        )
        trainer.train(resume_from_checkpoint=checkpoint and str(tmp_path / folder / checkpoint))
        loss = trainer.evaluate()["eval_loss"]
        assert folder == "resident" or [part.data_ptr() for part in setup.model.parameters()] == addresses
        results.append((loss, weights_of(setup.model), setup.optimizer.state_dict()))
    assert equal_states(results[0], results[1]) and equal_states(results[1], results[2])


def test_sft_trainer_trains_with_its_own_defaults(tmp_path):
    """It turns on the checkpointing of transformers."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from test_quantized import rows, tokenizer

    setup = offloaded()
    data = datasets.Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows()])
    options = dict(max_steps=6, per_device_train_batch_size=4, logging_steps=1, report_to=[], disable_tqdm=True)
    arguments = trl.SFTConfig(str(tmp_path), **options, use_cpu=True, bf16=False, max_length=16, save_strategy="no")
    options = dict(train_dataset=data, processing_class=tokenizer(), optimizers=(setup.optimizer, None))
    trainer = trl.SFTTrainer(setup.model, arguments, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_accelerate_trains_and_resumes_as_with_a_resident_model(tmp_path):
    from accelerate import Accelerator

    results = []
    for make, first in ((attach, 0), (offloaded, 0), (offloaded, 2)):
        setup = make()
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model, optimizer = accelerator.prepare(setup.model, setup.optimizer)
        if first:
            accelerator.load_state(str(tmp_path / "state"))
        for step in range(first, 6):
            with accelerator.accumulate(model):
                accelerator.backward(model(**token_batch(step)).loss)
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
            if step == 1 and make is offloaded:
                accelerator.save_state(str(tmp_path / "state"))
        results.append(weights_of(setup.model))
    assert equal_states(results[0], results[1]) and equal_states(results[1], results[2])


def t5():
    """An encoder and a decoder, each a list of blocks, with one embedding."""
    import transformers as tf

    torch.manual_seed(0)
    sizes = dict(vocab_size=61, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4)
    # Without a cache, since keys that went through it lie otherwise in memory and give another rounding.
    config = tf.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, use_cache=False)
    return tf.T5ForConditionalGeneration(config)


@pytest.mark.parametrize("targets", [None, every])
@pytest.mark.parametrize("make", [t5, *(lambda kind=kind: tiny_model(kind) for kind in ("opt", "bert", "mixtral"))])
def test_models_of_other_shapes_train_as_resident_ones(make, targets):
    """Encoders and decoders, encoders alone, experts; with dropout in training mode."""
    results = []
    for offload in (None, "cpu"):
        model = make().train()
        values = sparsify(model, random_masks(model, targets), offload=offload)
        optimizer = SparseAdamW(values, **OPTIONS)
        torch.manual_seed(0)
        losses = train(model, optimizer, 3)
        results.append((losses, weights_of(model), optimizer.state_dict()))
    assert equal_states(*results)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_model_that_is_compiled_later_computes_eagerly(in_place):
    resident, host = attach(), offloaded()
    for model in (resident.model, host.model):
        # While a compiler traces the outermost call, some versions of transformers choose another kernel of sdpa.
        model.set_attn_implementation("eager")
    compiled = host.model if in_place else torch.compile(host.model, backend="eager")
    if in_place:
        compiled.compile(backend="eager")
    assert train(compiled, host.optimizer, 3) == train(resident.model, resident.optimizer, 3)


QUANTISED = ["int8", "nf4", "double"]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    pytest.importorskip("bitsandbytes")
    from quantized_models import save_original

    return save_original(tmp_path_factory.mktemp("original"))


def loaded(folder, kind):
    from quantized_models import load_quantized

    return load_quantized(folder, kind)


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_base_trains_as_a_resident_one(original, kind):
    from quantized_models import effective, stored

    results = []
    for offload in (None, "cpu"):
        model = loaded(original, kind)
        before = stored(model)
        values = sparsify(model, random_masks(model), offload=offload)
        optimizer = SparseAdamW(values, **OPTIONS)
        losses = train(model, optimizer, 3, parts=2)
        states = weights_of(model), optimizer.state_dict()
        generated = model.generate(token_batch()["input_ids"], max_new_tokens=4, do_sample=False, pad_token_id=0)
        desparsify(model)
        assert all(map(torch.equal, stored(model), before))
        results.append((losses, states, generated, effective(model)))
    assert equal_states(*results)


@pytest.mark.parametrize("change", CHANGES_OF_VALUES)
@pytest.mark.parametrize("kind", ["dense", "int8", "nf4"])
def test_a_loss_of_former_values_is_refused(original, kind, change):
    """Its blocks were recomputed with the values at the time of the backward."""
    model = tiny_model() if kind == "dense" else loaded(original, kind)
    values = sparsify(model, random_masks(model), offload="cpu")
    early = model(**token_batch()).loss
    change(model)
    model.zero_grad()
    with pytest.raises(RuntimeError, match="proj.* changed after this loss was computed.*call backward before that"):
        early.backward()
    inside = [value for value, weight in zip(values, sparse_weights(model), strict=True) if "layers" in weight.name]
    assert inside and all(value.grad is None for value in inside), "nothing was computed"
    model(**token_batch()).loss.backward()


@pytest.mark.parametrize("kind", ["dense", "int8", "nf4"])
def test_a_loss_may_wait_while_values_stay(tmp_path, kind):
    """The evaluation leaves blocks in other buffers, in which a backward took one block's weights for another's."""
    pytest.importorskip("bitsandbytes")
    from quantized_models import save_original

    folder, results = save_original(tmp_path, num_hidden_layers=3), []
    for offload in (None, "cpu"):
        model = tiny_model(num_hidden_layers=3) if kind == "dense" else loaded(folder, kind)
        values = sparsify(model, random_masks(model), offload=offload)
        for _ in range(2):
            first = model(**token_batch(0)).loss
            with torch.no_grad():
                model(**token_batch(2))
            second = model(**token_batch(1)).loss
            assert all(value.data.norm() > 0 for value in values) and model.state_dict()
            first.backward(retain_graph=True)
            second.backward()
            first.backward()
        results.append([value.grad for value in values])
    assert all(map(torch.equal, *results))


def in_thread(function):
    """Run a function in another thread, and return a list with what it returned or raised; without any if it hangs."""
    found = []

    def run():
        try:
            found.append(function())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout=20)
    return found


@pytest.mark.parametrize("part", ["model", "decoder", "block", "embedding"])
@pytest.mark.parametrize("within", ["forward", "backward"])
def test_a_second_thread_is_refused_and_the_first_computes_as_if_alone(within, part):
    """Both computed wrong numbers, and some modules kept the copies of a block for good."""
    expected = offloaded()
    expected.model(**token_batch()).loss.backward()
    setup, refusals = offloaded(), []
    model, other = setup.model, setup.model(**token_batch(1)).loss
    hidden = torch.zeros(1, 2, model.config.hidden_size)
    positions = model.model.rotary_emb(hidden, torch.arange(2)[None])
    second = {
        "model": lambda: model(**token_batch(1)),
        "decoder": lambda: model.model(token_batch(1)["input_ids"]),
        "block": lambda: model.model.layers[1](hidden, position_embeddings=positions),
        "embedding": lambda: model.model.embed_tokens(torch.arange(2)),
    }[part]

    def intrude(*_):
        refusals.extend([in_thread(second), in_thread(other.backward)])

    hooked = model.model.layers[0].mlp.down_proj
    hook = (hooked.register_forward_hook if within == "forward" else hooked.register_full_backward_hook)(intrude)
    loss = model(**token_batch()).loss
    if within == "forward":
        hook.remove()
    loss.backward()
    hook.remove()
    assert len(refusals) == 2 and all("called once at a time" in str(one) for one in refusals)
    assert all(torch.equal(one.grad, value.grad) for one, value in zip(setup.values, expected.values, strict=True))
    # Now nothing is in the way.
    assert not isinstance(in_thread(second)[0], Exception)
    model.zero_grad()
    model(**token_batch()).loss.backward()
    assert all(torch.equal(one.grad, value.grad) for one, value in zip(setup.values, expected.values, strict=True))


@pytest.mark.parametrize("within", ["forward", "backward"])
def test_a_call_that_failed_gives_the_model_back_at_once(within):
    setup = offloaded()
    model = setup.model

    def fail(*_):
        raise KeyError("on purpose")

    hooked = model.model.layers[0].mlp.down_proj
    hook = (hooked.register_forward_hook if within == "forward" else hooked.register_full_backward_hook)(fail)
    with pytest.raises(KeyError):
        model(**token_batch()).loss.backward()
    hook.remove()
    assert in_thread(lambda: model(**token_batch()).loss.backward()) == [None]


def test_a_model_may_call_itself_and_be_checkpointed_from_outside():
    """The calls within a call or a backward are of the same thread or the same backward."""
    results = []
    for make in (attach, offloaded):
        setup = make()
        model = setup.model

        def calls_itself(module, args, kwargs, model=model):
            if torch.is_grad_enabled():
                with torch.no_grad():
                    model(**token_batch(2))

        model.register_forward_pre_hook(calls_itself, with_kwargs=True)
        anchor = torch.ones((), requires_grad=True)
        for reentrant in (False, True):
            run = lambda anchor, seed, model=model: model(**token_batch(seed)).loss * anchor  # noqa: E731
            losses = [checkpoints.checkpoint(run, anchor, seed, use_reentrant=reentrant) for seed in range(2)]
            sum(losses).backward()
        results.append([value.grad for value in setup.values])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("which", [slice(None), slice(0, None, 2), slice(1, None, 2)], ids=["all", "even", "odd"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_may_be_checkpointed_one_by_one(reentrant, which):
    """A backward of some blocks then runs within the backward of the others."""
    results = []
    for make in (attach, offloaded):
        setup = make(tiny_model(num_hidden_layers=4))
        model = setup.model.model
        hidden = model.embed_tokens(token_batch()["input_ids"]).detach().requires_grad_()
        positions = model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
        for block in model.layers:
            step = partial(block, position_embeddings=positions)
            is_checkpointed = block in list(model.layers)[which]
            hidden = checkpoints.checkpoint(step, hidden, use_reentrant=reentrant) if is_checkpointed else step(hidden)
        model.norm(hidden).square().mean().backward()
        results.append([value.grad for value in setup.values])
    assert sum(grad is not None for grad in results[0]) > 20
    assert all(one is other is None or torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_an_evaluation_within_a_backward_changes_no_gradient(tmp_path, kind):
    """It left other blocks in the buffers, which the rest of an interrupted block's backward read."""
    pytest.importorskip("bitsandbytes")
    from quantized_models import save_original

    folder, results = save_original(tmp_path, num_hidden_layers=4), []
    for is_hooked in (False, True):
        model = tiny_model(num_hidden_layers=4) if kind == "dense" else loaded(folder, kind)
        values = sparsify(model, random_masks(model), offload="cpu")

        @torch.no_grad()
        def evaluate(_, model=model):
            model(**token_batch(2))

        for value in values if is_hooked else ():
            value.register_post_accumulate_grad_hook(evaluate)
        model(**token_batch()).loss.backward()
        results.append([value.grad for value in values])
    assert all(map(torch.equal, *results))


class MovesOf(TorchFunctionMode):
    """Counts how often one of some tensors is moved or cast."""

    def __init__(self, tensors):
        super().__init__()
        self.tensors, self.count = tensors, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.Tensor.to and any(args[0] is tensor for tensor in self.tensors)
        return func(*args, **(kwargs or {}))


def test_tables_of_a_quantised_base_are_copied_once(original):
    """Each copy of one would wait for all that the device has to do."""
    model = loaded(original, "double")
    layers = [module for module in model.modules() if is_quantized_linear(module)]
    sparsify(model, random_masks(model), offload="cpu")
    for expected in (len(layers), 0):
        with MovesOf([layer.weight.quant_state.code for layer in layers]) as moves:
            for layer in layers:
                frozen_weight(layer).whole()
        assert moves.count == expected


@pytest.mark.parametrize("kind", QUANTISED)
def test_masks_of_a_quantised_base_are_selected_and_move_as_on_a_resident_one(original, kind):
    data, results = [token_batch(seed) for seed in range(2)], []
    for offload in (None, "cpu"):
        model = loaded(original, kind)
        masks = select_masks(model, data, density=0.1, offload=offload, progress=False)
        values = sparsify(model, masks, offload=offload)
        optimizer = SparseAdamW(values, **OPTIONS)
        MaskSchedule(model, optimizer, data, interval=2, progress=False)
        losses = train(model, optimizer, 5)
        moved = {weight.name: weight.mask.indices for weight in sparse_weights(model)}
        assert any(len(part) and not torch.equal(part, masks[name].indices) for name, part in moved.items())
        results.append((losses, {name: mask.indices for name, mask in masks.items()}, moved, weights_of(model)))
    assert equal_states(*results)


@pytest.mark.parametrize("kind", QUANTISED)
def test_values_stay_attached_where_a_device_has_no_room_for_another_overlay(original, kind, monkeypatch):
    model = loaded(original, kind)
    optimizer = SparseAdamW(sparsify(model, random_masks(model), offload="cpu"), **OPTIONS)
    schedule = MaskSchedule(model, optimizer, [token_batch(5)], interval=100, progress=False)
    train(model, optimizer)

    def no_room(*args):
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(HostQuantized, "entries", no_room)
        with pytest.raises(torch.OutOfMemoryError):
            schedule.reselect()
    train(model, optimizer)
    schedule.reselect()
    train(model, optimizer)


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_base_is_saved_and_resumed_as_a_resident_one(original, kind, tmp_path):
    for folder, offload in (("resident", None), ("host", "cpu")):
        model = loaded(original, kind)
        values = sparsify(model, random_masks(model), offload=offload)
        optimizer = SparseAdamW(values, **OPTIONS)
        train(model, optimizer)
        save_adapter(model, tmp_path / folder / "adapter")
        model.save_pretrained(tmp_path / folder / "merged")
        torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / folder / "state")
        losses = train(model, optimizer, 2, first=2)
        again = loaded(original, kind)
        optimizer = SparseAdamW(sparsify(again, random_masks(again), offload=offload), **OPTIONS)
        train(again, optimizer, 1, first=7)
        state, optimizer_state = torch.load(tmp_path / folder / "state")
        again.load_state_dict(state)
        optimizer.load_state_dict(optimizer_state)
        assert train(again, optimizer, 2, first=2) == losses
        load_adapter(again, tmp_path / folder / "adapter")
        assert equal_states(again.state_dict(), state)
    for part in ("adapter/adapter.safetensors", "merged/model.safetensors"):
        assert (tmp_path / "host" / part).read_bytes() == (tmp_path / "resident" / part).read_bytes()


class Stop(BaseException):
    """As KeyboardInterrupt is, no Exception."""


@pytest.mark.parametrize("error", [RuntimeError, Stop])
@pytest.mark.parametrize("passes", [1, 2, 3, 4])
def test_an_exception_anywhere_leaves_the_model_usable(error, passes):
    """In the forward of either block, and in the recomputation of either."""
    model, left = tiny_model(), [passes]
    before = state(model)

    def fail(*_):
        left[0] -= 1
        if left[0] == 0:
            raise error

    hooks = [layer.self_attn.q_proj.register_forward_hook(fail) for layer in model.model.layers]
    setup = offloaded(model)
    with pytest.raises(error):
        train(model, setup.optimizer, 1)
    for hook in hooks:
        hook.remove()
    assert not any("weight" in vars(module) for module in model.modules())
    resident = attach()
    setup.optimizer.zero_grad()
    assert train(model, setup.optimizer, 3) == train(resident.model, resident.optimizer, 3)
    assert_equal(resident, setup)
    desparsify(model)
    assert state(model) == before


def test_a_block_is_moved_twice_a_step_and_two_blocks_are_held_at_most(monkeypatch):
    model = tiny_model("llama", num_hidden_layers=5)
    moved = moved_blocks(monkeypatch)
    setup = offloaded(model)
    (prefetcher,) = (hook.prefetcher for hook in record_of(model).hooks if hasattr(hook, "prefetcher"))
    block = sum(256 * -(-parameter.nbytes // 256) for parameter in model.model.layers[0].parameters())
    values = sum(256 * -(-weight.values.nbytes // 256) for weight in sparse_weights(model.model.layers[0]))
    assert prefetcher.nbytes == 2 * (block - values)
    train(model, setup.optimizer, 2)
    # The newest values are laid over the two blocks that are still there; no weight in host memory has changed.
    assert moved == [0, 1, 2, 3, 4, 2, 1, 0, 2, 3, 4, 2, 1, 0]
    moved.clear()
    with torch.no_grad():
        model(**token_batch())
        model(**token_batch())
    assert moved == [2, 3, 4, 0, 1, 2, 3, 4, 0], "the next forward begins with the first block"


def test_inputs_of_blocks_are_kept_in_host_memory_and_come_back_one_ahead(monkeypatch):
    setup = offloaded(tiny_model("llama", num_hidden_layers=4))
    done, keep, fetch = [], HostActivations._keep, activations._Kept._fetch

    def note_kept(owner, tensor):
        kept = keep(owner, tensor)
        assert tuple(kept._host.shape) == (3, 9, 24) and kept._host.data_ptr() != tensor.data_ptr()
        done.append(("away", len(done)))
        kept.number = len(done) - 1
        return kept

    def note_fetched(kept):
        if kept._copy is None:
            done.append(("back", kept.number))
        fetch(kept)

    monkeypatch.setattr(HostActivations, "_keep", note_kept)
    monkeypatch.setattr(activations._Kept, "_fetch", note_fetched)
    for layer in setup.model.model.layers:
        layer.input_layernorm.register_forward_hook(lambda *_: done.append("computed"))
    setup.model(**token_batch()).loss.backward()
    forward = ["computed", ("away", 1), "computed", ("away", 3), "computed", ("away", 5), "computed"]
    # The input of the first block requires no gradient, and stays; blocks 3 to 0 are recomputed.
    backward = [("back", 5), ("back", 3), "computed", ("back", 1), "computed", "computed", "computed"]
    assert done == forward + backward


def test_inputs_of_blocks_may_stay_on_the_device(monkeypatch):
    """Nothing is copied, and the losses are the same."""

    def refuse(*_):
        raise AssertionError("an input was copied")

    monkeypatch.setattr(HostActivations, "_keep", refuse)
    results = []
    for options in ({}, dict(offload="cpu", activations="device")):
        model = tiny_model("llama", num_hidden_layers=4)
        optimizer = SparseAdamW(sparsify(model, random_masks(model), **options), **OPTIONS)
        results.append((train(model, optimizer, 3), weights_of(model)))
    assert equal_states(*results)
    model = tiny_model()
    before = state(model)
    with pytest.raises(ValueError, match="activations='cpu' .*choose"):
        sparsify(model, random_masks(model), offload="cpu", activations="cpu")
    with pytest.raises(ValueError, match="activations='device' is read only with offload"):
        sparsify(model, random_masks(model), activations="device")
    assert state(model) == before


def test_blocks_that_change_their_input_in_place_are_refused():
    setup = offloaded()

    def double(module, args):
        args[0].mul_(2.0)

    setup.model.model.layers[1].register_forward_pre_hook(double)
    with pytest.raises(RuntimeError, match="changes its input in place"):
        setup.model(**token_batch())


def test_only_the_rows_that_a_batch_needs_are_looked_up(monkeypatch):
    setup = offloaded("gemma2")
    copied, whole = [], HostWeight.whole
    monkeypatch.setattr(HostWeight, "whole", lambda weight: copied.append(weight.name) or whole(weight))
    losses = train(setup.model, setup.optimizer, 1)
    # The head, which is tied to the embedding, needs all of them, once.
    assert copied == ["model.norm.weight", "model.embed_tokens.weight"]
    resident = attach("gemma2")
    assert train(resident.model, resident.optimizer, 1) == losses


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_a_block_is_looked_over_once_in_forward_and_once_in_backward(kind, original, monkeypatch):
    """Of each weight, whether it has changed in host memory; not again where its copy is begun."""
    model = tiny_model(num_hidden_layers=4) if kind == "dense" else loaded(original, kind)
    setup, asked = offloaded(model), Counter()
    train(model, setup.optimizer)
    for cls in (HostWeight, HostQuantized):

        def state(weight, ask=cls.state):
            asked[weight.name] += 1
            return ask(weight)

        monkeypatch.setattr(cls, "state", state)
    train(model, setup.optimizer, 3, first=2)
    assert {asked[name] for name in setup.masks if ".layers." in name} == {6}


class LossInChunks:
    """A forward that forms the logits of a few tokens at a time, as fused losses do, and never calls the head."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def __call__(self, input_ids, labels, **_):
        hidden = self.model.model(input_ids=input_ids).last_hidden_state[:, :-1].flatten(0, 1)
        self.seen.append(vars(self.model.lm_head).get("weight"))
        parts = zip(hidden.split(5), labels[:, 1:].flatten().split(5), strict=True)
        losses = [
            nn.functional.cross_entropy(part @ self.model.lm_head.weight.t(), words, reduction="sum")
            for part, words in parts
        ]
        return SimpleNamespace(loss=sum(losses) / len(hidden))


@pytest.mark.parametrize("targets", [None, every])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_loss_inside_the_model_may_read_the_weight_of_the_head(kind, targets):
    """On the device, and with its gradient if the head has a mask."""
    results = []
    for make in (attach, offloaded):
        setup = make(kind, targets=targets)
        setup.model.forward = LossInChunks(setup.model)
        losses = train(setup.model, setup.optimizer, 3)
        results.append((losses, weights_of(setup.model)))
        (head, *_) = setup.model.forward.seen
        assert (head is not None) == (make is offloaded)
    assert results[0][0] == results[1][0] and equal_states(results[0][1], results[1][1])
    assert head.requires_grad == (targets is every) and "weight" not in vars(setup.model.lm_head)


def chunked(model, ids, change):
    """A loss whose decoder and head are called one after the other, perhaps with a change of the head in between."""
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    if change:
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(1.5)
    return model.get_output_embeddings()(hidden).logsumexp(-1).mean()


def whole_call(model, ids, change):
    """The loss of the model's own call."""
    return model(input_ids=ids, labels=ids, use_cache=False).loss


@pytest.mark.parametrize(("loss_of", "change"), [(whole_call, False), (chunked, False), (chunked, True)])
@pytest.mark.parametrize("targets", [None, every])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_head_comes_with_the_last_blocks(kind, targets, loss_of, change, monkeypatch):
    """In pieces, one beside each of them, in forward alone; a change before the head is called wins."""
    results, done, copy_pages = [], [], head_copies.copy_pages_
    blocks = head_copies._PIECES + 2
    for make in (attach, offloaded):
        setup = make(tiny_model(kind, num_hidden_layers=blocks), targets=targets)
        for number, layer in enumerate(setup.model.model.layers):
            layer.input_layernorm.register_forward_hook(lambda *_, number=number: done.append(number))
        monkeypatch.setattr(head_copies, "copy_pages_", lambda copies: done.append("piece") or copy_pages(copies))
        losses = []
        for step in range(3):
            done.clear()
            loss = loss_of(setup.model, token_batch(step)["input_ids"], change)
            loss.backward()
            setup.optimizer.step()
            setup.optimizer.zero_grad()
            losses.append(loss.item())
        results.append((losses, weights_of(setup.model)))
    forward = [0, 1] + [event for number in range(2, blocks) for event in ("piece", number)]
    assert done == [*forward, *reversed(range(blocks))]
    assert results[0][0] == results[1][0] and equal_states(results[0][1], results[1][1])
    desparsify(setup.model)


def test_a_head_without_room_comes_for_the_loss_alone(monkeypatch):
    losses, asked = [], []

    def answer(device, nbytes):
        asked.append((device.type, nbytes))
        return has_room

    for has_room in (True, False):
        setup = offloaded()
        head = frozen_weight(setup.model.lm_head, "weight")
        monkeypatch.setattr(head_copies, "_has_room", answer)
        setup.model.get_decoder()(input_ids=token_batch()["input_ids"], use_cache=False)
        assert asked.pop() == ("cpu", head.source().nbytes)
        assert (head.ahead.take() is not None) == has_room
        losses.append(chunked(setup.model, token_batch()["input_ids"], change=False).item())
    assert losses[0] == losses[1]


def test_a_head_that_was_copied_and_not_used_is_freed_by_the_next_pass():
    setup = offloaded(tiny_model("llama", num_hidden_layers=3))
    head = frozen_weight(setup.model.lm_head, "weight").ahead
    decoder, ids = setup.model.get_decoder(), token_batch()["input_ids"]
    for _ in range(2):
        hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
        assert head.take() is not None and head.take() is None
        decoder(input_ids=ids, use_cache=False)
        hidden.sum().backward()
        assert head.take() is None
    setup.model(**token_batch()).loss.backward()
    assert head.take() is None, "the model's own call took it"
    decoder(input_ids=ids, use_cache=False)
    desparsify(setup.model)
    assert head.take() is None


def test_token_ids_from_host_memory_are_looked_up_there():
    """To fetch them from the device would wait for it; from this one nothing can be fetched."""
    ids, meta = torch.arange(6).view(2, 3), torch.device("meta")
    there = sent(ids, meta)
    assert there.is_meta and on_host(there) is ids
    # A loader may fill its memory anew before a backward pass looks the ids up again.
    for is_sent in (True, False):
        there = sent(ids, meta)
        (there if is_sent else ids).add_(1)
        with pytest.raises(NotImplementedError):
            on_host(there)
    with torch.inference_mode():
        inference = torch.arange(6)
    assert sent(inference, meta).is_meta
    assert sent(ids, torch.device("cpu")) is ids and on_host(ids) is ids


def test_a_weight_is_moved_to_the_device_as_its_copies_are(monkeypatch):
    """By whole pages, in any way of asking for it."""
    model, moved = tiny_model(), []
    target = all_targets(model)["lm_head.weight"]
    weight, whole = HostWeight(target, torch.device("meta")), HostWeight.whole
    monkeypatch.setattr(HostWeight, "whole", lambda weight: moved.append(weight.name) or whole(weight))
    weight.watch()
    head = model.lm_head.weight
    there = [
        head.to("meta"),
        head.to("meta", torch.bfloat16),
        head.detach().to("meta"),
        head.to(device="meta", copy=True),
    ]
    assert [(part.is_meta, part.dtype) for part in there] == [
        (True, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.float32)
    ]
    assert len(moved) == 3, "a detached weight is a plain tensor"
    assert head.to(torch.bfloat16).device.type == "cpu" and head.to("cpu") is head and len(moved) == 3
    assert there[0].grad_fn is not None, "its gradient is passed on"
    weight.close()
    assert type(head) is nn.Parameter


@pytest.mark.parametrize("move", [lambda m: m.to("cpu"), lambda m: m.cpu(), lambda m: nn.ModuleList([m]).to("cpu")])
def test_the_base_stays_where_it_is_when_a_trainer_moves_the_model(move):
    setup = offloaded()
    before = [parameter.data_ptr() for parameter in setup.model.parameters()]
    move(setup.model)
    assert [parameter.data_ptr() for parameter in setup.model.parameters()] == before


def test_no_block_is_checkpointed_twice_when_a_module_around_the_blocks_is_called_by_itself():
    setup, seen = offloaded(), []
    setup.model.gradient_checkpointing_enable({"use_reentrant": False})
    blocks = setup.model.model.layers
    setup.model.model.norm.register_forward_pre_hook(
        lambda module, args: seen.extend(block.gradient_checkpointing for block in blocks)
    )
    for called in (setup.model, setup.model.model):
        called(token_batch()["input_ids"])
    assert seen == [False] * 2 * len(blocks) and all(block.gradient_checkpointing for block in blocks)


def test_moves_and_casts_that_cannot_be_are_refused():
    model = offloaded().model
    with pytest.raises(ValueError, match=r"in torch\.float32 while it is offloaded; cast the model to torch\.bfloat16"):
        model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="is offloaded to cpu and cannot move to meta"):
        model.to("meta")
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(ValueError, match="cannot be copied or pickled"):
            copied(model)
        with pytest.raises(ValueError, match="cannot be copied or pickled"):
            copied(model.model.layers[0])
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"lm_head\.weight requires a gradient"):
        model(**token_batch())


class WithoutBlocks(nn.Module):
    """A model that lists no blocks."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x)


def hooked(model):
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(model.model.layers[0], ModelHook())
    return model


def compiled(model):
    model.model.layers[0].compile()
    return model


def without_head(model):
    model.lm_head.to("meta")
    return model


def counting(model):
    model.model.norm = nn.BatchNorm1d(24)
    return model


REFUSED = {
    "no nn.ModuleList": WithoutBlocks,
    "model.norm keeps running statistics": lambda: counting(tiny_model()),
    "head.weight is on meta, and offload='cpu' needs the whole model in CPU memory": lambda: without_head(tiny_model()),
    "accelerate's hooks": lambda: hooked(tiny_model()),
    "is compiled": lambda: compiled(tiny_model()),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_models_that_cannot_be_offloaded_are_refused_before_anything_changes(reason):
    model = REFUSED[reason]()
    name = next(name for name, parameter in model.named_parameters() if parameter.dim() == 2)
    masks = some_entries(model, [name])
    before = state(model)
    with pytest.raises(ValueError, match=reason):
        sparsify(model, masks, offload="cpu")
    assert state(model) == before


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr("speft_optim.offload.training.is_distributed", lambda: True)
    model = tiny_model()
    before = state(model)
    with pytest.raises(ValueError, match="trains on one device in one process"):
        sparsify(model, random_masks(model), offload="cpu")
    assert state(model) == before


def test_a_model_that_fully_shard_divides_later_is_refused():
    model = tiny_model()
    sparsify(model, random_masks(model), offload="cpu")
    # This is how FSDP marks a module; its memory is gone then.
    model.model.layers[0].mlp.up_proj.__dict__["_is_fsdp_managed_module"] = True
    with pytest.raises(ValueError, match="fully_shard was called on a model whose weights offload= keeps"):
        model(**token_batch())


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_a_failure_midway_leaves_the_model_as_it_was(kind, original, monkeypatch):
    model = tiny_model() if kind == "dense" else loaded(original, kind)
    before, masks, attach, left = state(model), random_masks(model), SparseWeight.__init__, [3]

    def fail(*args):
        left[0] -= 1
        if left[0] == 0:
            raise torch.OutOfMemoryError
        attach(*args)

    monkeypatch.setattr(SparseWeight, "__init__", fail)
    for offload in ("cpu", None):
        left[0] = 3
        with pytest.raises(torch.OutOfMemoryError):
            sparsify(model, masks, offload=offload)
        assert state(model) == before


@pytest.mark.parametrize("salience", ["grasp", "synflow"])
def test_measures_that_recomputation_would_spoil_are_refused(salience):
    model = offloaded().model
    with pytest.raises(ValueError, match=f"salience='{salience}' is not possible on a model that sparsify offloaded"):
        select_masks(model, [token_batch()], salience=salience, density=0.1, progress=False)


def on_pretended_gpu(monkeypatch, model):
    """A model's base for a GPU that there is not; return it with what was done."""
    done, device = [], torch.device("cuda:0")
    gpu = SimpleNamespace(Stream=lambda device: None, synchronize=lambda device: None)
    monkeypatch.setattr(torch, "get_device_module", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append("synchronised"))
    memory = SimpleNamespace(memory=SimpleNamespace(record_stream=lambda stream: None))
    monkeypatch.setattr("speft_optim.offload.prefetch.Buffer", lambda size, device: memory)

    def lock(tensors, device, stack):
        done.append("locked")
        stack.callback(done.append, "unlocked")
        return set()

    monkeypatch.setattr("speft_optim.offload.engine.lock_pages", lock)
    return OffloadedBase(model, device, {}), done


def test_pages_are_unlocked_when_the_model_is_gone(monkeypatch):
    base, done = on_pretended_gpu(monkeypatch, tiny_model())
    del base
    gc.collect()
    assert done == ["locked", "synchronised", "unlocked"]


def test_pages_are_unlocked_once_and_the_model_is_whole_at_the_end(monkeypatch):
    model = tiny_model()
    before = state(model)
    base, done = on_pretended_gpu(monkeypatch, model)
    assert model.to("cpu") is model and state(model) != before
    base.remove()
    assert state(model) == before
    del model
    gc.collect()
    assert done == ["locked", "synchronised", "unlocked"]


def test_a_device_without_room_leaves_the_model_as_it_was(monkeypatch):
    def full(size, device):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("speft_optim.offload.prefetch.Buffer", full)
    model = tiny_model()
    before = state(model)
    with pytest.raises(torch.OutOfMemoryError):
        sparsify(model, random_masks(model), offload="cpu")
    assert state(model) == before


def test_devices_that_there_are_not_are_refused():
    model = tiny_model()
    before = state(model)
    for device in ("tpu9", "meta", 3.5):
        with pytest.raises(ValueError, match="is not a device to compute on"):
            sparsify(model, random_masks(model), offload=device)
    assert state(model) == before


def test_a_use_outside_the_module_is_seen_in_host_memory():
    """The gradient of a penalty on the weights themselves."""
    results = []
    for setup in (attach(), offloaded()):
        weight = setup.model.model.layers[0].mlp.up_proj.weight
        for step in range(2):
            loss = setup.model(**token_batch(step)).loss + weight.square().sum()
            loss.backward()
            setup.optimizer.step()
            setup.optimizer.zero_grad()
        results.append((weights_of(setup.model), setup.optimizer.state_dict()))
    assert equal_states(*results)


def test_parameters_have_their_own_class_again_after_training():
    setup = offloaded()
    train(setup.model, setup.optimizer)
    masked = [setup.model.get_parameter(name) for name in setup.masks]
    assert all(isinstance(parameter, HostParameter) for parameter in masked)
    desparsify(setup.model)
    assert {type(parameter) for parameter in masked} == {nn.Parameter}
