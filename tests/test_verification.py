"""A masked dense weight gets autograd's own gradient however it is used, and a use that its hooks miss is named."""

import copy
import logging
import pickle
import warnings
import weakref
from functools import partial

import numpy
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    assert_close,
    draw,
    random_masks,
    skip_before,
    skip_unless_nodes_compile,
    some_entries,
    tiny_model,
    token_batch,
    traces_attributes,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from speft_optim import SparseAdamW, desparsify, select_masks, sparsify
from speft_optim.weights import gradient_hooks as linear
from speft_optim.weights.attached import sparse_weights
from speft_optim.weights.targets import find_targets
from speft_optim.weights.verification import agrees, warn_of_inputs


def told(caplog):
    """What the package warned of."""
    return [record.message for record in caplog.records if record.name.startswith("speft_optim")]


class Pair(nn.Module):
    """Two square layers, one after the other."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Fused(Pair):
    """The parent's forward multiplies by both weights at once and calls neither layer."""

    def forward(self, x):
        return F.linear(torch.tanh(x), torch.cat([self.first.weight, self.second.weight]))


class Beside(Pair):
    """A layer is called, and its weight is read besides: transposed, by einsum and for a penalty."""

    def forward(self, x):
        y = super().forward(x)
        z = torch.einsum("bi,oi->bo", x, self.first.weight) + F.linear(x, self.second.weight.t())
        return y + z + 1e-2 * self.first.weight.square().sum()


class WithoutGradient(Pair):
    """A weight is read under no_grad too."""

    def forward(self, x):
        with torch.no_grad():
            scale = self.first(x).norm() + self.second.weight.norm()
        return super().forward(x) / scale


class TwoPlaces(nn.Module):
    """One module under two names, called once by each."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.second = nn.Linear(4, 4)

    def forward(self, x):
        return self.second(self.again(torch.tanh(self.first(x))))


class Recursive(nn.Linear):
    """A layer that calls itself."""

    def forward(self, x, depth=2):
        return super().forward(x) if depth == 0 else torch.tanh(self(x, depth - 1)) + super().forward(x)


class RecursiveByHook(Pair):
    """An ordinary layer, called again by a hook on it."""

    def __init__(self):
        super().__init__()
        self.inside = False
        self.first.register_forward_hook(self.again)

    def again(self, module, args, output):
        if self.inside:
            return None
        self.inside = True
        try:
            return output + module(torch.tanh(output))
        finally:
            self.inside = False


def recursive():
    model = Pair()
    model.first = Recursive(4, 4)
    return model


class Checkpointed(Pair):
    """Checkpointed, and the weights are read inside and outside of the recomputed part."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def part(self, x):
        return Pair.forward(self, x) + F.linear(x, self.second.weight)

    def forward(self, x):
        x = x.requires_grad_()
        for _ in range(2):
            x = checkpoint(self.part, x, use_reentrant=self.reentrant)
        return F.linear(x, self.first.weight)


def half(model):
    """Give a layer of the instance another forward."""
    weight = model.first.weight
    model.first.forward = lambda x: 0.5 * F.linear(x, weight)


def wrapped(model):
    inner = model.first.forward
    model.first.forward = lambda x: 3 * inner(x)


def prepended(model):
    model.first.register_forward_hook(lambda module, args, output: 2 * output, prepend=True)


def tied(model):
    model.second.weight = model.first.weight


CHANGES = {"forward": half, "wrapped forward": wrapped, "prepended hook": prepended, "tied": tied}
MODELS = {
    "fused by the parent": Fused,
    "beside its module": Beside,
    "also under no_grad": WithoutGradient,
    "in two places": TwoPlaces,
    "recursive": recursive,
    "recursive by a hook": RecursiveByHook,
    "checkpointed": lambda: Checkpointed(False),
    "checkpointed, reentrant": lambda: Checkpointed(True),
}


class Twin:
    """A sparsified model and its dense copy, trained alike.

    The copy's gradients are looked up at the masked entries, and its weights follow the sparse model's.
    """

    def __init__(self, model, names=("first.weight", "second.weight"), **options):
        self.model, self.dense, self.names = model, copy.deepcopy(model), names
        self.masks = some_entries(model, names)
        self.values = dict(zip(names, sparsify(model, self.masks, **options), strict=True))
        self.optimizer = torch.optim.SGD(self.values.values(), lr=0.05)

    def step(self, call=lambda model, x: model(x), batches=1, seed=0):
        """Compare the gradients of a step, then take it."""
        for number in range(batches):
            for model in (self.dense, self.model):
                x = draw(3, 4, seed=seed + number)
                call(model, x).square().sum().backward()
        for name, values in self.values.items():
            dense = self.dense.get_parameter(name).grad
            expected = dense.flatten()[self.masks[name].indices.long()]
            assert_close(values.grad, expected, atol=1e-5, rtol=1e-4)
            assert self.model.get_parameter(name).grad is None
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.dense.zero_grad()
        with torch.no_grad():
            for name in self.values:
                self.dense.get_parameter(name).copy_(self.model.get_parameter(name))
        assert [p for p in self.model.parameters() if p.requires_grad] == list(self.values.values())


