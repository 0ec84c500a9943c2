"""Every measure against a plain dense computation: all gradients at once, one sort over everything."""

import copy
import random
import weakref

import numpy as np
import pytest
import torch
from conftest import random_masks, tiny_model, token_batch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

from speft_optim import desparsify, select_masks, sparsify
from speft_optim.salience.batch_reader import BatchReader
from speft_optim.salience.calibration import _FILLS, random_draws, stream_scores
from speft_optim.salience.grasp import GradientStore
from speft_optim.salience.groups import cut_into_groups
from speft_optim.salience.losses import example_losses
from speft_optim.salience.measures import MEASURES, measure_of
from speft_optim.weights.targets import find_targets

KINDS = ["llama", "qwen2", "gemma2", "gpt2", "opt", "bert", "mixtral"]
LABELLED = ["gradient", "snip", "force", "taylor_fo", "fisher", "grasp"]


def ragged_batches(count=3, side="right", **options):
    return [token_batch(seed, ragged=True, side=side, **options) for seed in range(count)]


def dense_gradients(model, names, batches):
    """The gradient of the mean loss over the batches, by name."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    parameters = {name: p.requires_grad_(True) for name, p in model.named_parameters() if name in names}
    loss = sum(model(**batch).loss for batch in batches) / len(batches)
    grads = torch.autograd.grad(loss, list(parameters.values()), create_graph=True, allow_unused=True)
    pairs = zip(parameters.items(), grads, strict=True)
    return {name: (p, torch.zeros_like(p) if g is None else g) for (name, p), g in pairs}


def dense_scores(model, names, batches, salience):
    """Scores of all entries by name, computed the obvious way on a copy of the model."""
    model = copy.deepcopy(model)
    model.config._experts_implementation = "eager"
    model.set_attn_implementation("eager")
    if salience == "fisher":
        total, count = dict.fromkeys(names, 0), 0
        for batch in batches:
            for row in range(len(batch["labels"])):
                one = {key: value[row : row + 1] for key, value in batch.items()}
                gradients = dense_gradients(model, names, [one])
                total = {name: total[name] + gradients[name][1].detach().square() for name in names}
                count += 1
        return {name: total[name] / count for name in names}
    # Not every model of older versions lets its attention be chosen, and the fused one has no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        gradients = dense_gradients(model, names, batches)
    if salience == "grasp":
        inner = sum((g * g.detach()).sum() for _, g in gradients.values())
        products = torch.autograd.grad(inner, [p for p, _ in gradients.values()], allow_unused=True)
        pairs = zip(gradients.items(), products, strict=True)
        return {n: -p.detach() * (0 if h is None else h) for (n, (p, _)), h in pairs}
    formulas = {
        "magnitude": lambda w, g: w.abs(),
        "gradient": lambda w, g: g.abs(),
        "snip": lambda w, g: (g * w).abs(),
        "force": lambda w, g: -g * w,
        "taylor_fo": lambda w, g: (g.double() * w.double()) ** 2,
    }
    return {name: formulas[salience](p.detach(), g.detach()) for name, (p, g) in gradients.items()}


def assert_selects(masks, scores, scope, density, slack=2e-3):
    """The masks hold the best entries: none kept is below the threshold, none left out above it, up to rounding."""
    groups = [[name] for name in masks] if scope == "local" else [list(masks)]
    for group in groups:
        flat = torch.cat([scores[name].double().flatten() for name in group])
        kept = torch.zeros(flat.numel(), dtype=torch.bool)
        start = 0
        for name in group:
            kept[start + masks[name].indices.long()] = True
            start += scores[name].numel()
        assert int(kept.sum()) == round(density * flat.numel())
        threshold = flat.sort(descending=True).values[int(kept.sum()) - 1]
        margin = slack * threshold.abs()
        assert bool((flat[kept] >= threshold - margin).all())
        assert bool((flat[~kept] <= threshold + margin).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("salience", ["magnitude", *LABELLED])
def test_masks_equal_a_dense_computation(kind, salience):
    model, batches = tiny_model(kind), ragged_batches()
    scores = dense_scores(model, find_targets(model), batches, salience)
    for scope in ("local", "global"):
        masks = select_masks(model, batches, salience=salience, density=0.1, scope=scope, progress=False)
        assert_selects(masks, scores, scope, 0.1)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("salience", [name for name in MEASURES if name != "activation"])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_masks_do_not_depend_on_the_memory_budget(kind, salience, scope):
    model, batches = tiny_model(kind), ragged_batches(2)
    choose = dict(salience=salience, density=0.05, scope=scope, progress=False)
    whole = select_masks(model, batches, memory_budget=2**30, **choose)
    for budget in (100_000, 20_000):
        assert select_masks(model, batches, memory_budget=budget, **choose) == whole


@pytest.mark.parametrize("options", [{}, {"generator": 0}, {"num_workers": 1}])
@pytest.mark.parametrize("salience", ["gradient", "grasp"])
def test_every_pass_sees_the_same_batches_of_a_loader_that_shuffles_and_draws(salience, options):
    rows = [{key: value[0] for key, value in token_batch(seed, batch=1).items()} for seed in range(10)]

    def collate(rows):
        """Random tokens replaced, by the numbers of torch, Python and numpy."""
        batch = torch.utils.data.default_collate(rows)
        for row in batch["input_ids"]:
            row[torch.randint(len(row), ())] = random.randint(1, 30) + np.random.randint(30)
        return batch

    model, found = tiny_model("llama"), []
    # Each pass starts the workers anew, and `grasp` takes many.
    few = salience == "grasp" and "num_workers" in options
    for budget in (2**30, 60_000) if few else (2**30, 60_000, 20_000):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        kwargs = {**options, "generator": torch.Generator().manual_seed(0)} if "generator" in options else options
        loader = DataLoader(rows, batch_size=4, shuffle=True, collate_fn=collate, **kwargs)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        choose = dict(salience=salience, density=0.05, scope="global", progress=False)
        found.append(select_masks(model, loader, memory_budget=budget, **choose))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    assert all(masks == found[0] for masks in found)


def test_a_budget_of_one_byte_works_row_by_row():
    model, batches = tiny_model("llama", num_hidden_layers=1), ragged_batches(1)
    for scope in ("local", "global"):
        choose = dict(density=0.05, scope=scope, progress=False)
        assert select_masks(model, batches, memory_budget=1, **choose) == select_masks(model, batches, **choose)


@pytest.mark.parametrize("salience", LABELLED + ["activation"])
def test_scores_do_not_depend_on_padding_side_or_amount(salience):
    model = tiny_model("gemma2")
    choose = dict(salience=salience, density=0.1, scope="global", progress=False)
    right = select_masks(model, ragged_batches(side="right"), **choose)
    left = select_masks(model, ragged_batches(side="left"), **choose)
    assert right.overlap(left) > 0.995


@pytest.mark.parametrize("attention", ["eager", None])
def test_padding_makes_no_nan_and_no_difference_in_gemma2(attention):
    """With lengths far apart, whichever attention transformers chooses."""
    model = tiny_model("gemma2", attn_implementation=attention)
    rows = [token_batch(length, batch=1, length=length)["input_ids"][0] for length in (5, 40)]
    found = {}
    for side in ("right", "left"):
        ids = pad_sequence(rows, batch_first=True, padding_side=side)
        mask = ids.ne(0).long()
        # A first real token has no label: under left padding a pad token would predict it.
        labels = ids.masked_fill(mask.cumsum(1) <= 1, -100).masked_fill(mask == 0, -100)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        targets = find_targets(model)
        scores = stream_scores(model, [batch], targets, MEASURES["gradient"], memory_budget=2**28, progress=False)
        found[side] = torch.cat([part for _, _, part in scores])
        values = sparsify(model, random_masks(model, density=0.1))
        loss = model(**batch).loss
        loss.backward()
        assert loss.isfinite() and all(value.grad.isfinite().all() for value in values)
        desparsify(model)
    assert found["right"].isfinite().all()
    torch.testing.assert_close(found["left"], found["right"], rtol=1e-4, atol=1e-5 * found["right"].max().item())


def test_tied_embeddings_are_one_weight_with_the_gradient_of_both_uses():
    model, batches = tiny_model("qwen2"), ragged_batches()
    name = "model.embed_tokens.weight"
    for salience in ("gradient", "fisher", "grasp"):
        masks = select_masks(model, batches, salience=salience, density=0.1, targets=["embed_tokens"], progress=False)
        assert list(masks) == [name]
        assert_selects(masks, dense_scores(model, [name], batches, salience), "local", 0.1)


def test_norms_biases_and_embeddings_can_be_targets():
    model, batches = tiny_model("gpt2"), ragged_batches()
    names = ["transformer.wpe.weight", "transformer.h.0.ln_1.weight", "transformer.h.1.mlp.c_fc.bias"]
    for salience in LABELLED:
        masks = select_masks(
            model, batches, salience=salience, density=0.5, targets=lambda n, p: n in names, progress=False
        )
        assert set(masks) == set(names)
        assert_selects(masks, dense_scores(model, names, batches, salience), "local", 0.5)


class OneUnit(nn.Module):
    """One linear unit whose loss is its output, so that the gradient of an example is its input."""

    def __init__(self):
        super().__init__()
        self.unit = nn.Linear(2, 1, bias=False)

    def forward(self, x, labels):
        return {"loss": self.unit(x).mean()}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_fisher_is_the_mean_of_squares_and_not_the_square_of_the_mean(size):
    x = torch.tensor([[1.0, 0.5], [-1.0, 0.5], [1.0, 0.5], [-1.0, 0.5]])
    batches = [{"x": part, "labels": torch.ones(len(part), dtype=torch.long)} for part in x.split(size)]
    targets = find_targets(model := OneUnit(), ["unit"])
    (group,) = cut_into_groups(targets.values(), 2**20, 8)
    fill = _FILLS["squared_gradient"]
    fill(model, BatchReader(batches, torch.device("cpu"), _Bar()), group, None)
    assert group[0].accumulator.tolist() == [[1.0, 0.25]]


class _Bar:
    def update(self):
        pass


def test_fisher_needs_one_backward_per_batch_for_linear_weights():
    model, batches = tiny_model("llama"), ragged_batches(3)
    passes = []
    hook = model.lm_head.register_full_backward_hook(lambda *_: passes.append(1))
    select_masks(model, batches, salience="fisher", density=0.1, progress=False)
    hook.remove()
    assert len(passes) == 3


def _dense_fisher(model, names, batch):
    """Sum over examples of the squared gradient of each one's own loss, by name."""
    total = dict.fromkeys(names, 0)
    for row in range(len(batch["labels"])):
        gradients = dense_gradients(model, names, [{key: value[row : row + 1] for key, value in batch.items()}])
        total = {name: total[name] + gradients[name][1].detach().square() for name in names}
    return total


