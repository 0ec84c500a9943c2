"""Gradient hooks: a masked weight gets the gradient that dense backward gives it, whatever module uses it."""

import copy
import warnings

import pytest
import torch
from conftest import assert_close, draw, product_flops, random_masks, some_entries, tiny_model, token_batch
from torch import nn
from torch.utils.checkpoint import checkpoint

from speft_optim import Mask, desparsify, select_masks, sparsify
from speft_optim.weights.attached import sparse_weights


def run(model, call, inputs):
    """Output and input gradients of a loss that weighs every output entry differently."""
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    output = call(model, *inputs)
    (output.float() * draw(*output.shape, seed=9)).sum().backward()
    return output.detach(), [x.grad for x in inputs]


def assert_gradients(model, names, call, inputs, **tolerance):
    """Compact gradients equal the dense ones looked up; output and input gradients are those of dense, bit for bit."""
    dense = copy.deepcopy(model)
    for name, parameter in dense.named_parameters():
        parameter.requires_grad_(name in names)
    expected_output, expected_inputs = run(dense, call, inputs)
    masks = some_entries(model, names)
    values = sparsify(model, masks)
    output, input_gradients = run(model, call, inputs)
    assert torch.equal(output, expected_output)
    for ours, theirs in zip(input_gradients, expected_inputs, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    order = [name for name, _ in dense.named_parameters() if name in names]
    for value, name in zip(values, order, strict=True):
        gradient = dense.get_parameter(name).grad.to_dense()
        assert value.grad.dtype == torch.float32
        assert_close(value.grad, gradient.flatten()[masks[name].indices.long()], **{"atol": 1e-6, **tolerance})
        assert model.get_parameter(name).grad is None
    assert not any(attribute in module.__dict__ for module in model.modules() for attribute in ("weight", "bias"))
    desparsify(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def module_of(factory, *args, **kwargs):
    torch.manual_seed(0)
    return factory(*args, **kwargs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 1, 3, 5), (0, 5), (2, 0, 5), (1, 5)])
def test_linear_with_inputs_of_any_rank(shape, bias):
    layer = module_of(nn.Linear, 5, 7, bias=bias)
    assert_gradients(layer, ["weight"], lambda m, x: m(x), [draw(*shape)])


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (6, 1)])
def test_linear_of_odd_sizes_and_full_density(size):
    layer = module_of(nn.Linear, *size)
    x = draw(4, size[0])
    (values,) = sparsify(layer, {"weight": Mask(torch.arange(layer.weight.numel()), layer.weight.shape)})
    coefficients = draw(4, size[1], seed=1)
    (layer(x) * coefficients).sum().backward()
    assert_close(values.grad.view_as(layer.weight), coefficients.T @ x, atol=1e-6)


class Experts(nn.Module):
    """Stacked expert weights, of which each row of the input uses one; the last is never used."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(draw(3, 4, 5))

    def forward(self, x):
        return torch.stack([self.up[number % 2] @ row for number, row in enumerate(x)])


class Scaled(nn.Linear):
    """A linear layer with a forward of its own: the output is not `x @ W.T`."""

    def forward(self, x):
        return x @ (2 * self.weight.T) + self.weight.sum()


class Twice(nn.Module):
    """One layer called twice, with inputs of different shapes, as in weight sharing across depth."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)).unsqueeze(0)).squeeze(0)