# --- Uses of a weight that its module's hooks do not see ---


@pytest.mark.parametrize("case", MODELS)
def test_every_use_of_a_weight_counts_in_each_step(case):
    twin = Twin(MODELS[case]())
    for seed in range(4):
        twin.step(batches=1 + seed % 2, seed=seed)


@pytest.mark.parametrize("late", [0, 1, 3])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_after_sparsify_counts_from_then_on(change, late):
    names = ("first.weight",) if change == "tied" else ("first.weight", "second.weight")
    twin = Twin(Pair(), names)
    for step in range(late):
        twin.step(seed=step)
    CHANGES[change](twin.model)
    CHANGES[change](twin.dense)
    for step in range(3):
        twin.step(seed=step + 7)


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_before_sparsify_counts(change, caplog):
    model = Pair()
    CHANGES[change](model)
    dense = Pair()
    dense.load_state_dict(model.state_dict())
    CHANGES[change](dense)
    masks = some_entries(model, ["first.weight"])
    (values,) = sparsify(model, masks)
    optimizer = SparseAdamW([values], lr=1e-2, weight_decay=0)
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            for one in (model, dense):
                one(draw(3, 4, seed=step)).square().sum().backward()
            expected = dense.first.weight.grad.flatten()[masks["first.weight"].indices.long()]
            assert_close(values.grad, expected, atol=1e-5, rtol=1e-4)
            optimizer.step()
            optimizer.zero_grad()
            dense.zero_grad()
            with torch.no_grad():
                dense.first.weight.copy_(model.first.weight)
    # Of a tied weight both modules are known, and a hook that was there before comes after ours.
    messages = told(caplog)
    assert len(messages) == (change in ("forward", "wrapped forward")) and all(
        "first.weight" in text for text in messages
    )


@pytest.mark.parametrize("late", [False, True])
def test_a_global_hook_that_changes_outputs_counts(late, caplog):
    twin = Twin(Pair())
    if late:
        twin.step()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: 2 * output if isinstance(module, nn.Linear) else None
    )
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            twin.step()
    handle.remove()
    assert sorted(text.split()[0] for text in told(caplog)) == ["first.weight", "second.weight"]
    twin.step()


@pytest.mark.parametrize("late", [False, True])
def test_another_forward_of_all_linear_layers_counts(late, monkeypatch):
    twin = Twin(Pair())
    if late:
        twin.step()
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 0.5 * F.linear(x, self.weight, self.bias))
    for _ in range(3):
        twin.step()


def test_a_forward_replaced_before_sparsify_counts(monkeypatch):
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 0.5 * F.linear(x, self.weight, self.bias))
    twin = Twin(Pair())
    for _ in range(3):
        twin.step()


def test_a_use_that_begins_late_and_ends_again_counts(caplog):
    twin = Twin(Pair())
    with caplog.at_level(logging.WARNING):
        for outside in (False, False, True, False, True):
            twin.step(lambda model, x, outside=outside: F.linear(model(x), model.first.weight) if outside else model(x))
    (message,) = told(caplog)
    assert message.startswith("first.weight is used outside its module's forward")


def assign(model, name, weight):
    model.get_submodule(name.rpartition(".")[0]).weight = weight


def delete_and_assign(model, name, weight):
    delattr(model.get_submodule(name.rpartition(".")[0]), "weight")
    assign(model, name, weight)


def load_by_assignment(model, name, weight):
    model.load_state_dict({name: weight}, strict=False, assign=True)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("replace", [assign, delete_and_assign, load_by_assignment])
def test_a_replaced_weight_used_before_its_module_is_called_counts(replace, frozen):
    twin = Twin(Pair())
    twin.step()
    for seed in range(2):
        weight = draw(4, 4, seed=seed)
        replace(twin.model, "first.weight", nn.Parameter(weight.clone(), requires_grad=not frozen))
        twin.dense.first.weight.data.copy_(weight)
        twin.step(lambda model, x: F.linear(x, model.first.weight) + model(x))


def test_a_parameter_beside_no_masked_weight_is_left_alone():
    """Also one of another shape in the place of a masked weight, which the next step refuses."""
    twin = Twin(Pair(), ("first.weight",))
    other = nn.Parameter(torch.ones(4, 4))
    twin.model.second.weight = other
    assert other.requires_grad and type(other) is nn.Parameter
    resized = nn.Parameter(torch.ones(5, 4))
    twin.model.first.weight = resized
    assert resized.requires_grad and type(resized) is nn.Parameter
    with pytest.raises(ValueError, match="first.weight has shape"):
        twin.model(draw(3, 4))