@pytest.mark.parametrize("shifted", [False, True])
def test_example_losses_are_right_where_shifted_and_unshifted_labels_give_nearly_the_same(shifted):
    """As with a new classifier, whose logits are almost uniform; where nothing tells them apart there is no answer."""
    answers = 0
    for seed in range(40):
        torch.manual_seed(seed)
        logits, labels = 0.1 * torch.randn(16, 64, 9), torch.randint(9, (16, 64))
        placed = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:] if shifted else labels
        each = nn.functional.cross_entropy(logits.transpose(1, 2), placed, reduction="none")
        found = example_losses(logits, labels, each.sum() / (placed != -100).sum())
        if found is not None:
            answers += 1
            torch.testing.assert_close(found[0], each.sum(1) / (placed != -100).sum(1))
        # In bf16 the model's loss says less than what lies between the two.
        rounded = example_losses(logits, labels, (each.sum() / (placed != -100).sum()).bfloat16())
        assert rounded is None
    assert answers >= 36


@pytest.mark.parametrize("seed", [0, 4])
def test_fisher_of_a_new_token_classifier_equals_a_dense_computation(seed):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    model = BertForTokenClassification(BertConfig(vocab_size=61, num_labels=9, **sizes)).eval()
    ids, labels = torch.randint(1, 61, (16, 256)), torch.randint(9, (16, 256))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    masks = select_masks(model, [batch], salience="fisher", density=0.1, progress=False)
    assert_selects(masks, _dense_fisher(model, list(masks), batch), "local", 0.1)


