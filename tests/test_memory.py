"""The loss without logits, the estimate against counts and measurements, and the benchmark's own plumbing."""

import json
import os
import weakref

import pytest
import torch
import transformers
from conftest import assert_close, random_masks, tiny_model, token_batch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recipes import (
    apart,
    benchmark,
    benchmark_report,
    host_memory,
    host_peers,
    memory,
    peers,
    random_models,
    shapes,
    timed_steps,
)
from recipes.loss import frozen_head, linear_cross_entropy
from recipes.memory import GIB, estimate, peak_bytes
from recipes.shapes import Shape
from speft_optim import Mask, SparseAdamW, select_masks, sparsify
from speft_optim.kernels.product import PANEL_BYTES
from speft_optim.offload.quantized import HostQuantized
from speft_optim.offload.training import OffloadedBase
from speft_optim.weights.attached import record_of
from speft_optim.weights.bnb import is_quantized_linear, quantized_linears
from speft_optim.weights.targets import all_targets

CPU = torch.device("cpu")
SMALL = dict(hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
FAMILIES = {
    "llama": dict(vocab_size=128, tie_word_embeddings=False),
    "qwen2": dict(vocab_size=128, tie_word_embeddings=True),
    "gemma2": dict(vocab_size=128, head_dim=32, tie_word_embeddings=True),
}


@pytest.fixture
def family(request, monkeypatch):
    """The name of a small shape of the family."""
    monkeypatch.setitem(shapes.SHAPES, "small", (request.param, SMALL | FAMILIES[request.param]))
    return "small"


def every_family(function):
    return pytest.mark.parametrize("family", FAMILIES, indirect=True)(function)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk_bytes", [1, 4 * 61 * 5, 2**20])
def test_linear_cross_entropy_is_cross_entropy(softcap, chunk_bytes):
    torch.manual_seed(0)
    hidden, head = torch.randn(13, 24, requires_grad=True), torch.randn(61, 24)
    targets = torch.randint(0, 61, (13,))
    targets[[2, 7]] = -100
    twin = hidden.detach().clone().requires_grad_()
    loss = linear_cross_entropy(hidden, head, targets, softcap=softcap, chunk_bytes=chunk_bytes)
    logits = twin @ head.t()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = nn.functional.cross_entropy(logits, targets, reduction="sum")
    (loss / 3).backward()
    (expected / 3).backward()
    assert_close(loss.detach(), expected.detach())
    assert_close(hidden.grad, twin.grad, atol=1e-6)


def test_a_frozen_head_is_multiplied_as_it_lies_and_never_in_a_batched_product():
    class Products(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm"):
                self.seen.append((function.overloadpacket.__name__, [tuple(a.stride()) for a in args[:2]]))
            return function(*args, **(kwargs or {}))

    hidden, head = torch.randn(2, 8, 24, requires_grad=True), torch.randn(61, 24)
    with Products() as products:
        loss = linear_cross_entropy(hidden.flatten(0, 1), head, torch.zeros(16).long(), chunk_bytes=4 * 61 * 5)
        loss.backward()
    # Forward and input gradient of four chunks.
    assert [name for name, _ in products.seen] == ["mm"] * 8
    with Products() as products:
        nn.functional.linear(hidden[:, 2:5], head)
    assert [name for name, _ in products.seen] == ["bmm"], (
        "PyTorch does strided chunks otherwise now; see recipes/loss.py"
    )


def test_linear_cross_entropy_in_bf16_and_without_gradients():
    torch.manual_seed(0)
    hidden, head = torch.randn(9, 24, dtype=torch.bfloat16), torch.randn(61, 24, dtype=torch.bfloat16)
    targets = torch.randint(0, 61, (9,))
    loss = linear_cross_entropy(hidden, head, targets)
    assert loss.dtype == torch.float32 and not loss.requires_grad
    assert_close(loss, nn.functional.cross_entropy((hidden @ head.t()).float(), targets, reduction="sum"))
    assert linear_cross_entropy(hidden, head, torch.full((9,), -100)).item() == 0


def test_loss_cannot_be_differentiated_twice_in_silence():
    hidden, head = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    loss = linear_cross_entropy(hidden, head, torch.tensor([0, 1, 2]))
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_head_is_left_out_only_where_nobody_needs_it_called():
    model = tiny_model("llama").requires_grad_(False)
    assert frozen_head(model) is model.lm_head
    hook = model.lm_head.register_forward_hook(lambda *_: None)
    assert frozen_head(model) is None
    hook.remove()
    model.lm_head.weight.requires_grad_(True)
    assert frozen_head(model) is None
    assert frozen_head(tiny_model("gpt2").requires_grad_(False)) is None
    masks = random_masks(model, ["lm_head"], density=0.1)
    sparsify(model, masks)
    assert frozen_head(model) is None


# --- the estimate


def stored_bytes(model):
    """Bytes of all parameters and of what bitsandbytes keeps beside its quantised weights."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    for _, module in quantized_linears(model):
        if hasattr(module.weight, "SCB"):
            total += module.weight.SCB.nbytes
        else:
            state = module.weight.quant_state
            second = (state.offset, state.state2.absmax, state.state2.code)
            total += sum(tensor.nbytes for tensor in (state.absmax, state.code, *second))
    return total


@every_family
@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4"])
@pytest.mark.parametrize("state_bits", [8, 32])
@pytest.mark.parametrize("targets", [None, ["q_proj", "mlp.down_proj"]])
def test_estimate_counts_weights_and_entries_to_the_byte(family, precision, state_bits, targets):
    model = random_models.build(family, precision, torch.device("cpu"))
    shape, before = Shape.of(random_models.shaped(family)), stored_bytes(model)
    density = 1 / 64
    entries = round(density * sum(rows * columns for rows, columns in shape.targets(targets)))
    sizes = dict(batch=1, length=8, targets=targets, state_bits=state_bits)
    moments = estimate(shape, bits=benchmark.BITS[precision], entries=entries, **sizes)
    masks = random_masks(model, targets or random_models.PROJECTIONS, density=density)
    optimizer = SparseAdamW(sparsify(model, masks), state_bits=state_bits)
    assert masks.count == entries
    timed_steps.loss_of(model, torch.randint(0, 128, (1, 8))).backward()
    optimizer.step()
    held = optimizer.memory_summary()
    assert moments["first block"]["weights"] == before
    for part in ("values", "positions", "moments", "gradients"):
        assert moments["first block"][part] == held[part], part


class MasksOfAttention(TorchFunctionMode):
    """Notes the mask of each call of torch's attention."""

    def __init__(self):
        super().__init__()
        self.masks = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            self.masks.append((kwargs or {}).get("attn_mask"))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def attends_without_masks(family):
    """Skip where transformers forms masks, and with them repeats keys and values, for texts that are all as long."""
    model = random_models.build(family, "bf16", CPU).train()
    with MasksOfAttention() as seen:
        model(torch.randint(0, 128, (4, 16)))
    if any(mask is not None for mask in seen.masks):
        pytest.skip(f"transformers {transformers.__version__} forms masks of attention where no text is padded")


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, while they live, and the most there were at once."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.sizes:
                self.sizes[key] = tensor.untyped_storage().nbytes()
                self.now += self.sizes[key]
                self.peak = max(self.peak, self.now)
                weakref.finalize(tensor.untyped_storage(), self.forget, key)
        return made

    def forget(self, key):
        self.now -= self.sizes.pop(key)


@every_family
@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4"])
@pytest.mark.parametrize("resident", [0, 1, 4])
def test_estimate_counts_what_offload_holds_to_the_byte(family, precision, resident, monkeypatch):
    sizes = shapes.SHAPES[family][1]
    monkeypatch.setitem(sizes, "num_hidden_layers", 4)
    model = random_models.build(family, precision, CPU, in_host_memory=True)
    shape, before = Shape.of(random_models.shaped(family)), stored_bytes(model)
    masks = random_masks(model, random_models.PROJECTIONS, density=1 / 64)
    stays = dict(resident_blocks=resident, resident_head=resident == 4)
    optimizer = SparseAdamW(sparsify(model, masks, offload="cpu", **stays), state_bits=8)
    timed_steps.loss_of(model, torch.randint(0, 128, (1, 8))).backward()
    optimizer.step()
    sizes = dict(bits=benchmark.BITS[precision], batch=1, length=8)
    parts = estimate(shape, entries=masks.count, state_bits=8, offload=True, **stays, **sizes)["first block"]
    (base,) = (hook for hook in record_of(model).hooks if isinstance(hook, OffloadedBase))
    tables = 4 * (16 + 256 + 1) * len(shape.linears) if precision == "nf4" else 0
    head = model.get_output_embeddings().weight.nbytes if resident == 4 else 0
    assert parts["weights"] == base.prefetcher.nbytes + tables + head
    held = optimizer.memory_summary()
    assert all(parts[name] == held[name] for name in ("values", "positions", "moments", "gradients"))
    inputs = 2 * 8 * shape.width * shape.layers
    assert memory.host_bytes(shape, **sizes) == before + inputs


@every_family
def test_estimate_of_activations_with_offload_is_near_what_lives(family, attends_without_masks):
    model = random_models.build(family, "bf16", CPU, in_host_memory=True).train()
    # A panel of the sampled gradient would be larger than this model.
    sparsify(model, random_masks(model, ["layers.0.self_attn.k_proj"], density=1 / 64), offload="cpu", verify=False)
    model.enable_input_require_grads()
    ids = torch.randint(0, 128, (4, 256))
    # What the engine keeps of the first step is in host memory.
    timed_steps.loss_of(model, ids).backward()
    model.zero_grad()
    existing = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers(), ids)}
    with LiveBytes() as live:
        live.sizes = dict.fromkeys(existing, 0)
        timed_steps.loss_of(model, ids).backward()
    shape = Shape.of(model.config)
    moments = estimate(shape, bits=16, entries=0, batch=4, length=256, offload=True)
    resident = {"weights", "values", "positions", "moments", "workspace"}
    # On a CPU the host's copies of the inputs of blocks live too, and the head is not copied.
    head, row = 2 * shape.vocabulary * shape.width, 2 * 4 * 256 * shape.width
    on_host = dict.fromkeys(moments, row * shape.layers)
    on_host |= {"loss": row * shape.layers - head, "first block": row}
    expected = max(
        sum(size for part, size in parts.items() if part not in resident) + on_host[moment]
        for moment, parts in moments.items()
    )
    assert expected == pytest.approx(live.peak, rel=0.1)