def test_a_weight_whose_module_is_never_called_trains():
    twin = Twin(Pair(), ("second.weight",))
    for _ in range(3):
        twin.step(lambda model, x: F.linear(model.first(x), model.second.weight) + 0 * model(x))


def tied_loss(model):
    ids = token_batch()["input_ids"]
    hidden = model.model(input_ids=ids).last_hidden_state
    return F.cross_entropy(F.linear(hidden, model.lm_head.weight)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def chunked_loss(model):
    """By chunks of the vocabulary's rows, as fused losses do."""
    ids = token_batch()["input_ids"]
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1)
    parts = zip(hidden.split(5), ids[:, 1:].flatten().split(5), strict=True)
    return sum(F.cross_entropy(F.linear(h, model.lm_head.weight), i, reduction="sum") for h, i in parts) / 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [tied_loss, chunked_loss])
def test_a_tied_head_used_by_a_fused_loss_gets_the_whole_gradient(loss, dtype, caplog):
    name, model = "model.embed_tokens.weight", tiny_model("qwen2", dtype=dtype)
    dense = copy.deepcopy(model)
    loss(dense).backward()
    masks = random_masks(model, targets=lambda k, p: k == name, density=0.1)
    (values,) = sparsify(model, masks)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            loss(model).backward()
    expected = dense.get_parameter(name).grad.flatten()[masks[name].indices.long()].float()
    assert (values.grad / 2 - expected).norm() < (1e-5 if dtype == torch.float32 else 1e-2) * expected.norm()
    (message,) = told(caplog)
    assert name in message


def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=16, state_size=4, num_hidden_layers=2, intermediate_size=32)
    return MambaForCausalLM(MambaConfig(**sizes, time_step_rank=3))


@skip_before("transformers", "5", "has a Mamba that on a CPU calls its layers")
def test_a_mixer_that_reads_a_layer_s_weight_trains_it_and_scores_it(caplog):
    model, batch = mamba(), token_batch()
    dense = copy.deepcopy(model)
    dense(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
    batch.pop("attention_mask")
    with caplog.at_level(logging.WARNING):
        masks = select_masks(model, [batch], density=0.1, progress=False)
    names = [name for name in masks if "dt_proj" in name]
    assert len(names) == 2
    assert {name for name in masks for text in told(caplog) if name in text} == set(names)
    for name, mask in masks.items():
        scores = dense.get_parameter(name).grad.abs().flatten()
        best = set(scores.topk(len(mask)).indices.tolist())
        assert len(best & set(mask.indices.tolist())) >= 0.98 * len(mask)
    values = dict(zip(masks, sparsify(model, masks), strict=True))
    model(**batch).loss.backward()
    for name, value in values.items():
        assert_close(value.grad, dense.get_parameter(name).grad.flatten()[masks[name].indices.long()], rtol=1e-4)


# --- The check: what it costs, when it ends, how it is turned off ---


class Deep(nn.Module):
    """Linear layers of one shape, one after the other."""

    def __init__(self, layers=5, side=32):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(layers)))

    def forward(self, x):
        return self.layers(x)


class Alive(TorchDispatchMode):
    """Counts the matrices of one shape that are formed, and how many of them live at once."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.alive, self.most, self.made = shape, 0, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and result.shape == self.shape:
            self.alive, self.made = self.alive + 1, self.made + 1
            self.most = max(self.most, self.alive)
            weakref.finalize(result.untyped_storage(), self.forget)
        return result

    def forget(self):
        self.alive -= 1


def formed(model, optimizer, x):
    """Dense products of a step: how many, and how many at once."""
    with Alive(torch.Size((32, 32))) as seen:
        model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return seen.made, seen.most


@pytest.mark.parametrize("verify", [True, False])
def test_the_check_forms_one_dense_gradient_more_a_weight_and_one_at_a_time(verify):
    """On the CPU the sampled gradient is a dense product too, of which the entries are picked."""
    model = Deep()
    names = [name for name, _ in model.named_parameters()]
    optimizer = SparseAdamW(sparsify(model, some_entries(model, names), verify=verify), lr=1e-3)
    steps = [formed(model, optimizer, draw(3, 32, seed=step)) for step in range(3)]
    assert steps == [(10 if verify else 5, 1), (5, 1), (5, 1)]


def test_without_the_check_only_the_modules_own_use_is_seen(caplog):
    """What the option turns off."""
    model = Beside()
    masks = some_entries(model, ["first.weight"])
    dense = copy.deepcopy(model)
    (values,) = sparsify(model, masks, verify=False)
    x = draw(3, 4)
    model(x).square().sum().backward()
    assert not model.first.weight.requires_grad
    dense(x).square().sum().backward()
    expected = dense.first.weight.grad.flatten()[masks["first.weight"].indices.long()]
    assert (values.grad - expected).norm() > 0.1 * expected.norm()


class Experts(nn.Module):
    """Two layers, of which the input's sign chooses one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return (self.first if x[0, 0] > 0 else self.second)(x)


