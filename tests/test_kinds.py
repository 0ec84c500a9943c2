"""Weights of every kind, one training run each: what a user may have masked, against REF."""

import pytest
import torch
from conftest import OPTIONS, Reference, assert_close, every, random_masks, restacks, tiny_model, token_batch
from torch import nn
from torch.utils.checkpoint import checkpoint

from speft_optim import Mask, SparseAdamW, load_adapter, save_adapter, select_masks, sparsify
from speft_optim.weights.attached import sparse_weights
from speft_optim.weights.compact_values import linked


class Convolutions(nn.Module):
    """Plain, grouped, transposed and one-dimensional ones, and a batch norm."""

    def __init__(self, memory_format=torch.contiguous_format):
        super().__init__()
        self.flat = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4, padding=1, bias=False)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.line = nn.Conv1d(4, 5, 3)
        self.norm = nn.BatchNorm2d(4).eval()
        self.to(memory_format=memory_format)

    def forward(self, x):
        x = self.norm(self.up(torch.relu(self.grouped(torch.relu(self.flat(x))))))
        return self.line(x.flatten(2)).square().mean()


class Shared(nn.Module):
    """One linear layer used three times, one tensor under two names, and checkpointed blocks around them."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.reentrant = reentrant
        self.first, self.twice, self.tied = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.tied.weight = self.first.weight

    def block(self, x):
        return self.tied(torch.tanh(self.twice(torch.tanh(self.twice(x)))))

    def forward(self, x):
        x = self.first(x)
        for _ in range(2):
            if self.reentrant is None:
                x = self.block(x)
            else:
                x = checkpoint(self.block, x, use_reentrant=self.reentrant)
        return self.twice(x).square().mean()


class Table(nn.Module):
    """Embeddings of several kinds, and weights that are no matrix of rows in memory."""

    def __init__(self):
        super().__init__()
        self.padded, self.bag = nn.Embedding(11, 6, padding_idx=0), nn.EmbeddingBag(11, 6)
        self.strided = nn.Linear(6, 6)
        self.strided.weight = nn.Parameter(torch.randn(6, 12)[:, ::2])
        self.turned = nn.Linear(6, 4, bias=False)
        self.turned.weight = nn.Parameter(torch.randn(6, 4).t())
        self.norm = nn.LayerNorm(4)

    def forward(self, ids):
        x = self.padded(ids).mean(1) + self.bag(ids)
        return self.norm(self.turned(self.strided(x))).sin().square().sum()


def images(seed):
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def vectors(seed):
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))


def tokens(seed):
    return torch.randint(0, 11, (4, 7), generator=torch.Generator().manual_seed(seed))


CASES = {
    "convolutions": (Convolutions, images),
    "channels-last convolutions": (lambda: Convolutions(torch.channels_last), images),
    "a weight used several times": (Shared, vectors),
    "the same in reentrant checkpoints": (lambda: Shared(True), vectors),
    "the same in other checkpoints": (lambda: Shared(False), vectors),
    "embeddings and strided weights": (Table, tokens),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_training_equals_the_reference(case, density, tmp_path):
    build, data = CASES[case]
    torch.manual_seed(0)
    model = build()
    masks = random_masks(model, every, density=density)
    reference = Reference(model, masks, **OPTIONS)
    strides = {name: parameter.stride() for name, parameter in model.named_parameters()}
    values = sparsify(model, masks)
    optimizer = SparseAdamW(values, **OPTIONS)
    for step in range(4):
        model(data(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.model(data(step)).backward()
        reference.step()
    reference.assert_agrees(model, optimizer, values)
    now = {name: parameter.stride() for name, parameter in model.named_parameters() if name in strides}
    assert now == strides
    save_adapter(model, tmp_path / "a.safetensors")
    torch.manual_seed(0)
    fresh = build()
    load_adapter(fresh, tmp_path / "a.safetensors")
    assert all(torch.equal(part, model.state_dict()[name]) for name, part in fresh.state_dict().items())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gpt2", "opt", "bert", "mixtral"])
def test_every_weight_of_every_architecture_trains_as_the_reference(kind):
    model = tiny_model(kind)
    masks = random_masks(model, every, density=0.1)
    reference = Reference(model, masks, **OPTIONS)
    values = sparsify(model, masks)
    optimizer = SparseAdamW(values, **OPTIONS)
    for step in range(2):
        model(**token_batch(step, ragged=True)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.model(**token_batch(step, ragged=True)).loss.backward()
        reference.step()
    unused = {name for name, parameter in reference.parameters.items() if not reference.optimizer.state[parameter]}
    used = [parameter for parameter in values if linked(parameter).name not in unused]
    assert used
    reference.assert_agrees(model, optimizer, used)


def test_tied_embeddings_are_not_two_parameters(tmp_path):
    """One buffer, one share of the budget, the gradient of both uses, and one tensor after step, save and load."""
    model = tiny_model("qwen2")
    masks = random_masks(model, every, density=0.1)
    assert "lm_head.weight" not in masks and "model.embed_tokens.weight" in masks
    tied = sum(parameter.numel() for parameter in model.parameters())
    assert abs(masks.count - 0.1 * tied) <= len(masks)
    reference = Reference(model, masks, **OPTIONS)
    values = sparsify(model, masks)
    assert len({id(weight.values) for weight in sparse_weights(model)}) == len(masks)
    optimizer = SparseAdamW(values, **OPTIONS)
    model(**token_batch()).loss.backward()
    optimizer.step()
    reference.model(**token_batch()).loss.backward()
    reference.step()
    reference.assert_agrees(model, optimizer, values)
    model.save_pretrained(tmp_path)
    for one in (model, type(model).from_pretrained(tmp_path)):
        assert one.lm_head.weight is one.model.embed_tokens.weight
        assert torch.equal(one.lm_head.weight, model.lm_head.weight)


@restacks
@pytest.mark.parametrize("scope", ["local", "global"])
def test_stacked_experts_are_not_left_out(scope):
    """Their share is counted by entries, and what is left out of the default targets is what they say."""
    model = tiny_model("mixtral")
    masks = select_masks(model, [token_batch(1)], density=0.01, scope=scope, targets=every, progress=False)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    stacked = [name for name, parameter in model.named_parameters() if parameter.dim() == 3]
    assert len(stacked) == 4 and masks.keys() == sizes.keys()
    if scope == "local":
        assert all(len(masks[name]) == round(0.01 * size) for name, size in sizes.items())
    else:
        assert masks.count == round(0.01 * sum(sizes.values()))
    assert all(projection in masks.summary() for projection in ("gate_up_proj", "down_proj"))
    left_out = sizes.keys() - random_masks(model, density=0.01).keys()
    assert all("norm" in name or name in ("model.embed_tokens.weight", "lm_head.weight") for name in left_out)
    reference = Reference(model, masks, **OPTIONS)
    values = sparsify(model, masks)
    optimizer = SparseAdamW(values, **OPTIONS)
    for step in range(5):
        model(**token_batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.model(**token_batch(step)).loss.backward()
        reference.step()
    reference.assert_agrees(model, optimizer, values)


@restacks
def test_an_idle_expert_does_not_move_without_decay():
    model = tiny_model("mixtral", num_experts_per_tok=1)
    stacked = [name for name, parameter in model.named_parameters() if parameter.dim() == 3]
    assert stacked
    masks = random_masks(model, targets=lambda n, p: n in stacked)
    assert "gate_up_proj" in masks.summary()
    values = sparsify(model, masks)
    optimizer = SparseAdamW(values, lr=1e-2, weight_decay=0.0)
    start = {name: model.get_parameter(name).detach().clone() for name in stacked}
    batch = {key: part[:1, 1:2].repeat(1, 3) for key, part in token_batch().items()}
    for _ in range(5):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = torch.stack([(model.get_parameter(name) != start[name]).flatten(1).any(1) for name in stacked])
    assert moved.any() and not moved.all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_follow_exact_values(dtype):
    model = tiny_model(dtype=dtype)
    masks = random_masks(model, every, density=0.1)
    start = {name: part.clone() for name, part in model.state_dict().items()}
    values = sparsify(model, masks)
    optimizer = SparseAdamW(values, lr=1e-5, weight_decay=0.0)
    exact = [parameter.detach().clone() for parameter in values]
    moments = [(torch.zeros_like(value), torch.zeros_like(value)) for value in exact]
    for step in range(1, 30):
        model(**token_batch(step)).loss.backward()
        for value, (first, second), parameter in zip(exact, moments, values, strict=True):
            assert parameter.grad.dtype == torch.float32
            first.lerp_(parameter.grad, 0.1)
            second.lerp_(parameter.grad**2, 0.001)
            value -= 1e-5 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        optimizer.step()
        optimizer.zero_grad()
    for value, parameter in zip(exact, values, strict=True):
        weight = linked(parameter)
        assert_close(parameter.detach(), value)
        inside = torch.zeros(weight.mask.shape.numel(), dtype=torch.bool)
        inside[weight.mask.indices.long()] = True
        assert torch.equal(weight.base.tensor.flatten()[inside], parameter.to(dtype))
        assert torch.equal(weight.base.tensor.flatten()[~inside], start[weight.name].flatten()[~inside])


def test_fp16_weights_under_a_loss_scaler():
    model = tiny_model(dtype=torch.float16)
    values = sparsify(model, random_masks(model, density=0.1))
    optimizer = SparseAdamW(values, lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    losses = []
    for _ in range(15):
        loss = model(**token_batch()).loss
        scaler.scale(loss.float()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("count, dtype", [(2**31 - 1, torch.int32), (2**31, torch.int64)])
def test_positions_widen_only_where_a_tensor_needs_it(count, dtype):
    # One element stands for all, so that the weight takes no memory.
    mask = Mask(torch.tensor([count - 1, 5, 0]), (count,))
    assert mask.indices.dtype == dtype and mask.indices.tolist() == [0, 5, count - 1]
    wide = Mask(torch.tensor([2**31, 7]), (2**17, 2**15))
    assert wide.indices.dtype == torch.int64 and wide.indices.tolist() == [7, 2**31]


def test_idle_and_empty_parameters_are_no_trouble():
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "empty": nn.Linear(4, 0), "idle": nn.Linear(4, 4)})
    masks = random_masks(model, every, density=0.5)
    values = sparsify(model, masks)
    optimizer = SparseAdamW(values, lr=1e-2)
    before = model["idle"].weight.clone()
    model["used"](torch.randn(2, 4)).sum().backward()
    optimizer.step()
    assert torch.equal(model["idle"].weight, before)