@every_family
@pytest.mark.parametrize("checkpointing", [True, False])
def test_estimate_of_activations_is_near_what_lives(family, attends_without_masks, checkpointing):
    model = random_models.build(family, "bf16", torch.device("cpu")).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    ids = torch.randint(0, 128, (4, 256))
    existing = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers(), ids)}
    with LiveBytes() as live:
        live.sizes = dict.fromkeys(existing, 0)
        timed_steps.loss_of(model, ids).backward()
    sizes = dict(bits=16, entries=0, batch=4, length=256, checkpointing=checkpointing)
    moments = estimate(Shape.of(model.config), **sizes)
    held = moments["loss"]["weights"] + moments["loss"]["workspace"]
    assert peak_bytes(moments) - held == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize("salience", ["gradient", "fisher", "grasp", "activation", "synflow"])
def test_calibration_keeps_to_checkpointed_blocks(salience):
    """It would set the peak otherwise. The masks are the same, and the model is as before."""
    model = tiny_model("llama", num_hidden_layers=6, hidden_size=64).train()
    batches = [token_batch(seed, batch=8, length=32) for seed in range(2)]
    choose = dict(salience=salience, density=0.05, memory_budget=2**22, progress=False)
    peaks, masks = [], []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with LiveBytes() as live:
            masks.append(select_masks(model, batches, **choose))
        peaks.append(live.peak)
        assert model.training and not any("forward" in module.__dict__ for module in model.modules())
        if salience != "grasp":  # which offload refuses
            masks.append(select_masks(model, batches, offload="cpu", **choose))
    assert all(found == masks[0] for found in masks)
    if salience == "gradient":
        assert peaks[1] < 0.6 * peaks[0]