def test_a_layer_that_is_used_late_is_verified_then(monkeypatch):
    compared = []
    monkeypatch.setattr(linear, "agrees", lambda *of: compared.append(of[0].shape) or agrees(*of))
    twin = Twin(Experts())
    for sign in (1, 1, -1, 1, -1):

        def call(model, x, sign=sign):
            y = model(x.abs() * sign)
            # A gradient of zero is no evidence, and only makes the other's exist.
            return y + 0 * (model.first(x) + model.second(x))

        twin.step(call)
    assert len(compared) > 2


def test_a_gradient_of_zero_or_infinity_proves_nothing():
    left, right = draw(5, 4), draw(5, 3, seed=1)
    dense = left.t() @ right
    assert agrees(dense, left, right) is True
    assert agrees(1.01 * dense, left, right) is False
    assert agrees(dense * 0, left * 0, right) is None
    assert agrees(dense * 0, left, right) is False
    assert agrees(dense * torch.inf, left, right) is None
    one = torch.zeros(4, 3)
    one[2, 1] = 0.1 * dense.norm()
    assert agrees(dense + one, left, right) is False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_difference(dtype):
    for seed in range(10):
        left, right = draw(300, 40, seed=seed).to(dtype), draw(300, 30, seed=seed + 50).to(dtype)
        dense = (left.t() @ right).to(dtype)
        assert agrees(dense, left, right) is True
        assert agrees(dense * 1.2, left, right) is False


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "gemma2", "opt", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ordinary_models_are_trusted_after_one_step(kind, dtype, caplog):
    model = tiny_model(kind, dtype)
    optimizer = SparseAdamW(sparsify(model, select_masks(model, [token_batch()], density=0.1, progress=False)), lr=1e-4)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model(**token_batch()).loss.backward()
            optimizer.step()
    assert not [text for text in told(caplog) if "otherwise" in text]
    gradient_hooks = [hook for weight in sparse_weights(model) for hook in weight.uses.hooks if hook.is_product]
    assert gradient_hooks and sum(hook.verdict == ((), True) for hook in gradient_hooks) >= len(gradient_hooks) - 2


# --- Masked weights say that they require no gradient ---


