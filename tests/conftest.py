"""Tiny models of every architecture, batches for them, the reference optimizer, and one table of tolerances."""

import contextlib
import copy
import functools
import gc
import itertools
import multiprocessing
from importlib.metadata import version
from importlib.util import find_spec
from typing import NamedTuple

import pytest
import torch
from packaging.version import Version
from torch import nn

from speft_optim import Mask, Masks, SparseAdamW, select_masks, sparsify
from speft_optim.offload.prefetch import Prefetcher
from speft_optim.weights.attached import sparse_weights

TOLERANCE = {
    torch.float64: dict(rtol=1e-10, atol=1e-12),
    torch.float32: dict(rtol=1e-5, atol=1e-7),
    torch.bfloat16: dict(rtol=2e-2, atol=1e-3),
}

# Its last is where tiny models and batches are made: in a process that has a GPU of its own, there.
DEVICE = [torch.device("cpu")]

VOCABULARY = 61
OPTIONS = dict(lr=1e-2, weight_decay=0.1)
# Packages that some tests need and a machine may lack; what the library itself needs is not among them.
OPTIONAL = "accelerate bitsandbytes datasets gguf hypothesis lightning lm_eval matplotlib peft transformers trl".split()


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Skip a file, with the reason, where it imports an optional package that is not installed."""
    report = yield
    if report.failed:
        text = str(report.longrepr)
        missing = [name for name in OPTIONAL if f"No module named '{name}'" in text and not find_spec(name)]
        if missing:
            report.outcome, report.longrepr = "skipped", (str(collector.path), None, f"Skipped: needs {missing[0]}")
            vars(report).pop("call", None)
    return report


def pytest_collection_modifyitems(items):
    """Files with slow tests first: of two processes the one that came to them last would keep the other waiting."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_configure(config):
    config.addinivalue_line("markers", "whole_pictures: what is drawn has its axes and its size")


@pytest.fixture
def quick_pictures(request, monkeypatch):
    """Draw curves and areas at a tenth of the size, without axes: labels take more than half of a tiny model's job."""
    if request.node.get_closest_marker("whole_pictures") or not find_spec("matplotlib"):
        return
    from matplotlib.figure import Figure

    save = Figure.savefig

    def save_quickly(self, *arguments, **options):
        self.set_layout_engine("none")
        for axes in self.axes:
            axes.set_axis_off()
        save(self, *arguments, **{**options, "dpi": 12})

    monkeypatch.setattr(Figure, "savefig", save_quickly)


def skip_before(package, lowest, reason):
    """Mark of a test, or of one of its cases, that asks more of a package than the library does."""
    older = find_spec(package) is not None and Version(version(package)) < Version(lowest)
    return pytest.mark.skipif(older, reason=f"{package} before {lowest} {reason}")


class _ClosedOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, take):
        ctx.take = take
        ctx.save_for_backward(x)
        return x.detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient + ctx.take(*ctx.saved_tensors), None


@functools.cache
def compiles_nodes():
    """Whether torch compiles a custom autograd node whose backward reads other tensors than those it saved."""
    starts, columns = torch.tensor([0, 2, 5]), torch.arange(5)

    def take(saved):
        return saved.flatten().index_select(0, columns).sum() * starts.diff().sum()

    def run(x):
        return _ClosedOver.apply(2 * x, take).sum()

    torch._dynamo.reset()
    try:
        torch.compile(run, backend="aot_eager", dynamic=True)(torch.ones(3, 4, requires_grad=True)).backward()
    except (torch._dynamo.exc.TorchDynamoException, AttributeError, TypeError):
        return False
    finally:
        torch._dynamo.reset()
    return True


class _Noted(nn.Module):
    def forward(self, x):
        self.__dict__.setdefault("noted", []).append(None)
        return x + 1


@functools.cache
def traces_attributes():
    """Whether torch's compiler traces `setdefault` on a module's attributes, rather than to break the graph there."""
    torch._dynamo.reset()
    try:
        torch.compile(_Noted(), backend="eager", fullgraph=True)(torch.ones(1))
    except torch._dynamo.exc.TorchDynamoException:
        return False
    finally:
        torch._dynamo.reset()
    return True