def test_the_estimate_knows_the_librarys_panels():
    assert memory.PANEL_BYTES == PANEL_BYTES


@pytest.mark.parametrize(
    ("bits", "density", "measured_gib"),
    [(16, 0, 16.91), (16, 0.01, 17.50), (8, 0, 10.42), (8, 0.01, 11.01), (4, 0, 7.27), (4, 0.01, 7.86)],
)
def test_estimate_is_what_an_h100_measured(bits, density, measured_gib):
    """Llama-3-8B shape, 2 x 2048 tokens, without Liger."""
    shape = Shape.of(shapes.configuration("llama3-8b"))
    entries = round(density * sum(rows * columns for rows, columns in shape.targets()))
    moments = estimate(shape, bits=bits, entries=entries, batch=2, length=2048, state_bits=8)
    assert peak_bytes(moments) / GIB == pytest.approx(measured_gib, abs=0.02)


def test_estimate_grows_with_everything():
    shape = Shape.of(shapes.configuration("gemma2-2b"))
    base = dict(bits=4, entries=10**8, batch=2, length=1024)
    small = peak_bytes(estimate(shape, **base))
    larger = [dict(entries=2 * 10**8), dict(batch=4), dict(length=2048), dict(checkpointing=False), dict(bits=8)]
    for change in [*larger, dict(accumulation=2)]:
        assert peak_bytes(estimate(shape, **{**base, **change})) > small
    assert peak_bytes(estimate(shape, **base, state_bits=8)) < small