def test_weights_never_say_that_they_require_gradients():
    model = tiny_model()
    values = sparsify(model, random_masks(model, density=0.1))
    optimizer, trainable = SparseAdamW(values), lambda: [p for p in model.parameters() if p.requires_grad]
    assert trainable() == values
    with torch.no_grad():
        model(**token_batch())
    assert trainable() == values
    for _ in range(2):
        loss = model(**token_batch()).loss
        assert trainable() == values
        loss.backward()
        assert all(p.grad is None for p in model.parameters() if p not in set(values))
        optimizer.step()
        assert trainable() == values
    model(**token_batch())
    desparsify(model)
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert all(p.requires_grad and not p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("when", ["before the step", "in the first backward"])
def test_a_copy_counts_every_use_too(when):
    model = Beside()
    masks = some_entries(model, ["first.weight"])
    sparsify(model, masks)
    if when == "in the first backward":
        model(draw(3, 4))
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    desparsify(model)
    model(draw(3, 4)).square().sum().backward()
    expected = model.first.weight.grad.flatten()[masks["first.weight"].indices.long()]
    for one in copies:
        one(draw(3, 4)).square().sum().backward()
        assert_close(one.first.sparse_weight.values.grad, expected, atol=1e-5)


def test_weights_that_a_script_unfreezes_are_frozen_again_and_told_of(caplog):
    model, expected = tiny_model(), tiny_model()
    masks = random_masks(model, density=0.1)
    values, others = sparsify(model, masks), sparsify(expected, masks)
    model.requires_grad_(True)
    model.lm_head.requires_grad_(False)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            for one in (model, expected):
                one(**token_batch()).loss.backward()
            for name in masks:
                assert model.get_parameter(name).grad is None
            assert_close(nn.utils.clip_grad_norm_(values, 1.0), nn.utils.clip_grad_norm_(others, 1.0))
            SparseAdamW(values).step()
            SparseAdamW(others).step()
    (message,) = told(caplog)
    assert f"{next(iter(masks))} was set to require gradients" in message and "Masked weights stay frozen" in message
    assert not any(model.get_parameter(name).requires_grad for name in masks)


@pytest.mark.parametrize("thaw", [lambda w: w.requires_grad_(), lambda w: setattr(w, "requires_grad", True)])
def test_a_weight_cannot_be_thawed_until_it_is_desparsified(thaw):
    model = Pair()
    sparsify(model, some_entries(model, ["first.weight"]))
    thaw(model.first.weight)
    assert not model.first.weight.requires_grad
    desparsify(model)
    model.first.weight.requires_grad_(False)
    thaw(model.first.weight)
    assert model.first.weight.requires_grad


def test_a_copied_or_pickled_weight_is_an_ordinary_parameter():
    model = Pair()
    sparsify(model, some_entries(model, ["first.weight"]))
    for twin in (copy.deepcopy(model.first.weight), pickle.loads(pickle.dumps(model.first.weight))):
        assert type(twin) is nn.Parameter and not twin.requires_grad and torch.equal(twin, model.first.weight)
        assert twin.requires_grad_().requires_grad
    assert type(model.state_dict()["first.weight"]) is torch.Tensor
    assert repr(model.first.weight) == repr(nn.Parameter(model.first.weight.detach(), requires_grad=False))
    assert (model.first.weight.numpy() == numpy.asarray(model.first.weight)).all()
    tied = nn.ParameterList([model.first.weight, model.first.weight])
    for twins in (copy.deepcopy(tied), pickle.loads(pickle.dumps(tied))):
        assert twins[0] is twins[1]


def test_a_weight_that_a_tool_makes_anew_of_the_same_class_is_watched_again():
    from accelerate.utils import set_module_tensor_to_device

    model = Pair()
    masks = some_entries(model, ["first.weight"])
    (values,) = sparsify(model, masks)
    held = model.first.weight
    set_module_tensor_to_device(model, "first.weight", "cpu", value=held.detach() * 2)
    model.first.weight = type(held)(model.first.weight.detach().clone(), requires_grad=False)
    assert model.first.weight is not held
    expected = copy.deepcopy(model)
    desparsify(expected)
    for step in range(2):
        values.grad = None
        expected.zero_grad()
        for one in (model, expected):
            (one(draw(3, 4)).square().sum() + one.first.weight.pow(3).sum()).backward()
        if step:
            kept = masks["first.weight"].indices.long()
            assert_close(values.grad, expected.first.weight.grad.flatten()[kept], atol=1e-5)


def test_frozen_values_cost_no_dense_gradient():
    model = Pair()
    (values,) = sparsify(model, some_entries(model, ["first.weight"]))
    values.requires_grad_(False)
    x = draw(3, 4).requires_grad_()
    with Alive(torch.Size((4, 4))) as seen:
        model(x).square().sum().backward()
    assert x.grad is not None and not seen.made


# --- Uses before a step's forward, and backwards that name their inputs ---


PENALTIES = {
    "penalty": lambda w, x: w.square().sum(),
    "product": lambda w, x: F.linear(x, w).pow(3).sum(),
    "embedding": lambda w, x: F.embedding(torch.tensor([0, 2, 2]), w).pow(3).sum(),
    "part in place": lambda w, x: w[1:3].clone().mul_(2).pow(3).sum(),
}


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("case", PENALTIES)
def test_a_use_before_the_forward_counts_in_every_step(case, held):
    model = Pair()
    expected = copy.deepcopy(model)
    weight = model.first.weight if held else None
    masks = some_entries(model, ["first.weight"])
    (values,) = sparsify(model, masks)
    optimizer, kept = SparseAdamW([values], lr=0.1), masks["first.weight"].indices.long()
    for step in range(3):
        x = draw(3, 4, seed=step)
        for one, first in ((model, weight if held else model.first.weight), (expected, expected.first.weight)):
            one.zero_grad()
            before = PENALTIES[case](first, x)
            (before + one(x).square().sum()).backward()
        assert_close(values.grad, expected.first.weight.grad.flatten()[kept], atol=1e-5)
        optimizer.step()
        with torch.no_grad():
            expected.first.weight.copy_(model.first.weight)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_use_before_the_forward_counts_in_a_compiled_step(backend):
    model = Pair()
    expected = copy.deepcopy(model)
    masks = some_entries(model, ["first.weight"])
    (values,) = sparsify(model, masks)
    x = draw(3, 4)

    def loss(one):
        return one.first.weight.pow(3).sum() + one(x).square().sum()

    torch._dynamo.reset()
    torch.compile(loss, backend=backend)(model).backward()
    loss(expected).backward()
    assert_close(values.grad, expected.first.weight.grad.flatten()[masks["first.weight"].indices.long()], atol=1e-5)


@pytest.mark.parametrize("named", ["autograd.grad", "backward(inputs=...)"])
def test_a_backward_that_names_its_inputs_is_warned_of(named, caplog):
    model = Beside()
    masks = some_entries(model, ["first.weight"])
    (values,) = sparsify(model, masks)
    warn_of_inputs.cache_clear()
    with caplog.at_level(logging.WARNING):
        loss = model(draw(3, 4)).square().sum()
        if named == "autograd.grad":
            torch.autograd.grad(loss, values)
        else:
            loss.backward(inputs=[values])
    (message,) = [text for text in told(caplog) if "names its inputs" in text]
    assert "call backward() without inputs" in message


def test_a_module_tied_to_another_sparsified_one_is_refused():
    model = Pair()
    sparsify(model, some_entries(model, ["first.weight", "second.weight"]))
    model.second.weight = model.first.weight
    with pytest.raises(ValueError, match="second.weight was tied to first.weight, which is sparsified too"):
        model(draw(3, 4))


def test_a_loss_scaler_and_accumulation_change_no_gradient():
    """Scaled gradients of half precision may be infinite at first; that step is skipped, and verified later."""
    model = Beside()
    masks = some_entries(model, ["first.weight"])
    dense = copy.deepcopy(model)
    (values,) = sparsify(model, masks)
    optimizer = torch.optim.SGD([values], lr=0.0)
    for scale in (torch.inf, 2.0**10):
        optimizer.zero_grad()
        for part in range(2):
            (model(draw(3, 4, seed=part)).square().sum() * scale).backward()
    for part in range(2):
        dense(draw(3, 4, seed=part)).square().sum().backward()
    expected = dense.first.weight.grad.flatten()[masks["first.weight"].indices.long()]
    assert_close(values.grad / 2**10, expected, atol=1e-5)
    optimizer.step()


# --- Uses that are refused, with the cause and the remedy ---


def penalised(model):
    x = draw(3, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return gradient.square().sum()


def test_a_second_derivative_is_refused_by_its_name():
    model = Pair()
    sparsify(model, some_entries(model, ("first.weight", "second.weight")))
    with pytest.raises(RuntimeError, match="masked weights cannot be differentiated again.*desparsify"):
        penalised(model).backward()


def with_other_tensors(model):
    others = {name: part.detach().clone().requires_grad_() for name, part in model.named_parameters()}
    return torch.func.functional_call(model, others, (draw(3, 4),))


def with_other_weights(model):
    others = {name: part.detach() for name, part in model.named_parameters() if not name.endswith("values")}
    return torch.func.functional_call(model, others, (draw(3, 4),))


def as_a_derivative(model):
    return torch.func.jvp(model, (draw(3, 4),), (draw(3, 4),))


def example_by_example(model):
    return torch.func.vmap(model)(draw(3, 4))


def exported(model):
    return torch.export.export(model, (draw(3, 4),), strict=False)


@pytest.mark.parametrize(
    "call", [with_other_tensors, with_other_weights, as_a_derivative, example_by_example, exported]
)
def test_calls_that_pass_by_the_values_are_refused_and_change_nothing(call):
    twin = Twin(Pair())
    twin.step()
    state = {name: part.clone() for name, part in twin.model.state_dict().items()}
    exact = [values.detach().clone() for values in twin.values.values()]
    with pytest.raises(ValueError, match="desparsify"):
        call(twin.model)
    assert all(torch.equal(part, state[name]) for name, part in twin.model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(twin.values.values(), exact, strict=True))
    twin.step(seed=1)


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_weight_with_gradient_hooks_of_its_own_is_refused_in_selection_already(hook):
    model = Pair()
    handle = getattr(model.first.weight, hook)(lambda gradient: None)
    masks = some_entries(model, ("first.weight", "second.weight"))
    choose = dict(loss=lambda model, x: model(x).square().sum(), density=0.5, progress=False)
    for select in (
        lambda: sparsify(model, masks),
        lambda: select_masks(model, iter([draw(3, 4)]), targets=["first", "second"], **choose),
        lambda: find_targets(model, ["first"]),
    ):
        with pytest.raises(ValueError, match="first.weight has hooks on its gradient.*what sparsify returns"):
            select()
    assert not sparse_weights(model) and all(parameter.requires_grad for parameter in model.parameters())
    select_masks(model, [draw(3, 4)], targets=["second"], **choose)
    handle.remove()
    sparsify(model, select_masks(model, [draw(3, 4)], targets=["first", "second"], **choose))
    select_masks(model, [draw(3, 4)], targets=["first", "second"], **choose)


def test_a_loss_from_before_a_step_is_refused_as_by_torch():
    model = Pair()
    optimizer = SparseAdamW(sparsify(model, some_entries(model, ("first.weight", "second.weight"))))
    early, late = model(draw(3, 4)).sum(), model(draw(3, 4, seed=1)).sum()
    early.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


def test_a_weight_that_became_another_parameter_is_named_at_the_next_forward():
    model = Pair()
    sparsify(model, some_entries(model, ("first.weight", "second.weight")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model.first)
    with pytest.raises(ValueError, match="first.weight is no longer in the model"):
        model(draw(3, 4))


def test_a_module_converted_by_torch_is_refused_by_name():
    model = Pair()
    sparsify(model, some_entries(model, ("first.weight", "second.weight")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    with pytest.raises(ValueError, match="module of first.weight was replaced by a Linear.*desparsify"):
        converted(draw(3, 4))
    model(draw(3, 4)).sum().backward()


def test_an_embedding_with_a_largest_norm_trains():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Embedding(6, 4, max_norm=1.0)

        def forward(self, x):
            return self.first(torch.arange(5)) * torch.arange(4)

    twin = Twin(Table(), names=("first.weight",))
    for _ in range(3):
        twin.step()


# --- Salience ---


@pytest.mark.parametrize("salience", ["gradient", "snip", "fisher", "grasp"])
@pytest.mark.parametrize("case", ["forward", "prepended hook", "fused by the parent", "beside its module", "recursive"])
def test_salience_counts_every_use(case, salience, caplog):
    model = MODELS[case]() if case in MODELS else Pair()
    if case in CHANGES:
        CHANGES[case](model)
    batches = [dict(x=draw(3, 4, seed=seed), labels=torch.ones(3, dtype=torch.long)) for seed in range(3)]

    def loss(model, batch):
        return model(batch["x"]).pow(3).sum() / len(batch["x"])

    name = "first.weight"
    weight = model.get_parameter(name)
    gradients = [torch.autograd.grad(loss(model, batch), weight, create_graph=True)[0] for batch in batches]
    gradient = sum(gradients) / 3
    if salience == "fisher":
        rows = [dict(x=batch["x"][row : row + 1]) for batch in batches for row in range(3)]
        scores = sum(torch.autograd.grad(loss(model, row), weight)[0].square() for row in rows) / 9
    elif salience == "grasp":
        (moved,) = torch.autograd.grad((gradient * gradient.detach()).sum(), weight)
        scores = -moved * weight
    else:
        scores = (gradient if salience == "gradient" else gradient * weight).abs()
    held = weight.grad = torch.ones_like(weight)
    with caplog.at_level(logging.WARNING):
        masks = select_masks(
            model, batches, salience=salience, budget=5, targets=lambda k, p: k == name, loss=loss, progress=False
        )
    assert set(masks[name].indices.tolist()) == set(scores.flatten().topk(5).indices.tolist())
    assert weight.requires_grad and weight.grad is held and torch.equal(held, torch.ones_like(weight))
    assert not weight._post_accumulate_grad_hooks


def test_fisher_of_a_model_s_own_loss_counts_uses_outside_a_module():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_model("llama")
            self.layers = self.inner.model.layers

        def forward(self, input_ids, labels, attention_mask):
            hidden = self.inner.model(input_ids=input_ids).last_hidden_state
            hidden = hidden + F.linear(hidden, self.layers[0].self_attn.o_proj.weight)
            logits = self.inner.lm_head(hidden)
            return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}

    model, name = Beside(), "inner.model.layers.0.self_attn.o_proj.weight"
    batches = [{**token_batch(seed), "labels": token_batch(seed)["input_ids"]} for seed in range(2)]
    weight, scores = model.get_parameter(name), 0
    for batch in batches:
        for row in range(3):
            loss = model(**{key: value[row : row + 1] for key, value in batch.items()})["loss"]
            scores = scores + torch.autograd.grad(loss, weight)[0].square()
    masks = select_masks(model, batches, salience="fisher", budget=50, targets=lambda k, p: k == name, progress=False)
    assert len(set(masks[name].indices.tolist()) & set(scores.flatten().topk(50).indices.tolist())) >= 49


# --- Values that were frozen after sparsify ---


def with_lora(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules=["lm_head"], r=2))


def test_frozen_values_are_named_as_the_cause(caplog):
    """As peft freezes all that it does not know."""
    model = tiny_model()
    values = sparsify(model, random_masks(model, density=0.1))
    lora = with_lora(model)
    trained = [p for p in lora.parameters() if p.requires_grad]
    optimizer, before = SparseAdamW([*values, *trained]), [value.detach().clone() for value in values]
    lora(**token_batch()).loss.backward()
    with pytest.raises(
        ValueError, match="14 masked weights were frozen after sparsify.*get_peft_model.*requires_grad_"
    ):
        optimizer.step()
    assert all(torch.equal(value, old) for value, old in zip(values, before, strict=True))
    for value in values[1:]:
        value.requires_grad_(True)
    lora(**token_batch()).loss.backward()
    with caplog.at_level(logging.WARNING):
        optimizer.step()
        optimizer.step()
    (message,) = told(caplog)
    assert "The values of 1 of 14 masked weights, e.g. model.layers.0.self_attn.q_proj.weight" in message
    assert [torch.equal(value, old) for value, old in zip(values, before, strict=True)] == [True] + 13 * [False]


# --- Compiled layers ---


@pytest.mark.parametrize("salience", ["gradient", "fisher", "activation"])
def test_layers_compiled_in_place_are_scored_like_others(salience):
    model, batches = tiny_model(), [token_batch()]
    choose = dict(salience=salience, density=0.1, progress=False)
    expected = select_masks(model, batches, **choose)
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    model(**token_batch()).loss.backward()
    model.zero_grad()
    assert select_masks(model, batches, **choose) == expected


@pytest.mark.parametrize("how", ["in place", "wrapped", "layers"])
def test_a_compiled_model_gets_autograd_s_gradients(how):
    skip_unless_nodes_compile()
    torch._dynamo.reset()
    model, name = tiny_model("qwen2", num_hidden_layers=1), "model.embed_tokens.weight"
    dense = copy.deepcopy(model)
    masks = random_masks(model, targets=lambda k, p: p.dim() == 2, density=0.1)
    values = dict(zip(masks, sparsify(model, masks), strict=True))
    called = model
    if how == "in place":
        model.compile(backend="aot_eager")
    elif how == "wrapped":
        called = torch.compile(model, backend="aot_eager")
    else:
        model.model.layers[0].compile(backend="aot_eager")
    optimizer = torch.optim.SGD(values.values(), lr=0.0)
    for _ in range(3):
        for one in (called, dense):
            (one(**token_batch()).loss + 1e-3 * one.model.embed_tokens.weight.square().sum()).backward()
        for each, value in values.items():
            expected = dense.get_parameter(each).grad.flatten()[masks[each].indices.long()]
            assert_close(value.grad, expected, atol=1e-6, rtol=1e-4)
        assert name in values
        optimizer.step()
        optimizer.zero_grad()
        dense.zero_grad()
    torch._dynamo.reset()


def compiled_by_itself(how, model, **options):
    """Return a function that calls the first layer of a model, compiled, without its model."""
    layer = model[0]
    if how.startswith("in place"):
        layer.compile(**options)
        return layer if "checkpointed" not in how else partial(checkpoint, layer, use_reentrant=False)
    return torch.compile(layer if how == "wrapped" else lambda x: layer(2 * x), **options)


WAYS = ["in place", "in place, before", "in place, model first", "wrapped", "called"]


@pytest.mark.parametrize(
    "kind, how",
    [*((Pair, how) for how in [*WAYS, "in place, checkpointed"]), *((partial(nn.Linear, 4, 4), how) for how in WAYS)],
)
def test_a_layer_compiled_by_itself_computes_with_values_that_were_changed(kind, how):
    skip_unless_nodes_compile()
    torch._dynamo.reset()
    model, x = nn.Sequential(kind(), nn.Linear(4, 4)), draw(3, 4)
    masks = random_masks(model, targets=lambda name, p: p.dim() == 2, density=0.5)
    if how.endswith("before"):
        called = compiled_by_itself(how, model, backend="aot_eager")
    values = sparsify(model, masks)
    if not how.endswith("before"):
        called = compiled_by_itself(how, model, backend="aot_eager")
    if how.endswith("model first"):
        model(x).sum().backward()
    for value in values:
        value.grad = None
    for _ in range(3):
        y = called(x)
        y.square().sum().backward()
        dense = copy.deepcopy(model)  # not before, since a copy refreshes the weights
        desparsify(dense)
        expected = dense[0](2 * x if how == "called" else x)
        assert_close(y, expected)
        expected.square().sum().backward()
        for name, value in zip(masks, values, strict=True):
            # The second layer is not called.
            if name.startswith("0."):
                gradient = dense.get_parameter(name).grad.flatten()[masks[name].indices.long()]
                assert_close(value.grad, gradient, atol=1e-5, rtol=1e-4)
                value.grad = None
        with torch.no_grad():
            for value in values:
                value.mul_(3)
    torch._dynamo.reset()


@pytest.mark.parametrize("copied", [False, True])
def test_a_gradient_of_former_values_is_warned_of(copied, caplog):
    """A compiled layer that first ran in a call of its model knows nothing of a change by hand since."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
    masks = select_masks(model, salience="random", density=0.3, targets=["0", "2"], progress=False)
    values = sparsify(model, masks)
    if copied:
        model = copy.deepcopy(model)
        values = [weight.values for weight in sparse_weights(model)]
    model[0] = torch.compile(model[0], backend="aot_eager")
    x = torch.ones(2, 8)
    for _ in range(2):
        model(x).sum().backward()
    with torch.no_grad():
        for value in values:
            value.mul_(3)
    model(x).sum().backward()
    assert "former ones" not in caplog.text
    with torch.no_grad():
        for value in values:
            value.mul_(3)
    model[0](x).sum().backward()
    assert caplog.text.count("former ones") == 1


def test_a_layer_compiled_in_place_is_one_graph():
    if not traces_attributes():
        pytest.skip(f"torch {torch.__version__} breaks graphs where a module's attributes are set by default")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = nn.Sequential(Pair(), nn.Linear(4, 4))
    sparsify(model, random_masks(model, targets=lambda name, p: p.dim() == 2, density=0.5))
    model[0].compile(backend="eager")
    model[0](draw(3, 4))
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


def test_desparsify_leaves_a_compiled_layer_as_it_was():
    torch._dynamo.reset()
    model, x = nn.Sequential(Pair(), nn.Linear(4, 4)), draw(3, 4)
    model[0].compile(backend="eager")
    before = model[0]._compiled_call_impl
    sparsify(model, random_masks(model, targets=lambda name, p: p.dim() == 2, density=0.5))
    expected = model[0](x)
    desparsify(model)
    assert model[0]._compiled_call_impl is before and "compile" not in model[0].__dict__
    assert_close(model[0](x), expected)
    torch._dynamo.reset()
