"""A masked dense weight gets autograd's own gradient however it is used, and a use that its hooks miss is named."""

import copy
import logging
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, tiny_model, token_batch
from torch import nn
from torch.utils.checkpoint import checkpoint

from speft_optim import Mask, Masks, SparseAdamW, desparsify, select_masks, sparsify


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_entries(model, names, share=0.4):
    masks = Masks()
    for name in names:
        shape = model.get_parameter(name).shape
        order = torch.randperm(shape.numel(), generator=torch.Generator().manual_seed(len(name)))
        masks[name] = Mask(order[: max(1, round(share * shape.numel()))], shape)
    return masks


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
    # Of a tied weight both modules are known.
    messages = [record.message for record in caplog.records]
    assert len(messages) == (0 if change == "tied" else 1) and all("first.weight" in text for text in messages)


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
    assert sorted(record.message.split()[0] for record in caplog.records) == ["first.weight", "second.weight"]
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
    (record,) = caplog.records
    assert record.message.startswith("first.weight is used outside its module's forward")


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
    masks = select_masks(model, salience="random", density=0.1, targets=lambda k, p: k == name, progress=False)
    (values,) = sparsify(model, masks)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            loss(model).backward()
    expected = dense.get_parameter(name).grad.flatten()[masks[name].indices.long()].float()
    assert (values.grad / 2 - expected).norm() < (1e-5 if dtype == torch.float32 else 1e-2) * expected.norm()
    (record,) = caplog.records
    assert name in record.message


def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=16, state_size=4, num_hidden_layers=2, intermediate_size=32)
    return MambaForCausalLM(MambaConfig(**sizes, time_step_rank=3))


def test_a_mixer_that_reads_a_layer_s_weight_trains_it_and_scores_it(caplog):
    model, batch = mamba(), token_batch()
    dense = copy.deepcopy(model)
    dense(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
    batch.pop("attention_mask")
    with caplog.at_level(logging.WARNING):
        masks = select_masks(model, [batch], density=0.1, progress=False)
    names = [name for name in masks if "dt_proj" in name]
    assert len(names) == 2
    assert {name for name in masks for record in caplog.records if name in record.message} == set(names)
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
    def __init__(self, layers=5, side=32):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(layers)))

    def forward(self, x):
        return self.layers(x)


class Alive(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts tensors of one shape that live at once, and how many were made."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.alive, self.most, self.made = shape, set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.shape == self.shape:
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.alive and not any(
                    isinstance(one, torch.Tensor) and one.untyped_storage()._cdata == key for one in args
                ):
                    self.alive.add(key)
                    self.made += 1
                    weakref.finalize(storage, self.alive.discard, key)
                    self.most = max(self.most, len(self.alive))
        return result