@pytest.mark.parametrize("loss", [None, lambda model, batch: model(**batch).loss])
def test_fisher_counts_an_example_of_an_unshifted_loss_with_no_label_but_the_first(loss):
    model, batch = tiny_model("bert"), token_batch(0)
    ids, labels = batch["input_ids"], torch.full_like(batch["labels"], -100)
    labels[:, 0] = ids[:, 0]
    labels[0, 3] = ids[0, 3]
    batch["labels"] = labels
    masks = select_masks(model, [batch], salience="fisher", density=0.1, loss=loss, progress=False)
    assert_selects(masks, _dense_fisher(model, list(masks), batch), "local", 0.1)


def test_fisher_leaves_out_an_example_of_a_shifted_loss_with_no_label_but_the_first():
    model, batch = tiny_model("llama"), token_batch(0, batch=3)
    batch["labels"][1] = -100
    batch["labels"][1, 0] = batch["input_ids"][1, 0]
    some = {key: value[[0, 2]] for key, value in batch.items()}
    choose = dict(salience="fisher", density=0.1, progress=False)
    for loss in (None, lambda model, batch: model(**batch).loss):
        assert select_masks(model, [batch], loss=loss, **choose).overlap(select_masks(model, [some], **choose)) > 0.99
    batch["labels"] = torch.where(torch.arange(batch["labels"].shape[1]) == 0, batch["input_ids"], -100)
    with pytest.raises(ValueError, match="No example of the calibration batches has a label"):
        select_masks(model, [batch], loss=lambda model, batch: model(**batch).loss, **choose)


