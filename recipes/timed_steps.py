"""Training steps of the benchmark with their time and memory."""

import argparse
import gc
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from eval.records import package_version
from recipes import moving, processes
from recipes.host_peers import HOST_ATTACH
from recipes.loss import IGNORED, head_loss
from recipes.memory import GIB
from recipes.peers import ATTACH
from recipes.random_models import build, use_liger
from speft_optim import desparsify


def run_steps(method: str, precision: str, args: argparse.Namespace, device: torch.device) -> dict:
    """Build the model of a mode, take a few steps, and return their times and memory."""
    torch.manual_seed(0)
    streams = method in HOST_ATTACH
    model = build(args.shape, precision, device, args.layers, in_host_memory=streams)
    if args.liger:
        use_liger(model)
    weights = allocated(device, model)
    optimizer, held = (HOST_ATTACH if streams else ATTACH)[method](model, args, device)
    if streams:
        # These are the buffers of weights on the GPU that are there throughout.
        weights = max(0, allocated(device) - held)
    # Masks that move do so twice, at the end of the last step too.
    steps = max(args.steps + 2, 2 * moving.WINDOW) if method == "moving" else args.steps + 2
    ids = torch.randint(0, model.config.vocab_size, (args.batch, args.seq), device=device)
    row, step_ms = train(model, optimizer, ids, device, steps)
    row |= memory_of(device, {"weights": weights, **trained_bytes(method, optimizer, held)})
    if method == "moving":
        # Masks changed at the end of these steps; the first time kernels were compiled and tuned for it.
        ends = [ms for number, ms in enumerate(step_ms, start=3) if number % moving.WINDOW == 0]
        row["selection_ms"] = round(min(ends) - statistics.median(step_ms), 1)
    del optimizer
    check = verified_step(model, args, ids, device) if method == "ours" and precision == "bf16" else {}
    return row | check | software(device)


def software(device: torch.device) -> dict:
    """Return the GPU and the versions that times depend on."""
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return {"gpu": gpu} | {name: package_version(name) for name in ("torch", "transformers")}


def train(
    model: nn.Module, optimizer, ids: Tensor, device: torch.device, steps: int, loss: Callable | None = None
) -> tuple[dict, list[float]]:
    """Take steps on checkpointed blocks.

    Args:
        model: the model, with what is trained attached.
        optimizer: its optimizer.
        ids: (batch, length), the tokens of each step.
        device: the device that computes.
        steps: their number; the first two are not timed.
        loss: from model and tokens to the loss; None for `loss_of`.

    Returns:
        The row of the result so far, and the milliseconds of each timed step.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    timed = [take_step(model, optimizer, ids, device, loss) for _ in range(steps)][2:]
    step_ms, optimizer_ms = ([step[part] for step in timed] for part in (0, 1))
    row = {
        "layers": model.config.num_hidden_layers,
        "trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "step_ms": round(statistics.median(step_ms), 1),
        "optimizer_ms": round(statistics.median(optimizer_ms), 2),
    }
    return row, step_ms


def trained_bytes(method: str, optimizer: torch.optim.Optimizer, held: int) -> dict[str, int]:
    """Return the bytes of the trained part, `held`, and of what its optimizer keeps, by kind."""
    if method in ("ours", "moving", "streamed", "lean"):
        summary = optimizer.memory_summary()
        parts = {"values and positions": held, "moments": summary["moments"]}
        return parts | ({"sums of gradients": summary["salience"]} if method == "moving" else {})
    moments = sum(value.nbytes for entry in optimizer.state.values() for value in entry.values())
    return {"adapters": held, "moments": moments}


def memory_of(device: torch.device, parts: dict[str, int]) -> dict:
    """Return the peak so far, and its parts.

    Args:
        device: a GPU; elsewhere the peak is not known.
        parts: bytes that are held throughout, by kind.
    """
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    parts = dict(parts)
    parts["activations and gradients"] = max(0, peak - sum(parts.values()))
    return {
        "peak_gib": round(peak / GIB, 3) if on_gpu else None,
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3) if on_gpu else None,
        "parts_gib": {name: round(size / GIB, 3) for name, size in parts.items()},
    }


def verified_step(model: nn.Module, args: argparse.Namespace, ids: Tensor, device: torch.device) -> dict:
    """Measure the first step after `sparsify`, which compares each layer's gradient with autograd's.

    Masks are attached again for it, after all kernels were compiled and tuned. The peak of the whole run includes its
    own first step too.
    """
    desparsify(model)
    optimizer, _ = ATTACH["ours"](model, args, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    whole, _ = take_step(model, optimizer, ids, device)
    peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else None
    return {"verified_step_ms": round(whole, 1), "verified_step_peak_gib": None if peak is None else round(peak, 3)}


def take_step(
    model: nn.Module, optimizer, ids: Tensor, device: torch.device, loss: Callable | None = None
) -> tuple[float, float]:
    """Take a training step; return milliseconds of all of it, and of the optimizer's part after backward.

    As in a training loop, the CPU does not wait for the GPU between the two.
    """
    settle(device)
    begin = time.perf_counter()
    (loss or loss_of)(model, ids).backward()
    middle = mark(device)
    optimizer.step()
    end = mark(device)
    optimizer.zero_grad(set_to_none=True)
    settle(device)
    return 1e3 * (time.perf_counter() - begin), end - middle if device.type == "cpu" else middle.elapsed_time(end)


def mark(device: torch.device) -> float | torch.cuda.Event:
    """Note a point in time: on a GPU an event in its queue, elsewhere milliseconds."""
    if device.type == "cpu":
        return 1e3 * time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the mean next-token loss, with the head's logits in chunks."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    softcap = getattr(model.config, "final_logit_softcapping", None)
    # The last token of a sequence has no label. To cut it off would copy the hidden states.
    targets = nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORED)
    total = head_loss(model.lm_head, hidden.flatten(0, 1), targets.flatten(), softcap=softcap)
    return total / ids[:, 1:].numel()


def limit_memory(most_bytes: float) -> None:
    """Limit this process to so many bytes of its GPU's memory; do nothing without a GPU."""
    if torch.cuda.is_available():
        device = processes.device()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, most_bytes / total), device)


def settle(device: torch.device) -> None:
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def allocated(device: torch.device, *models: nn.Module) -> int:
    """Return the bytes on the device: measured on a GPU, elsewhere counted of the models."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()
    return sum(tensor.nbytes for model in models for tensor in (*model.parameters(), *model.buffers()))