def skip_unless_nodes_compile():
    """Skip a test that trains a compiled model where torch's compiler has the fault that `compiles_nodes` tries for."""
    if not compiles_nodes():
        pytest.skip(f"torch {version('torch')} mixes up what the backward of a custom node reads, if sizes are open")


restacks = skip_before("transformers", "5", "stacks no experts, and has few models whose files name weights otherwise")


@pytest.fixture(scope="module")
def failures_on_gpus(request, tmp_path_factory):
    """What went wrong in the test module's `SCENARIOS` in two processes with a GPU each."""
    from processes import failures_of

    return failures_of(request.module.SCENARIOS, tmp_path_factory.mktemp("gpus"), "spawn", kind="cuda")


def device():
    """Where tiny models and batches are made."""
    return DEVICE[-1]


def is_on_gpu():
    """Whether that is a GPU."""
    return device().type == "cuda"


def assert_close(actual, expected, **overrides):
    """Compare with the tolerance of the actual dtype, in fp64."""
    tolerance = {**TOLERANCE[actual.dtype], **overrides}
    if is_on_gpu():
        # Sums have another order for each shape there. Up to 1e-4 tolerances are a hundred times those of the CPU.
        tolerance = {key: max(limit, min(100 * limit, 1e-4)) for key, limit in tolerance.items()}
    torch.testing.assert_close(actual.double(), expected.double(), **tolerance)


def assert_same_masks(masks, expected):
    """Those of another run; on a GPU the order of sums may decide between the last entries, of nearly equal scores."""
    overlap = masks.overlap(expected)
    assert overlap > 0.98 if is_on_gpu() else masks == expected, overlap


def tiny_model(kind="llama", dtype=torch.float32, seed=0, **config):
    """A random model with two layers of the named architecture."""
    import transformers as tf

    sizes = dict(vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, num_attention_heads=4)
    decoder = dict(**sizes, intermediate_size=40, num_key_value_heads=2, max_position_embeddings=64)
    torch.manual_seed(seed)
    if kind == "llama":
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**{**decoder, "tie_word_embeddings": False, **config}))
    elif kind == "qwen2":
        model = tf.Qwen2ForCausalLM(tf.Qwen2Config(**{**decoder, "tie_word_embeddings": True, **config}))
    elif kind == "gemma2":
        extra = dict(head_dim=6, query_pre_attn_scalar=6, sliding_window=16, attn_implementation="eager")
        model = tf.Gemma2ForCausalLM(tf.Gemma2Config(**{**decoder, **extra, **config}))
    elif kind == "gpt2":
        extra = dict(
            vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, n_embd=24, n_layer=2, n_head=4, n_positions=64
        )
        model = tf.GPT2LMHeadModel(tf.GPT2Config(**{**extra, **config}))
    elif kind == "opt":
        extra = dict(ffn_dim=40, max_position_embeddings=64, word_embed_proj_dim=24)
        model = tf.OPTForCausalLM(tf.OPTConfig(**{**sizes, **extra, **config}))
    elif kind == "bert":
        extra = dict(intermediate_size=40, max_position_embeddings=64)
        model = tf.BertForMaskedLM(tf.BertConfig(**{**sizes, **extra, **config}))
    elif kind == "mixtral":
        extra = dict(num_local_experts=3, num_experts_per_tok=2)
        model = tf.MixtralForCausalLM(tf.MixtralConfig(**{**decoder, **extra, **config}))
    else:
        raise ValueError(kind)
    return model.to(device(), dtype).eval()


def token_batch(seed=0, batch=3, length=9, ragged=False, side="right"):
    """A batch of random tokens; ragged ones are padded and their padding carries no label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if ragged:
        for row in range(batch):
            cut = length - 1 - 2 * row
            mask[row, cut:] = 0
        if side == "left":
            order = mask.argsort(dim=1, stable=True)
            ids, mask = ids.gather(1, order), mask.gather(1, order)
    # A first real token has no label: under left padding a pad token would predict it.
    first = mask.cumsum(1) == 1
    labels = torch.where(mask.bool() & ~first, ids, -100)
    made = {"input_ids": torch.where(mask.bool(), ids, 0), "attention_mask": mask, "labels": labels}
    return {key: part.to(device()) for key, part in made.items()}


def draw(*shape, dtype=torch.float32, seed=0):
    """Normally distributed numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def every(name, parameter):
    """Targets: all weights that may have a mask."""
    return True