def test_estimate_of_head_norms_and_of_unknown_architectures():
    config = transformers.Qwen3Config(**SMALL, head_dim=32, vocab_size=512)
    shape = Shape.of(config)
    assert shape.head_norms and shape.norms == 2 and not Shape.of(shapes.configuration("tiny")).head_norms
    with pytest.raises(ValueError, match="'gpt2' model cannot be estimated, only of .*llama"):
        Shape.of(transformers.GPT2Config())
    with pytest.raises(ValueError, match="--targets lm_head is no linear weight of the blocks"):
        shape.targets(["q_proj", "lm_head"])


def test_description_names_every_part_the_peak_and_a_gpu():
    moments = estimate(Shape.of(shapes.configuration("llama3-8b")), bits=8, entries=10**7, batch=1, length=2048)
    text = memory.describe(moments)
    assert all(part in text for parts in moments.values() for part in parts)
    assert f"expected peak {peak_bytes(moments) / GIB:.2f} GiB" in text and "fits a GPU of 12 GB" in text
    assert memory.smallest_gpu(memory.usable_bytes(16)) == 16 and memory.smallest_gpu(memory.usable_bytes(16) + 1) == 24
    huge = {"loss": {"weights": 10**12}}
    assert memory.smallest_gpu(10**12) is None and "fits none of the common GPUs, up to 80 GB" in memory.describe(huge)


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_users_own_setting_of_the_allocator_stays(monkeypatch, name):
    for known in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(known, raising=False)
    monkeypatch.setenv(name, "backend:native")
    memory.let_segments_grow()
    assert {key: value for key, value in os.environ.items() if "ALLOC_CONF" in key} == {name: "backend:native"}
    monkeypatch.delenv(name)
    memory.let_segments_grow()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


# --- the benchmark


def test_benchmark_reports_every_mode_also_one_that_fails(tmp_path, capsys):
    command = ["memory", "--shape", "tiny", "--batch", "1", "--seq", "16", "--steps", "1", "--density", "0.02"]
    (row,) = benchmark.main([*command, "--modes", "ours-nf4", "--out", str(tmp_path)])
    assert row["mode"] == "ours-nf4" and row["trained"] > 0 and row["step_ms"] > 0
    assert json.loads(capsys.readouterr().out.splitlines()[0]) == row
    assert (tmp_path / "memory.png").stat().st_size > 1000
    assert json.loads((tmp_path / "memory.json").read_text())["rows"] == [row]
    failed = apart.run_apart("frozen-bf16", ["memory", "--shape", "unknown"])
    assert "invalid choice" in failed["error"] and failed["error"] in benchmark_report.table([failed, row])
    with pytest.raises(SystemExit):
        benchmark.main(["memory", "--modes", "none"])
    with pytest.raises(SystemExit):
        benchmark.main(["memory", "--shape", "tiny", "--layers", "3", "--resident-blocks", "4"])
    assert "--resident-blocks is 4; the model has 3 blocks, so lower it" in capsys.readouterr().err


def test_a_gpu_that_is_too_small_is_a_result(monkeypatch):
    def fill(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    monkeypatch.setattr(timed_steps, "run_steps", fill)
    arguments = type("Arguments", (), dict(shape="tiny", layers=None, batch=1, seq=16, density=0.02, state_bits=8))
    arguments.resident_blocks = 0
    arguments.masks = "uniform"
    arguments.gpu_gb = None
    row = benchmark.measure("ours-int8", arguments)
    assert row["error"] == "out of memory" and row["estimate_gib"] > 0
    assert f"| ours-int8 | - | - | - | - | out of memory | {row['estimate_gib']:.2f} |" in benchmark_report.table([row])
    if not torch.cuda.is_available():
        for option in (["--gpu-gb", "12"], ["--liger"]):
            with pytest.raises(SystemExit):
                benchmark.main(["memory", *option])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="simulates a small GPU on a large one")
def test_a_simulated_gpu_sets_the_limit(tmp_path):
    pytest.importorskip("accelerate")
    command = ["memory", "--shape", "llama3-8b", "--modes", "frozen-bf16", "--gpu-gb", "12", "--out", str(tmp_path)]
    (row,) = benchmark.main(command)
    assert row["error"] == "out of memory" and row["simulated_gb"] == 12


