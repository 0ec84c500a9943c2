"""Streaming blocks through a device gives the masks of a resident model, from memory and from a checkpoint on disk."""

import contextlib
import os
from types import SimpleNamespace

import pytest
import torch
from conftest import moved_blocks, tiny_model, token_batch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from speft_optim import select_masks, sparsify
from speft_optim.offload.engine import streaming
from speft_optim.offload.host_memory import available_bytes
from speft_optim.offload.pages import PageCopies, copy_pages_, lock_pages
from speft_optim.salience.measures import MEASURES

STREAMED = sorted(name for name, measure in MEASURES.items() if not measure.differentiates_twice)


def batches():
    return [token_batch(seed, ragged=True) for seed in range(3)]


def on_meta(model, folder, max_shard_size="100MB"):
    """The model's checkpoint in `folder`, and its twin on the meta device with buffers in memory."""
    from accelerate import init_empty_weights

    model.save_pretrained(folder, max_shard_size=max_shard_size)
    with init_empty_weights(include_buffers=False):
        twin = type(model)(model.config)
    twin.tie_weights()
    assert all(parameter.is_meta for parameter in twin.parameters())
    return twin.eval()


def state(model):
    hooks = [len(getattr(m, kind)) for m in model.modules() for kind in ("_forward_hooks", "_forward_pre_hooks")]
    return hooks, [sorted(m.__dict__) for m in model.modules()], [id(p) for p in model.parameters()]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gpt2"])
@pytest.mark.parametrize("salience", STREAMED)
def test_masks_equal_those_of_a_resident_model(kind, salience):
    model = tiny_model(kind)
    before = state(model)
    choose = dict(salience=salience, density=0.1, scope="global", progress=False)
    resident = select_masks(model, batches(), **choose)
    assert select_masks(model, batches(), offload="cpu", **choose) == resident
    assert select_masks(model, batches(), offload="cpu", memory_budget=20_000, **choose) == resident
    assert state(model) == before


@pytest.mark.parametrize("salience", ["magnitude", "gradient", "fisher", "synflow", "activation"])
def test_weights_can_be_read_from_a_sharded_checkpoint(tmp_path, salience):
    model = tiny_model("qwen2", torch.bfloat16)
    twin = on_meta(model, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    choose = dict(salience=salience, density=0.1, progress=False)
    resident = select_masks(model, batches(), **choose)
    assert select_masks(twin.bfloat16(), batches(), offload="cpu", base=tmp_path, **choose) == resident


def test_a_sparsified_model_is_streamed_as_a_resident_one():
    model = tiny_model("llama")
    choose = dict(density=0.1, progress=False)
    values = sparsify(model, select_masks(model, salience="magnitude", **choose))
    resident = select_masks(model, batches(), **choose)
    assert select_masks(model, batches(), offload="cpu", **choose) == resident
    model(**token_batch()).loss.backward()
    assert all(part.grad is not None for part in values)


def test_embeddings_and_norms_can_be_targets_of_a_streamed_model():
    model = tiny_model("qwen2")
    choose = dict(density=0.2, targets=lambda name, p: "norm" in name or "embed" in name, progress=False)
    assert select_masks(model, batches(), offload="cpu", **choose) == select_masks(model, batches(), **choose)


@pytest.mark.parametrize("salience", ["gradient", "fisher", "activation"])
def test_masks_of_many_blocks_are_equal_at_any_budget(salience):
    model = tiny_model("llama", num_hidden_layers=6)
    choose = dict(salience=salience, density=0.1, progress=False)
    resident = select_masks(model, batches(), **choose)
    for budget in (20_000, 60_000, 2**30):
        assert select_masks(model, batches(), offload="cpu", memory_budget=budget, **choose) == resident


class OfBlocks(nn.Module):
    """A model whose blocks are linear layers themselves, or have a parameter beside their layers."""

    class Scaled(nn.Module):
        """A linear layer and a scale of its own."""

        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8, bias=False)
            self.scale = nn.Parameter(torch.rand(8))

        def forward(self, x):
            return torch.tanh(self.inner(x) * self.scale)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), self.Scaled(), nn.Linear(8, 8), self.Scaled()])

    def forward(self, x, labels):
        for block in self.blocks:
            x = block(x)
        return {"loss": (x - labels).square().mean()}


@pytest.mark.parametrize("targets", [None, lambda name, p: True])
def test_blocks_may_own_weights_themselves(targets):
    model = OfBlocks()
    data = [{"x": torch.randn(3, 8), "labels": torch.randn(3, 8)} for _ in range(3)]
    choose = dict(density=0.3, targets=targets, progress=False)
    resident = select_masks(model, data, **choose)
    shadowed = []
    with contextlib.ExitStack() as stack:
        for block in model.blocks[::2]:
            hook = block.register_forward_pre_hook(lambda m, a: shadowed.append("weight" in m.__dict__))
            stack.callback(hook.remove)
        assert select_masks(model, data, offload="cpu", **choose) == resident
    assert len(shadowed) == 3 * 2 * 2 and all(shadowed), "in forward and in the recomputation"