@pytest.mark.parametrize("shape", [(4, 1), (4,)])
def test_fisher_of_a_regression_with_one_label_an_example(shape):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    model = BertForSequenceClassification(BertConfig(vocab_size=61, num_labels=1, **sizes)).eval()
    batch = {"input_ids": torch.randint(1, 61, (4, 8)), "labels": torch.randn(shape)}
    masks = select_masks(model, [batch], salience="fisher", density=0.1, progress=False)
    assert_selects(masks, _dense_fisher(model, list(masks), batch), "local", 0.1)


@pytest.mark.parametrize("attention, warnings", [("sdpa", 1), ("eager", 0)])
def test_grasp_warns_once_that_attention_runs_plain(attention, warnings, caplog):
    model = tiny_model("llama", attn_implementation=attention)
    # Several groups, of which each has its pass.
    select_masks(model, ragged_batches(1), salience="grasp", density=0.1, memory_budget=20_000, progress=False)
    messages = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(messages) == warnings and all("runs plain attention instead of sdpa" in message for message in messages)


def test_hessian_gradient_equals_torch_hvp():
    model, batches = tiny_model("llama"), ragged_batches(2)
    targets = find_targets(model)
    names = list(targets)

    def loss(*weights):
        weights = dict(zip(names, weights, strict=True))
        outputs = [torch.func.functional_call(model, weights, kwargs=batch) for batch in batches]
        return sum(output.loss for output in outputs) / len(batches)

    model.set_attn_implementation("eager")
    weights = tuple(model.get_parameter(name).detach() for name in names)
    gradient = torch.autograd.functional.vjp(loss, weights)[1]
    _, expected = torch.autograd.functional.hvp(loss, weights, gradient)
    scores = {n: -(h * w) for n, h, w in zip(names, expected, weights, strict=True)}
    masks = select_masks(model, batches, salience="grasp", density=0.2, scope="global", progress=False)
    assert_selects(masks, scores, "global", 0.2)