@pytest.mark.parametrize("method", ["frozen", "lora", "ours", "moving"])
def test_modes_train_what_they_should(method):
    pytest.importorskip("peft")
    arguments = type("Arguments", (), dict(density=0.02, state_bits=32, rank=4, masks="uniform"))
    model = random_models.build("tiny", "nf4", torch.device("cpu"))
    optimizer, held = peers.ATTACH[method](model, arguments, torch.device("cpu"))
    model.enable_input_require_grads()
    ids = torch.randint(0, 512, (2, 16))
    first = timed_steps.loss_of(model, ids).item()
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    for _ in range(5):
        timed_steps.take_step(model, optimizer, ids, torch.device("cpu"))
    last = timed_steps.loss_of(model, ids).item()
    assert (last < first - 0.1 and held > 0) if method != "frozen" else (last == first and held == 0)


def losses_of(attach, precision):
    """Losses of three steps of a mode on the tiny shape, and what it trains."""
    torch.manual_seed(0)
    model = random_models.build("tiny", precision, CPU, in_host_memory=True)
    arguments = type("Arguments", (), dict(density=0.02, state_bits=8, rank=4, masks="uniform", resident_blocks=1))
    torch.manual_seed(1)
    optimizer, held = attach(model, arguments, CPU)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    ids = torch.randint(0, 512, (2, 16), generator=torch.Generator().manual_seed(2))
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    losses = []
    for _ in range(3):
        losses.append(timed_steps.loss_of(model, ids).item())
        timed_steps.take_step(model, optimizer, ids, CPU)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return losses, trained, held


@pytest.mark.parametrize("method", ["streamed", "lean"])
@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4"])
def test_modes_with_weights_in_host_memory_train_as_the_resident_one(method, precision):
    streamed = losses_of(host_peers.HOST_ATTACH[method], precision)
    assert streamed == losses_of(peers.ATTACH["ours"], precision) and streamed[0][2] < streamed[0][0]


@pytest.mark.parametrize("method", ["fsdp-offload", "accelerate-offload"])
def test_peers_with_weights_in_host_memory_train_as_resident_lora(method):
    pytest.importorskip("peft")
    try:
        found = losses_of(host_peers.HOST_ATTACH[method], "bf16")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert found == losses_of(peers.ATTACH["lora"], "bf16") and found[0][2] < found[0][0]


@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4"])
def test_blocks_in_host_memory_are_equal_and_share_nothing(precision):
    model = random_models.build("tiny", precision, CPU, in_host_memory=True)
    first, second = (list(block.parameters()) for block in model.model.layers)
    assert all(torch.equal(one.data, other.data) for one, other in zip(first, second, strict=True))
    assert not {one.data_ptr() for one in first} & {other.data_ptr() for other in second}
    if precision != "bf16":
        scales = [[w.sources() for w in quantised_sources(block)] for block in model.model.layers]
        one, other = ({tensor.data_ptr() for parts in each for tensor in parts} for each in scales)
        assert not one & other and len(one) == (14 if precision == "int8" else 21)


def quantised_sources(block):
    """The quantised weights of a block as offload copies them."""
    return [
        HostQuantized(target, CPU) for target in all_targets(block).values() if is_quantized_linear(target.sites[0][0])
    ]


def test_a_host_with_too_little_memory_is_a_result(monkeypatch):
    monkeypatch.setattr(host_memory, "free_bytes", lambda: 2**20)
    command = ["memory", "--shape", "llama3-70b", "--modes", "streamed-nf4", "--in-process"]
    (row,) = benchmark.main(command)
    assert "the base takes 41.8 GiB of host memory and 0.0 GiB are free" in row["error"]
    monkeypatch.undo()
    assert 0 < host_memory.free_bytes() and host_memory.shortage(0) is None


def test_free_host_memory_keeps_to_the_limit_of_a_container(monkeypatch, tmp_path):
    host = tmp_path / "meminfo"
    monkeypatch.setattr(host_memory, "_HOST", host)
    monkeypatch.setattr(host_memory, "_CONTAINER", tmp_path)
    host.write_text("MemTotal:       20 kB\nMemAvailable:   10 kB\n")
    stat = "anon 1500\nfile 900\nshmem 500\ninactive_file 300\nactive_file 100\n"
    for name, text in (("max", "5000"), ("current", "2000"), ("stat", stat)):
        (tmp_path / f"memory.{name}").write_text(text)
    assert host_memory.free_bytes() == 3400
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory.free_bytes() == 10240


def test_masks_like_those_of_gradients_are_concentrated():
    """At 1 % on SmolLM2-135M nine tenths of the entries of down_proj lay in 8 % of its columns."""
    torch.manual_seed(0)
    mask = Mask(peers.concentrated("down_proj", 400, 600, 0.01, torch.device("cpu")), (400, 600))
    counts = mask.column_counts().sort(descending=True).values
    assert len(mask) == 2400 and int(counts[:60].sum()) > 0.6 * 2400