def test_part_of_a_block_may_be_called_from_outside():
    model = tiny_model("llama", num_hidden_layers=3)
    x = torch.randn(2, 24)
    expected = model.model.layers[0].mlp(x)
    with streaming(model, "cpu"):
        model(**token_batch())
        assert torch.equal(model.model.layers[0].mlp(x), expected)


def test_a_batch_moves_each_block_at_most_twice(monkeypatch):
    """Of five blocks: up, then down to those two that are still there; the next batch finds the lowest two there."""
    model = tiny_model("llama", num_hidden_layers=5)
    moved = moved_blocks(monkeypatch)
    choose = dict(density=0.1, offload="cpu", progress=False)
    select_masks(model, batches()[:2], **choose)
    assert moved == [0, 1, 2, 3, 4, 2, 1, 0, 2, 3, 4, 2, 1, 0]
    moved.clear()
    select_masks(model, batches()[:2], targets=lambda name, p: "layers.2.mlp" in name, **choose)
    # Backward ends above the blocks that nobody scores, and the first of the next batch is sent for at once.
    assert moved == [0, 1, 2, 3, 4, 2, 0, 1, 2, 3, 4, 2, 0]
    moved.clear()
    select_masks(model, salience="magnitude", **choose)
    assert moved == []


class Copies(TorchDispatchMode):
    """Notes where the source of each copy lies, and how long it is."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._foreach_copy_.default, torch.ops.aten.cat.out):
            sources = args[1] if function is torch.ops.aten._foreach_copy_.default else [kwargs["out"]]
            self.made.append([(source.data_ptr(), source.nbytes) for source in sources])
        return function(*args, **(kwargs or {}))


def test_locked_pages_hold_nothing_else_and_no_copy_crosses_their_edge(monkeypatch):
    """CUDA error: invalid argument, at the copy of a batch that shared its first page with a weight."""

    class Runtime:
        def __init__(self, room):
            self.room, self.locked = room, {}

        def cudaHostRegister(self, first, size, flags):
            if len(self.locked) == self.room:
                return 2
            assert all(first + size <= other or other + length <= first for other, length in self.locked.items())
            self.locked[first] = size
            return 0

        def cudaHostUnregister(self, first):
            del self.locked[first]
            return 0

    large = torch.randn(2**20)
    tensors = [large[5:9000], large[1000:], torch.randn(0), torch.randn(3), torch.randn(999, 77).t()]
    tensors += [torch.randn(4000 + 40 * n).to(torch.float16) for n in range(9)]
    page, runtime = os.sysconf("SC_PAGE_SIZE"), Runtime(room=100)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    with contextlib.ExitStack() as stack:
        lock_pages(tensors, torch.device("cpu"), stack)
        inside = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        for run, size in runtime.locked.items():
            assert run % page == 0 and size % page == 0
            assert any(first <= run and run + size <= first + length for first, length in inside.items())
        assert sum(runtime.locked.values()) > 0.98 * large.nbytes
        outs = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in tensors]
        with Copies() as copies:
            copy_pages_(zip(outs, tensors, strict=True))
        assert all(torch.equal(out, tensor) for out, tensor in zip(outs, tensors, strict=True))
        # Whole pages go to the device, then all edges, joined, and there they are put in their places.
        whole, joined, placed = copies.made
        made = whole + joined
        assert len(joined) == 1 and sum(size for _, size in placed) == joined[0][1]
        assert sum(size for _, size in made) == sum(tensor.nbytes for tensor in tensors)
        contiguous = [(tensor.data_ptr(), tensor.nbytes) for tensor in tensors if tensor.is_contiguous()]
        for first, size in made:
            for run, length in runtime.locked.items():
                within = run <= first and first + size <= run + length
                assert within or first + size <= run or run + length <= first
            # Of the tensors' own memory nothing is copied that is not locked, for which the CPU would wait.
            if any(start <= first < start + length for start, length in contiguous):
                assert any(run <= first and first + size <= run + length for run, length in runtime.locked.items())
    assert not runtime.locked


def test_copies_that_are_queued_again_take_what_is_in_host_memory_then():
    sources = [torch.randn(size) for size in (70_000, 3, 0)]
    outs = [torch.empty_like(source) for source in sources]
    copies = PageCopies(zip(outs, sources, strict=True))
    for _ in range(2):
        copies.queue()
        assert all(torch.equal(out, source) for out, source in zip(outs, sources, strict=True))
        for source in sources:
            source.data.neg_()


def test_pages_that_cannot_be_locked_are_left_with_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=lambda *arguments: 2))
    with contextlib.ExitStack() as stack:
        lock_pages([torch.zeros(2**20), torch.zeros(2**21)], torch.device("cpu"), stack)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "bytes of host memory cannot be pinned (CUDA error 2); the CPU copies them via pinned buffers" in message


@pytest.mark.parametrize("room", [0, 2**40])
def test_files_in_memory_are_locked_only_where_there_is_room_to_read_them(room, tmp_path, monkeypatch, caplog):
    save_file({"weight": torch.zeros(2**20)}, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        tensors = [file.get_tensor("weight"), torch.zeros(2**20)]
    runtime = SimpleNamespace(cudaHostRegister=lambda *arguments: 0, cudaHostUnregister=lambda first: 0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    assert 0 < available_bytes() < 2**50
    monkeypatch.setattr("speft_optim.offload.pages.available_bytes", lambda: room)
    with contextlib.ExitStack() as stack:
        direct = lock_pages(tensors, torch.device("cpu"), stack)
    places = [tensor.untyped_storage().data_ptr() for tensor in tensors]
    assert direct == set(places if room else places[1:])
    expected = [] if room else ["memory-mapped from files, and larger than the memory left"]
    assert [record.getMessage().partition("(")[2].partition(")")[0] for record in caplog.records] == expected


@pytest.mark.parametrize("by_block", [True, False])
def test_pages_are_locked_for_a_gpu_until_all_copies_are_over(monkeypatch, by_block):
    """Also where no block goes on the prefetcher, as for `synflow`, which moves all weights several times a pass."""
    model, done = tiny_model("llama"), []

    def lock(tensors, device, stack):
        done.append(tensors)
        stack.callback(done.append, "unlocked")
        return set()

    gpu = SimpleNamespace(Stream=lambda device: None, synchronize=lambda device: done.append("synchronised"))
    monkeypatch.setattr(torch, "get_device_module", lambda device: gpu)
    memory = SimpleNamespace(memory=SimpleNamespace(record_stream=lambda stream: None))
    monkeypatch.setattr("speft_optim.offload.prefetch.Buffer", lambda size, device: memory)
    monkeypatch.setattr("speft_optim.offload.engine.device_of_tensors", torch.device)
    monkeypatch.setattr("speft_optim.offload.engine.lock_pages", lock)
    with streaming(model, "cuda:0", by_block=by_block):
        (locked,) = done
        assert [part.data_ptr() for part in locked] == [parameter.data_ptr() for parameter in model.parameters()]
    assert done[1:] == ["synchronised", "unlocked"]


def test_one_block_at_a_time_has_copies_of_its_weights():
    model = tiny_model("llama", num_hidden_layers=5)
    alive = []

    def note(module, args, output):
        alive.append(sum("weight" in part.__dict__ for part in model.model.modules()))

    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(note)
    with streaming(model, "cpu"):
        model(**token_batch())
    assert len(alive) == 5 and set(alive) == {1}


def test_blocks_are_recomputed_so_that_copies_do_not_wait_for_backward():
    model = tiny_model("llama", num_hidden_layers=3)
    calls = []
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj.register_forward_hook(lambda m, a, o, number=number: calls.append(number))
    select_masks(model, batches()[:1], density=0.1, offload="cpu", progress=False)
    assert calls == [0, 1, 2, 2, 1, 0]


def test_a_streamed_model_is_as_before_after_an_error():
    model = tiny_model()
    before = state(model)
    with pytest.raises(ValueError, match="no labels"):
        select_masks(
            model, [{"input_ids": torch.ones(1, 3, dtype=torch.long)}], density=0.1, offload="cpu", progress=False
        )
    assert state(model) == before


def test_what_cannot_be_streamed_is_refused(tmp_path):
    model = tiny_model()
    with pytest.raises(ValueError, match="grasp"):
        select_masks(model, batches(), salience="grasp", density=0.1, offload="cpu")
    with pytest.raises(ValueError, match="only with offload"):
        select_masks(model, batches(), density=0.1, base=tmp_path)
    with pytest.raises(ValueError, match="holds no safetensors"):
        select_masks(model, batches(), density=0.1, offload="cpu", base=tmp_path)
    twin = on_meta(model, tmp_path)
    with pytest.raises(ValueError, match="on the meta device; pass base=folder"):
        select_masks(twin, batches(), density=0.1, offload="cpu")
    other = on_meta(tiny_model(hidden_size=32), tmp_path / "other")
    with pytest.raises(ValueError, match="has shape"):
        select_masks(other, batches(), density=0.1, offload="cpu", base=tmp_path)