def random_masks(model, targets=None, density=0.2, seed=0, **options):
    """Masks of a random share of the entries of each target."""
    choose = dict(salience="random", density=density, targets=targets, seed=seed, progress=False)
    return select_masks(model, **choose, **options)


def take_a_step(model):
    values = [weight.values for weight in sparse_weights(model)]
    model(**token_batch(1)).loss.backward()
    SparseAdamW(values, lr=0.1).step()


def take_a_fused_step(model):
    """Its kernel writes without a version."""
    values = [weight.values for weight in sparse_weights(model)]
    model(**token_batch(1)).loss.backward()
    torch.optim.AdamW(values, lr=0.1, fused=True).step()


def load_values(model):
    for weight in sparse_weights(model):
        weight.base.put(weight.mask, weight.values.detach() * 0.9)


@torch.no_grad()
def swap_values_in(model):
    for weight in sparse_weights(model):
        weight.values.data.copy_(weight.values * 0.9)


def move_masks(model):
    for weight, mask in zip(sparse_weights(model), random_masks(model, seed=3).values(), strict=True):
        weight.change_mask(weight.compare(mask))


# What may happen to the values of a sparsified model between a forward and its backward.
CHANGES_OF_VALUES = [take_a_step, take_a_fused_step, load_values, swap_values_in, move_masks]


def some_entries(model, names, share=0.4):
    """Masks of a share of the entries of each weight of `names`, of whatever kind it is."""
    masks = Masks()
    for name in names:
        shape = model.get_parameter(name).shape
        order = torch.randperm(shape.numel(), generator=torch.Generator().manual_seed(len(name)))
        masks[name] = Mask(order[: max(1, round(share * shape.numel()))], shape)
    return masks


class Setup(NamedTuple):
    """A model with random masks attached, and the optimizer of its values."""

    model: nn.Module
    masks: Masks
    values: list[nn.Parameter]
    optimizer: SparseAdamW


def attach(model="llama", dtype=torch.float32, targets=None, density=0.2, **options):
    """Sparsify a model, or the tiny one of a kind, on random masks; `options` go to the optimizer."""
    model = tiny_model(model, dtype) if isinstance(model, str) else model
    masks = random_masks(model, targets, density)
    values = sparsify(model, masks)
    return Setup(model, masks, values, SparseAdamW(values, **{**OPTIONS, **options}))


def attach_with_reference(kind="llama", dtype=torch.float32, targets=None, density=0.05):
    """What `attach` gives of a tiny model, and REF on a copy of that model."""
    setup = attach(kind, dtype, targets, density)
    return *setup, Reference(tiny_model(kind, dtype), setup.masks, **OPTIONS)


def train(model, optimizer, steps=2, first=0, parts=1, period=2**31):
    """Take steps of `parts` micro-batches on the batches from `first` on, repeated after `period`; return losses."""
    losses = []
    for step in range(first, first + steps):
        for part in range(parts):
            loss = model(**token_batch((parts * step + part) % period)).loss
            (loss / parts).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def fine_tune(model, steps=2, density=0.2, lr=1e-2, seed=0, first=0):
    """Train a model on random masks, and return it sparsified."""
    masks = random_masks(model, density=density, seed=seed)
    train(model, SparseAdamW(sparsify(model, masks), lr=lr), steps, first)
    return model


def product_flops(call):
    """Floating-point operations of the matrix products that `call` forms."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def masks_of(model):
    """The masks of a sparsified model."""
    from speft_optim.weights.attached import sparse_weights

    return Masks({weight.name: weight.mask for weight in sparse_weights(model)})


def weights_of(model):
    """A copy of all that a model's state dict holds."""
    return {name: part.detach().clone() for name, part in model.state_dict().items()}