@pytest.mark.parametrize(
    "weights, autocast, kept",
    [
        (torch.float32, None, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float16, torch.float32),
    ],
)
def test_gradients_are_kept_in_the_dtype_that_layers_use_them_in(weights, autocast, kept, monkeypatch):
    """At half the memory and with the same masks as in fp32."""
    model, batches = tiny_model("llama", weights), ragged_batches(2)
    targets = find_targets(model)
    entries = sum(target.shape.numel() for target in targets.values())
    choose = dict(salience="grasp", density=0.1, scope="global", progress=False)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        with GradientStore(targets, kept.itemsize * entries) as store:
            assert store.memory_bytes == kept.itemsize * entries
        with GradientStore(targets, kept.itemsize * entries - 1) as store:
            assert store.memory_bytes == 0
        masks = select_masks(model, batches, **choose)
        assert select_masks(model, batches, memory_budget=20_000, **choose) == masks
        monkeypatch.setattr("speft_optim.salience.grasp._dtype_of_use", lambda targets: torch.float32)
        assert select_masks(model, batches, **choose) == masks


class _NormOfFlow(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return x / x.detach().square().mean(-1, keepdim=True).sqrt() * self.weight.abs()


def dense_flow(model):
    """abs(w dR/dw) by autograd on a copy that is linearised by replacing its modules, in fp64."""
    model = copy.deepcopy(model).double().requires_grad_(True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    for path, module in list(model.named_modules()):
        replacement = None
        if type(module).__name__ == "LlamaRMSNorm":
            replacement = _NormOfFlow(module.weight)
        elif path.endswith("act_fn"):
            replacement = nn.Identity()
        if replacement is not None:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, replacement)
    ones = torch.ones(1, 1, model.config.hidden_size, dtype=torch.float64)
    model(inputs_embeds=ones, use_cache=False).logits.sum().backward()
    zero = torch.zeros(())
    return {n: (p * (zero if p.grad is None else p.grad)).abs().detach() for n, p in model.named_parameters()}


def test_synflow_equals_autograd_on_a_linearised_copy():
    model = tiny_model("llama")
    targets = lambda name, parameter: "proj" in name or "lm_head" in name  # noqa: E731
    masks = select_masks(model, salience="synflow", density=0.1, scope="global", targets=targets, progress=False)
    scores = dense_flow(model)
    assert_selects(masks, {name: scores[name] for name in masks}, "global", 0.1)


def test_synflow_neither_overflows_nor_vanishes_in_a_deep_bf16_model():
    model = tiny_model("llama", torch.bfloat16, num_hidden_layers=32, hidden_size=64, intermediate_size=128)
    masks = select_masks(model, salience="synflow", density=0.05, scope="global", progress=False)
    scores = dense_flow(model)
    assert all(bool(torch.isfinite(score).all()) for score in scores.values())
    assert_selects(masks, {name: scores[name] for name in masks}, "global", 0.05)


def test_synflow_leaves_forward_methods_and_weights_alone_even_after_an_error():
    model = tiny_model("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def fail(*_):
        raise RuntimeError("stop")

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        select_masks(model, salience="synflow", density=0.1, progress=False)
    hook.remove()
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_activation_is_weight_times_input_norm_of_real_tokens(kind):
    model, batches = tiny_model(kind), ragged_batches()
    unlabelled = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
    squares = {}

    def note(path, transposed):
        def hook(module, args, output):
            x = args[0][batch["attention_mask"].bool()]
            norm = x.square().sum(0)
            squares[path] = squares.get(path, 0) + (norm[:, None] if transposed else norm[None])

        return hook

    targets = find_targets(model)
    for name in targets:
        path = name.removesuffix(".weight")
        model.get_submodule(path).register_forward_hook(note(path, kind == "gpt2"))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    weights = dict(model.named_parameters())
    scores = {n: weights[n].detach().abs() * squares[n.removesuffix(".weight")].sqrt() for n in targets}
    for module in model.modules():
        module._forward_hooks.clear()
    masks = select_masks(model, unlabelled, salience="activation", density=0.1, scope="global", progress=False)
    assert_selects(masks, scores, "global", 0.1)


def test_activation_refuses_weights_without_input_features():
    with pytest.raises(ValueError, match="needs linear weights, unlike model.embed_tokens.weight"):
        select_masks(tiny_model(), ragged_batches(), salience="activation", density=0.1, targets=["embed_tokens"])


def test_bf16_gradients_are_accumulated_in_fp32():
    model = tiny_model("llama", torch.bfloat16)
    batches = [token_batch(0)] * 300
    masks = select_masks(model, batches, density=0.1, progress=False)
    assert masks == select_masks(model, batches[:1], density=0.1, progress=False)


def test_passes_over_the_data_are_those_promised():
    class Counted(list):
        passes = 0

        def __iter__(self):
            self.passes += 1
            return super().__iter__()

    model = tiny_model("llama")
    one_layer = 4 * sum(p.numel() for p in model.model.layers[0].parameters() if p.dim() == 2)
    for salience, budget, passes in [
        ("magnitude", 2**30, 0),
        ("random", 2**30, 0),
        ("synflow", 2**30, 0),
        ("gradient", 2**30, 1),
        ("gradient", 2 * one_layer, 2),
        # Accumulators that take 0.7 of the budget, at 4 or 8 bytes an entry, or 1.2 of it.
        ("gradient", int(2 * one_layer / 0.7), 1),
        ("fisher", int(4 * one_layer / 0.7), 1),
        ("gradient", int(one_layer / 0.6), 2),
        ("fisher", 2**30, 1),
        ("grasp", 2**30, 2),
        # Half of it are the gradients; what they leave takes accumulators of 4 bytes at once, but not those of 8.
        ("grasp", int(4 * one_layer / 0.7), 3),
        ("activation", 1, 1),
    ]:
        batches = Counted(ragged_batches())
        select_masks(model, batches, salience=salience, density=0.1, memory_budget=budget, progress=False)
        assert batches.passes == passes, (salience, budget)


def test_backward_stops_below_the_lowest_weight_of_the_group():
    model = tiny_model("llama", num_hidden_layers=3)
    reached = []

    def note(number):
        def hook(module, args, output):
            if output.requires_grad:
                output.register_hook(lambda gradient: reached.append(number))

        return hook

    for number, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.register_forward_hook(note(number))
    select_masks(model, ragged_batches(1), density=0.1, targets=["layers.2.mlp.up_proj"], progress=False)
    assert reached == [2]


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in [out] if isinstance(out, torch.Tensor) else torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                # What maps a file is on disk.
                on_disk = function is torch.ops.aten.from_file.default
                self._note(tensor.untyped_storage(), on_disk)
        return out

    def _note(self, storage, on_disk):
        key = storage._cdata
        if key in self.known:
            return
        size = 0 if on_disk else storage.nbytes()
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key, size):
        self.known.discard(key)
        self.live -= size


def peak_bytes(work):
    with LiveBytes() as meter:
        work()
    return meter.peak


@pytest.mark.parametrize(
    "salience, dtype, scope, density",
    [
        *(
            (salience, torch.float32, scope, density)
            for salience in ("gradient", "taylor_fo", "fisher", "grasp", "synflow")
            for scope, density in (("global", 0.01), ("global", 0.09), ("local", 0.09))
            # Of grasp, which takes longest, the entries of 16 bits below.
            if (salience, scope, density) != ("grasp", "global", 0.09)
        ),
        ("grasp", torch.bfloat16, "global", 0.09),
    ],
)
def test_estimation_stays_within_the_memory_budget(salience, dtype, scope, density):
    """Unless the candidates, some bytes an entry kept, leave less than a quarter of it for all else; grasp a half."""
    model = tiny_model("llama", dtype, num_hidden_layers=4, hidden_size=128, intermediate_size=256)
    batches = [token_batch(0, batch=1, length=2)]
    targets = find_targets(model)
    entries = sum(target.shape.numel() for target in targets.values())
    layer = 4 * entries // len(model.model.layers)
    choose = dict(salience=salience, density=density, scope=scope, progress=False)
    # Of the largest weight and of the finished masks, or of all weights.
    candidate = 14 if salience == "taylor_fo" else 10
    largest = max(target.shape.numel() for target in targets.values())
    candidates = density * (candidate * entries if scope == "global" else candidate * largest + 4 * entries)

    def one_batch():
        """What a pass costs without any accumulator: the batch's activations and one dense gradient at a time."""
        first = next(iter(targets)).removesuffix(".weight")
        choose = dict(salience=salience, budget=1, targets=[first], memory_budget=layer, progress=False)
        select_masks(model, batches, **choose)

    batch_bytes = peak_bytes(one_batch)
    # A part of H g waits for the other as a whole weight, also where a group has only some rows of it.
    share = 2 if salience == "grasp" else 4
    masks = []
    for budget in (layer, 4 * layer, 16 * layer):
        peak = peak_bytes(
            lambda budget=budget: masks.append(select_masks(model, batches, memory_budget=budget, **choose))
        )
        assert peak <= batch_bytes + max(budget, candidates + budget // share), (budget, peak, batch_bytes)
    assert all(mask == masks[0] for mask in masks)


# --- The table of measures, and functions in its place ---


@pytest.mark.parametrize("salience", MEASURES)
def test_a_row_of_the_table_tells_name_width_of_scores_and_passes(salience):
    measure, passes = MEASURES[salience], []

    class Counted(list):
        def __iter__(self):
            passes.append(1)
            return super().__iter__()

    assert measure_of(salience) is measure and measure.name == salience
    statistic = torch.zeros(1, dtype=torch.float64 if salience == "random" else torch.float32)
    assert measure.score(torch.zeros(1), statistic).element_size() == measure.score_bytes
    select_masks(tiny_model("llama"), Counted(ragged_batches(1)), salience=salience, density=0.1, progress=False)
    assert len(passes) == measure.passes


def signed_product(weight, gradient):
    """What `force` ranks by."""
    return -weight * gradient


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("options", [{}, {"memory_budget": 30_000}, {"offload": "cpu"}], ids=str)
def test_a_function_in_place_of_a_measure_gets_weights_and_signed_gradients(scope, options):
    model, batches = tiny_model("llama"), ragged_batches()
    choose = dict(density=0.1, scope=scope, progress=False, **options)
    assert select_masks(model, batches, salience=signed_product, **choose) == select_masks(
        model, batches, salience="force", **choose
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_function_gets_fp32_runs_that_it_may_change_and_scores_of_any_floating_dtype_count(dtype):
    model, batches = tiny_model("llama", dtype), ragged_batches()
    before = {name: part.clone() for name, part in model.state_dict().items()}
    seen = []

    def halves(weight, gradient):
        seen.append((weight.dtype, gradient.dtype, weight.shape == gradient.shape, torch.is_grad_enabled()))
        return weight.mul_(0.0).add_(gradient.abs() > 1e-3).half()

    masks = select_masks(model, batches, salience=halves, density=0.05, progress=False)
    assert set(seen) == {(torch.float32, torch.float32, True, False)}
    assert all(torch.equal(part, before[name]) for name, part in model.state_dict().items())
    scores = {name: (g.abs() > 1e-3).float() for name, (_, g) in dense_gradients(model, masks, batches).items()}
    kept = sum(scores[name].flatten()[mask.indices.long()].sum() for name, mask in masks.items())
    possible = sum(min(int(scores[name].sum()), len(mask)) for name, mask in masks.items())
    assert possible > 0 and abs(int(kept) - possible) <= 0.05 * possible


def test_random_draws_are_uniform_and_independent_of_the_cut():
    whole = random_draws("a.weight", 0, 100_000, 3, torch.device("cpu"))
    parts = [random_draws("a.weight", start, 1_000, 3, torch.device("cpu")) for start in range(0, 100_000, 1_000)]
    assert torch.equal(whole, torch.cat(parts))
    assert abs(float(whole.mean()) - 0.5) < 5e-3 and abs(float(whole.var()) - 1 / 12) < 2e-3
    other = random_draws("b.weight", 0, 100_000, 3, torch.device("cpu"))
    assert abs(float(torch.corrcoef(torch.stack([whole, other]))[0, 1])) < 0.02


@pytest.mark.parametrize("salience", ["gradient", "fisher", "grasp"])
def test_a_loss_without_a_graph_is_refused(salience):
    """All gradients would be zero, and the mask that of the first positions."""

    def detached(model, batch):
        return model(**batch).loss.detach()

    with pytest.raises(ValueError, match="detached"):
        select_masks(tiny_model(), ragged_batches(1), salience=salience, density=0.1, loss=detached, progress=False)