class Tied(nn.Module):
    """Embedding and head share a weight, as in small language models; and two linear layers share another."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 6, bias=False)
        self.head.weight, self.second.weight = self.embed.weight, self.first.weight

    def forward(self, ids):
        return self.head(self.second(torch.tanh(self.first(self.embed(ids)))))


def conv1d():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(7, 5)


IDS = torch.tensor([[0, 3, 3], [5, 1, 0]])
CASES = {
    "keyword input": (lambda: nn.Linear(5, 7), ["weight"], lambda m, x: m(input=x), [draw(3, 5)]),
    "linear bias": (lambda: nn.Linear(5, 7), ["bias"], lambda m, x: m(x), [draw(2, 3, 5)]),
    "linear weight and bias": (lambda: nn.Linear(5, 7), ["weight", "bias"], lambda m, x: m(x), [draw(3, 5)]),
    "Conv1D": (conv1d, ["weight"], lambda m, x: m(x), [draw(2, 3, 5)]),
    "Conv1D bias": (conv1d, ["weight", "bias"], lambda m, x: m(x), [draw(2, 3, 5)]),
    "embedding": (lambda: nn.Embedding(6, 4), ["weight"], lambda m, ids: m(ids), [IDS]),
    "padding embedding": (lambda: nn.Embedding(6, 4, padding_idx=0), ["weight"], lambda m, ids: m(ids), [IDS]),
    "sparse embedding": (lambda: nn.Embedding(6, 4, sparse=True), ["weight"], lambda m, ids: m(ids), [IDS]),
    "embedding bag": (lambda: nn.EmbeddingBag(6, 4), ["weight"], lambda m, ids: m(ids), [IDS]),
    "layer norm": (lambda: nn.LayerNorm(5), ["weight", "bias"], lambda m, x: m(x), [draw(3, 5)]),
    "RMS norm": (lambda: nn.RMSNorm(5), ["weight"], lambda m, x: m(x), [draw(3, 5)]),
    "batch norm": (lambda: nn.BatchNorm1d(5), ["weight", "bias"], lambda m, x: m(x), [draw(4, 5)]),
    "conv2d": (lambda: nn.Conv2d(3, 4, 2), ["weight", "bias"], lambda m, x: m(x), [draw(2, 3, 5, 5)]),
    "channels last": (
        lambda: nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last),
        ["weight"],
        lambda m, x: m(x),
        [draw(2, 3, 5, 5)],
    ),
    "experts": (Experts, ["up"], lambda m, x: m(x), [draw(5, 5)]),
    "own forward": (lambda: Scaled(5, 7), ["weight"], lambda m, x: m(x), [draw(3, 5)]),
    "called twice": (Twice, ["layer.weight", "layer.bias"], lambda m, x: m(x), [draw(3, 4)]),
    "tied": (Tied, ["embed.weight", "first.weight"], lambda m, ids: m(ids), [IDS]),
    "attention input": (
        lambda: nn.MultiheadAttention(4, 2, batch_first=True).eval(),
        ["in_proj_weight", "in_proj_bias"],
        lambda m, x: m(x, x, x)[0],
        [draw(2, 3, 4)],
    ),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval(),
        ["self_attn.in_proj_weight", "linear1.weight", "linear2.weight", "norm1.weight"],
        lambda m, x: m(x),
        [draw(2, 3, 4)],
    ),
    "ReLU in place": (
        lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 2)),
        ["0.weight", "2.weight"],
        lambda m, x: m(x),
        [draw(2, 3, 5)],
    ),
    "sum in place": (lambda: nn.Linear(5, 7), ["weight"], lambda m, x: m(x).mul_(3).add_(x.sum()), [draw(3, 5)]),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_dense_whatever_module_uses_the_weight(case):
    factory, names, call, inputs = CASES[case]
    assert_gradients(module_of(factory), names, call, inputs)


def test_hooks_of_the_user_stay_outside_of_the_tap():
    layer = module_of(nn.Linear, 5, 7)
    handles = [
        layer.register_forward_pre_hook(lambda module, args: (args[0] * 3,)),
        layer.register_forward_hook(lambda module, args, output: output * 2),
    ]
    masks, x = some_entries(layer, ["weight"]), draw(3, 5)
    (values,) = sparsify(layer, masks)
    layer(x).sum().backward()
    expected = (2 * torch.ones(7, 3) @ (3 * x)).flatten()[masks["weight"].indices.long()]
    assert_close(values.grad, expected, atol=1e-6)
    desparsify(layer)
    for handle in handles:
        handle.remove()
    assert not layer._forward_hooks and not layer._forward_pre_hooks


def test_gradients_of_several_backwards_add_up():
    layer = module_of(nn.Linear, 5, 7)
    (values,) = sparsify(layer, some_entries(layer, ["weight"]))
    x = draw(6, 5)
    layer(x).square().sum().backward()
    whole, values.grad = values.grad, None
    for part in x.split(2):
        layer(part).square().sum().backward()
    assert_close(values.grad, whole, atol=1e-5)
    loss = layer(x).square().sum()
    values.grad = None
    loss.backward(retain_graph=True)
    loss.backward()
    assert_close(values.grad, 2 * whole, atol=1e-5)


def test_nothing_is_recorded_without_gradients():
    model = module_of(Tied)
    sparsify(model, some_entries(model, ["embed.weight", "first.weight"]))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert not model(IDS).requires_grad


def test_what_cannot_be_right_is_an_error_and_no_wrong_gradient():
    layer = module_of(nn.Linear, 5, 7)
    (values,) = sparsify(layer, some_entries(layer, ["weight"]))
    x = draw(3, 5)
    output = layer(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", ["self_attn.out_proj.weight", "self_attn.out_proj.bias"])
def test_weights_that_attention_reads_behind_our_back_are_refused(name):
    model = module_of(nn.TransformerEncoderLayer, 4, 2, 8)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=f"{name} cannot be trained.*Leave it out"):
        sparsify(model, some_entries(model, [name, "linear1.weight"]))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    with pytest.raises(ValueError, match="MultiheadAttention reads it without calling its module"):
        select_masks(model, salience="magnitude", density=0.1, targets=[name])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_weights_are_refused(kind):
    model = module_of(kind, 3, 4)
    with pytest.raises(ValueError, match="weight_ih_l0 cannot be trained"):
        sparsify(model, some_entries(model, ["weight_ih_l0"]))


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_gives_fp32_gradients_of_the_rounded_operands(backward_inside):
    layer = module_of(nn.Linear, 5, 7)
    masks, x, coefficients = some_entries(layer, ["weight"]), draw(3, 5), draw(3, 7, seed=1)
    (values,) = sparsify(layer, masks)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
        loss = (output * coefficients).sum()
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    assert output.dtype == torch.bfloat16 and values.grad.dtype == torch.float32
    expected = coefficients.bfloat16().double().T @ x.bfloat16().double()
    assert_close(values.grad, expected.flatten()[masks["weight"].indices.long()], atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_autocast_agrees_with_fp32_on_a_model(kind):
    gradients = []
    for enabled in (False, True):
        model = tiny_model(kind)
        values = sparsify(model, random_masks(model, density=0.3))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(**token_batch()).loss
        loss.backward()
        gradients.append(torch.cat([value.grad for value in values]))
    assert gradients[1].dtype == torch.float32
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert error < 0.02


@pytest.mark.parametrize("failing", ["embedding", "experts"])
def test_an_exception_in_forward_leaves_no_shadow_behind(failing):
    model = module_of(nn.Embedding, 6, 4) if failing == "embedding" else module_of(Experts)
    (name,) = [name for name, _ in model.named_parameters()]
    keys = set(sparsify(model, some_entries(model, [name])) and model.__dict__)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.tensor([7]) if failing == "embedding" else draw(2, 3))
    assert set(model.__dict__) == keys
    assert isinstance(getattr(model, name), nn.Parameter)


def gradients_with_checkpointing(mode, when, kind="qwen2"):
    model = tiny_model(kind).train()
    masks = random_masks(model)

    def enable():
        if mode is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})

    if when == "before":
        enable()
    values = sparsify(model, masks)
    if when == "after":
        enable()
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model(**token_batch()).loss.backward()
    assert len(calls) == (1 if mode is None else 2)
    assert not model.model.embed_tokens.weight.requires_grad
    return [value.grad for value in values], [name for name, p in model.named_parameters() if p.grad is not None]


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_checkpointing_with_frozen_embeddings_changes_no_gradient(mode, when):
    expected, _ = gradients_with_checkpointing(None, "after")
    actual, names = gradients_with_checkpointing(mode, when)
    assert len(actual) == len(expected) == len(names) == 14
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_a_step_multiplies_no_more_than_a_frozen_model_and_each_weight_gradient_once(kind, checkpointed):
    """Recomputation of a checkpointed block ends with the input of its last layer, whose output nobody needs again."""
    model, batch = tiny_model(kind).train().requires_grad_(False), token_batch()
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    floor = product_flops(lambda: model(**batch).loss.backward())
    masks = random_masks(model)
    # Verification forms each gradient once more, and the counter's hooks let it begin anew.
    sparsify(model, masks, verify=False)
    ours = product_flops(lambda: model(**batch).loss.backward())
    assert ours == floor + sum(2 * batch["input_ids"].numel() * mask.shape.numel() for mask in masks.values())


class Branching(nn.Module):
    """Two layers on one input that is used beside them too, behind a layer that is trained densely."""

    def __init__(self):
        super().__init__()
        self.before, self.left, self.right = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = torch.tanh(self.before(x)) * 1.0
        return self.left(x) * self.right(x) + x


CHANGES = [lambda x: x.mul_(2), lambda x: x.clamp_(min=-0.1), lambda x: x.register_hook(torch.neg)]


@pytest.mark.parametrize("change", CHANGES, ids=["mul_", "clamp_", "gradient"])
def test_what_other_hooks_do_to_an_input_or_its_gradient_means_what_it_did(change):
    """Hooks that come after ours."""
    gradients = []
    for sparse in (False, True):
        model, seen = module_of(Branching), []
        weights = [model.left.weight, model.right.weight]
        if sparse:
            whole = Mask(torch.arange(36), (6, 6))
            weights = sparsify(model, {"left.weight": whole, "right.weight": whole})
            model.before.requires_grad_(True)

        def look(module, args, output=None, seen=seen):
            seen.append(args[0])
            if output is None:
                change(args[0])

        model.left.register_forward_pre_hook(look)
        model.left.register_forward_hook(look)
        model(draw(4, 5)).square().sum().backward()
        assert seen[0] is seen[1]
        gradients.append([weight.grad.flatten() for weight in (model.before.weight, *weights)])
    for plain, ours in zip(*gradients, strict=True):
        assert_close(ours, plain)


@pytest.mark.parametrize("checkpointed", [True, False])
def test_hooks_hold_no_input_between_forwards(checkpointed):
    model = tiny_model().train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    sparsify(model, random_masks(model))
    model(**token_batch()).loss.backward()
    gradient_hooks = [hook for weight in sparse_weights(model) for hook in weight.uses.hooks]
    assert len(gradient_hooks) == 14
    assert not any("uses_of" in key or key == "weight" for module in model.modules() for key in module.__dict__)


class OwnCheckpointing(nn.Module):
    """A model that checkpoints its blocks by itself, reentrantly, and does not see to the embeddings."""

    gradient_checkpointing = True

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def get_input_embeddings(self):
        return self.embed

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True) if self.gradient_checkpointing else block(x)
        return x


def test_reentrant_checkpointing_of_other_models_is_seen_to():
    model = module_of(OwnCheckpointing)
    names = ["blocks.0.weight", "blocks.1.weight"]
    masks = some_entries(model, names)
    values = sparsify(model, masks)
    found = []
    for checkpointing in (True, False):
        model.gradient_checkpointing = checkpointing
        model(IDS).square().sum().backward()
        found.append([value.grad for value in values])
        for value in values:
            value.grad = None
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gpt2", "opt", "bert", "mixtral"])
def test_every_weight_of_every_architecture_gets_its_dense_gradient(kind):
    """Embeddings, norms, biases, tied and stacked weights together, through the model's own loss."""
    model, batch = tiny_model(kind), token_batch(ragged=True)
    dense = copy.deepcopy(model)
    dense(**batch).loss.backward()
    masks = some_entries(model, [name for name, _ in model.named_parameters()], share=0.2)
    used = {name for name, p in dense.named_parameters() if p.grad is not None}
    values = sparsify(model, masks)
    loss = model(**batch).loss
    loss.backward()
    for (name, mask), value in zip(masks.items(), values, strict=True):
        assert (value.grad is not None) == (name in used), name
        if name in used:
            expected = dense.get_parameter(name).grad.flatten()[mask.indices.long()]
            assert_close(value.grad, expected, atol=1e-6)