def equal_states(left, right):
    """Whether two state dicts, however nested, are equal bit for bit."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal_states(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal_states, left, right))
    return type(left) is type(right) and left == right


# A process forked from one that has imported the large libraries starts at once, and has no state of the tests in it.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "bitsandbytes", "transformers.trainer", "transformers.models.llama"])


def run_apart(function, *arguments, count=1, seconds=240):
    """Call `function(rank, *arguments)` in `count` new processes; return their exit codes, negative for signals."""
    running = [PROCESSES.Process(target=function, args=(rank, *arguments)) for rank in range(count)]
    for process in running:
        process.start()
    for process in running:
        process.join(seconds)
        process.kill()
        process.join()
    return [process.exitcode for process in running]


def live_tensors(among=()):
    """One tensor for each storage alive, by its address; holding them keeps addresses from being used again."""
    gc.collect()
    found = {}
    for thing in itertools.chain(among, gc.get_objects()):
        if issubclass(type(thing), torch.Tensor):
            # What a compiler has traced, here or in another test, has no data behind it, and all of it one address.
            with contextlib.suppress(RuntimeError):
                if address := storage_of(thing).data_ptr():
                    found[address] = thing
    return found


def storage_of(tensor):
    """The storage of a tensor, which does not notice: a weight in host memory would catch up with its values."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.untyped_storage()


class BytesSince:
    """Counts bytes of tensors that were not there when it was made.

    Those it keeps alive: what other tests left behind may die at any time.
    """

    def __init__(self):
        # What another of these froze and did not give free yet is not new.
        gc.unfreeze()
        self.before = live_tensors()
        # Frozen objects are left out of later walks, which take a second each through all that is imported.
        gc.freeze()

    def __del__(self):
        gc.unfreeze()

    def __call__(self):
        found = live_tensors(self.before.values())
        new = (tensor for address, tensor in found.items() if address not in self.before)
        return sum(storage_of(tensor).nbytes() for tensor in new if not tensor.is_meta)


class Reference:
    """REF: dense fp32 AdamW fed `mask * grad`, entries outside the mask put back after each step."""

    def __init__(self, model: nn.Module, masks: Masks, optimizer=torch.optim.AdamW, **options):
        self.model = copy.deepcopy(model)
        self.parameters = {name: p for name, p in self.model.named_parameters() if name in masks}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in masks)
        self.start = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.dense = {name: self._dense(masks[name]) for name in self.parameters}
        self.optimizer = optimizer(self.parameters.values(), **options)

    @staticmethod
    def _dense(mask):
        dense = torch.zeros(mask.shape.numel(), dtype=torch.bool, device=device())
        dense[mask.indices.long().to(device())] = True
        return dense.view(mask.shape)

    def mask_gradients(self):
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                parameter.grad *= self.dense[name]

    def step(self, clip=None):
        self.mask_gradients()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), clip) if clip else None
        self.optimizer.step()
        self.put_back()
        self.optimizer.zero_grad()
        return norm

    @torch.no_grad()
    def put_back(self):
        for name, parameter in self.parameters.items():
            parameter.copy_(torch.where(self.dense[name], parameter, self.start[name]))

    def stand_alone(self):
        """Mask gradients as they come and put entries back after each step, so that any script can train it."""
        for name, parameter in self.parameters.items():
            parameter.register_hook(lambda gradient, inside=self.dense[name]: gradient * inside)
        self.optimizer.register_step_post_hook(lambda *_: self.put_back())

    def assert_agrees(self, model, optimizer, values):
        """Weights, values and both moments agree inside the masks; outside, weights are bit-identical to the start."""
        from speft_optim.weights.compact_values import linked

        for parameter in values:
            weight = linked(parameter)
            name, inside = weight.name, self.dense[weight.name]
            expected = self.parameters[name]
            assert_close(parameter.detach(), expected[inside])
            actual = dict(model.named_parameters())[name].detach()
            assert_close(actual[inside], expected[inside])
            assert torch.equal(actual[~inside], self.start[name][~inside])
            if optimizer is not None:
                for key in ("exp_avg", "exp_avg_sq"):
                    scale = self.optimizer.state[expected][key].abs().max().item()
                    assert_close(
                        optimizer.state[parameter][key],
                        self.optimizer.state[expected][key][inside],
                        atol=1e-5 * scale + 1e-12,
                    )


@pytest.fixture
def llama():
    return tiny_model("llama")


@pytest.fixture
def batches():
    return [token_batch(seed) for seed in range(4)]


def moved_blocks(monkeypatch):
    """A list of the numbers of blocks that are copied to the device from now on."""
    moved, fill = [], Prefetcher._fill

    def note(prefetcher, buffer, block, states):
        moved.append(block)
        fill(prefetcher, buffer, block, states)

    monkeypatch.setattr(Prefetcher, "_fill", note)
    return moved
