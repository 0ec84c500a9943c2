"""Memory and step time of sparse fine-tuning beside its peers, on one card: each mode in a process of its own.

    python -m recipes.benchmark memory --shape llama3-8b
    python -m recipes.benchmark memory --shape qwen2-7b --modes ours-int8,ours-nf4 --batch 1 --card 12
    python -m recipes.benchmark memory --shape llama3-8b --layers 2 --batch 1 --seq 64     # a trial, also on a CPU

Random weights of the model's shape, built tensor by tensor: neither memory nor time depends on their values. Masks are
uniform, the worst case for the sampled gradient, or with `--masks gradient` concentrated in few rows and columns, as
those that gradients choose. Blocks are checkpointed (not reentrant) and the loss is taken in chunks (`recipes.loss`),
for every mode alike.

    frozen-bf16, -int8, -nf4   forward and input gradients only: the floor that no method can beat; the quantised ones
                               through speft_optim's layer
    ours-bf16, -int8, -nf4     SparseAdamW on the seven projections of each block at --density
    lora-bf16, qlora-nf4       PEFT LoRA of rank --rank on the same seven, adapters in bf16

`--liger` puts Liger's kernels for norms, rotary embedding and gated activation into every mode alike
(`pip install liger-kernel`); the estimate is that of transformers' own, which keep a little more for backward.

`--card` gives each mode as much of the card as a smaller one has; running out of memory is then a result like others.
Prints one JSON line a mode, then a table with the estimate of `recipes.memory` beside each peak; writes `memory.json`
and a stacked-bar `memory.png` to --out.
"""

import argparse
import gc
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # started as `python recipes/benchmark.py`
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from eval.records import write_json
from recipes import salience_cost
from recipes.loss import linear_cross_entropy
from recipes.memory import (
    CARDS,
    GIB,
    SHAPES,
    Shape,
    configuration,
    estimate,
    let_segments_grow,
    peak_bytes,
    usable_bytes,
)

MODES = [
    "frozen-bf16",
    "ours-bf16",
    "lora-bf16",
    "frozen-int8",
    "ours-int8",
    "frozen-nf4",
    "ours-nf4",
    "qlora-nf4",
]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BITS = {"bf16": 16, "int8": 8, "nf4": 4}
MASK_PROFILE = Path(__file__).with_name("mask_profile.json")


def main(argv: list[str] | None = None) -> list[dict]:
    """Run the modes one after the other, each in its own process, and report."""
    parser = argparse.ArgumentParser(prog="python -m recipes.benchmark", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    memory = commands.add_parser("memory", help="peak memory and step time, with peers")
    memory.add_argument("--shape", choices=SHAPES, default="llama3-8b", help="model (default %(default)s)")
    memory.add_argument("--modes", default=",".join(MODES), help="comma-separated (default all: %(default)s)")
    memory.add_argument("--layers", type=int, help="blocks, instead of the model's own")
    memory.add_argument("--batch", type=int, default=2, help="sequences (default %(default)s)")
    memory.add_argument("--seq", type=int, default=2048, help="tokens in each (default %(default)s)")
    memory.add_argument("--density", type=float, default=0.01, help="share of the seven (default %(default)s)")
    memory.add_argument(
        "--masks", choices=["uniform", "gradient"], default="uniform", help="how entries lie (default %(default)s)"
    )
    memory.add_argument("--state-bits", type=int, choices=[8, 32], default=8, help="moments (default %(default)s)")
    memory.add_argument("--rank", type=int, default=32, help="of LoRA (default %(default)s)")
    memory.add_argument("--steps", type=int, default=6, help="timed steps after two more (default %(default)s)")
    memory.add_argument("--liger", action="store_true", help="Liger's norms, rotary embedding and gated activation")
    memory.add_argument("--card", type=int, choices=CARDS, help="simulate a card of so many GB")
    memory.add_argument("--out", default="out/benchmark", help="folder for JSON and PNG (default %(default)s)")
    memory.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    salience_cost.add_arguments(
        commands.add_parser("salience", help=salience_cost.__doc__.split("\n")[0]), list(SHAPES)
    )
    args = parser.parse_args(argv)
    let_segments_grow()
    if args.command == "salience":
        if args.memory_limit:
            limit_memory(args.memory_limit * 10**9)
        return salience_cost.run(args, build)
    if args.card and not torch.cuda.is_available():
        parser.error(f"--card {args.card} simulates a small card on a larger one, but there is no CUDA device")
    if args.liger and not (torch.cuda.is_available() and importlib.util.find_spec("liger_kernel")):
        parser.error("--liger needs a CUDA device and the package: pip install liger-kernel")
    modes = args.modes.split(",")
    if unknown := [mode for mode in modes if mode not in MODES]:
        parser.error(f"--modes names {unknown[0]!r}; it takes {', '.join(MODES)}")
    if args.in_process:
        rows = [measure(mode, args) for mode in modes]
        print(json.dumps(rows[0]), flush=True)
        return rows
    rows, out = [], Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for mode in modes:
        rows.append(run_apart(mode, sys.argv[1:] if argv is None else argv))
        print(json.dumps(rows[-1]), flush=True)
        write_json({"arguments": vars(args), "rows": rows}, out / "memory.json")
    print(table(rows))
    good = [row for row in rows if "error" not in row]
    if good:
        liger = ", Liger" if args.liger else ""
        draw(good, out / "memory.png", f"{args.shape}, {args.batch} x {args.seq} tokens{liger}, {good[0]['card']}")
        print(out / "memory.png")
    return rows


def run_apart(mode: str, argv: list[str]) -> dict:
    """One mode in a fresh process, whose peak is its own; an error becomes a row, so that the others still run."""
    command = [sys.executable, str(Path(__file__).resolve()), *argv, "--modes", mode, "--in-process"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.strip().splitlines()[-1])
    return {"mode": mode, "error": (done.stderr.strip() or "no message").splitlines()[-1][:300]}


# ---------------------------------------------------------------------------------------------------------------------
# One mode


def measure(mode: str, args: argparse.Namespace) -> dict:
    """What one mode needs and takes; on a card that is too small, a row that says so."""
    method, precision = mode.split("-")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    row = {"mode": mode, "shape": args.shape, "tokens": [args.batch, args.seq], "simulated_gb": args.card}
    if method == "ours":
        row["masks"] = args.masks
    if method in ("ours", "frozen"):
        shape = Shape.of(shaped(args.shape, args.layers))
        entries = round(args.density * sum(rows * columns for rows, columns in shape.linears.values()))
        sizes = dict(batch=args.batch, length=args.seq, state_bits=args.state_bits)
        moments = estimate(shape, bits=BITS[precision], entries=entries if method == "ours" else 0, **sizes)
        row["estimate_gib"] = round(peak_bytes(moments) / GIB, 3)
    if args.card:
        limit_memory(usable_bytes(args.card))
    try:
        return row | run_steps(method, precision, args, device)
    except torch.OutOfMemoryError:
        return row | {"error": "out of memory"}


def run_steps(method: str, precision: str, args: argparse.Namespace, device: torch.device) -> dict:
    """Build the model of a mode, take a few steps, and count."""
    torch.manual_seed(0)
    model = build(args.shape, precision, device, args.layers)
    if args.liger:
        use_liger(model)
    weights = allocated(device, model)
    optimizer, held = ATTACH[method](model, args)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    ids = torch.randint(0, model.config.vocab_size, (args.batch, args.seq), device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step_ms, optimizer_ms = [], []
    for number in range(args.steps + 2):
        whole, last = take_step(model, optimizer, ids, device)
        if number >= 2:
            step_ms.append(whole)
            optimizer_ms.append(last)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    reserved = torch.cuda.max_memory_reserved() if device.type == "cuda" else None
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    state = sum(value.nbytes for entry in optimizer.state.values() for value in entry.values())
    del optimizer
    check = verified_step(model, args, ids, device) if method == "ours" and precision == "bf16" else {}
    import transformers

    return {
        "layers": model.config.num_hidden_layers,
        "trained": trained,
        "step_ms": round(statistics.median(step_ms), 1),
        "optimizer_ms": round(statistics.median(optimizer_ms), 2),
        "peak_gib": None if peak is None else round(peak / GIB, 3),
        "reserved_gib": None if reserved is None else round(reserved / GIB, 3),
        "parts_gib": {
            "weights": round(weights / GIB, 3),
            "values and positions" if method == "ours" else "adapters": round(held / GIB, 3),
            "moments": round(state / GIB, 3),
            "activations and gradients": round(max(0, (peak or 0) - weights - held - state) / GIB, 3),
        },
        **check,
        "card": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def verified_step(model: nn.Module, args: argparse.Namespace, ids: Tensor, device: torch.device) -> dict:
    """Time and peak of the first step after `sparsify`, which compares each layer's gradient with autograd's.

    Masks are attached anew for it, when nothing is compiled or tuned any more; the peak of the whole run covers its own
    first step too.
    """
    from speft_optim import desparsify

    desparsify(model)
    optimizer, _ = attach_ours(model, args)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    whole, _ = take_step(model, optimizer, ids, device)
    peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else None
    return {"verified_step_ms": round(whole, 1), "verified_step_peak_gib": None if peak is None else round(peak, 3)}


def take_step(model: nn.Module, optimizer, ids: Tensor, device: torch.device) -> tuple[float, float]:
    """One training step; milliseconds of all of it, and between the end of backward and that of the optimizer's step.

    As in a training loop nothing waits for the card between the two.
    """
    settle(device)
    begin = time.perf_counter()
    loss_of(model, ids).backward()
    middle = mark(device)
    optimizer.step()
    end = mark(device)
    optimizer.zero_grad(set_to_none=True)
    settle(device)
    return 1e3 * (time.perf_counter() - begin), end - middle if device.type == "cpu" else middle.elapsed_time(end)


def mark(device: torch.device) -> float | torch.cuda.Event:
    """A point in time: on a card an event in its queue, elsewhere milliseconds."""
    if device.type == "cpu":
        return 1e3 * time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean next-token loss, with the head's logits in chunks."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    softcap = getattr(model.config, "final_logit_softcapping", None)
    flat, targets = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    return linear_cross_entropy(flat, model.lm_head.weight, targets, softcap=softcap) / targets.numel()


def limit_memory(most_bytes: float) -> None:
    """Let this process use so many bytes of the card only; does nothing without a card."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, most_bytes / total))


def settle(device: torch.device) -> None:
    """Wait for the card."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def allocated(device: torch.device, model: nn.Module) -> int:
    """Bytes the model takes: measured on a card, counted elsewhere."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


# ---------------------------------------------------------------------------------------------------------------------
# Models and methods


def shaped(name: str, layers: int | None = None):
    """The configuration of a shape, with fewer blocks where asked for."""
    config = configuration(name, max_position_embeddings=8192, use_cache=False)
    if layers:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    return config


def build(name: str, precision: str, device: torch.device, layers: int | None = None) -> nn.Module:
    """A random model of a shape, laid out without data and then made on the card one tensor at a time."""
    import accelerate
    import transformers

    config = shaped(name, layers)
    # Gemma 2 caps its attention scores, which the fused kernels leave out.
    attention = "eager" if config.model_type == "gemma2" else "sdpa"
    # Parameters without data, but buffers with it: tables and scales that only their constructors fill.
    with accelerate.init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention
        )
    for path, module in list(model.named_modules()):
        if precision != "bf16" and path.rpartition(".")[2] in PROJECTIONS:
            model.set_submodule(path, quantized_linear(module, precision, device))
            continue
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = random_parameter(parameter.shape, device)
    for module in model.modules():
        module._buffers.update({k: None if b is None else b.to(device) for k, b in module._buffers.items()})
    model.tie_weights()
    if lost := [key for key, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]:
        raise RuntimeError(f"{lost[0]} has no data; this version of transformers lays the model out in another way")
    return model.requires_grad_(False)


def use_liger(model: nn.Module) -> None:
    """Liger's kernels for what lies between the linear layers; the loss stays `loss_of`."""
    from transformers.integrations.liger import apply_liger_kernel

    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})


def random_parameter(shape: torch.Size, device: torch.device) -> nn.Parameter:
    """Weights as initialised, norms at one."""
    data = torch.empty(shape, dtype=torch.bfloat16, device=device)
    return nn.Parameter(data.normal_(0, 0.02) if len(shape) > 1 else data.fill_(1.0), requires_grad=False)


def quantized_linear(plain: nn.Linear, precision: str, device: torch.device) -> nn.Module:
    """A bitsandbytes layer with random weights of the plain one's shape."""
    import bitsandbytes as bnb

    weight = random_parameter(plain.weight.shape, device)
    sizes, bias = (plain.in_features, plain.out_features), plain.bias is not None
    if precision == "int8":
        layer = bnb.nn.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False, device="meta")
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        layer.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    else:
        layer = bnb.nn.Linear4bit(
            *sizes, bias=bias, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4", device="meta"
        )
        layer.weight = bnb.nn.Params4bit(
            weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
        ).to(device)
    if bias:
        layer.bias = random_parameter(plain.bias.shape, device)
    return layer


def attach_nothing(model: nn.Module, args: argparse.Namespace) -> tuple[torch.optim.Optimizer, int]:
    """A frozen model; its quantised layers are computed as ours are."""
    from speft_optim import patch_model

    patch_model(model)
    # An optimizer of nothing, so that all modes share one step; the scalar belongs to no module.
    return torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.0), 0


def attach_ours(model: nn.Module, args: argparse.Namespace) -> tuple[torch.optim.Optimizer, int]:
    """SparseAdamW over random masks of the seven projections."""
    from speft_optim import SparseAdamW, sparsify

    masks = random_masks(model, args.density, args.masks)
    values = sparsify(model, masks)
    held = sum(value.nbytes for value in values) + sum(mask.nbytes for mask in masks.values())
    return SparseAdamW(values, lr=1e-5, state_bits=args.state_bits), held


def random_masks(model: nn.Module, density: float, kind: str):
    """Masks of the seven projections: the same share of every row, or concentrated as gradients choose them."""
    from speft_optim import Mask, Masks, find_targets

    masks = Masks()
    for name, target in find_targets(model, PROJECTIONS).items():
        rows, columns = target.matrix_shape
        device = target.device
        if kind == "uniform":
            count = max(1, round(density * columns))
            columns_of = torch.rand(rows, columns, device=device).topk(count, dim=1).indices.sort(dim=1).values
            starts = torch.arange(rows, device=device)[:, None] * columns
            positions = (starts + columns_of).flatten()
        else:
            positions = concentrated(name.split(".")[-2], rows, columns, density, device)
        masks[name] = Mask(positions.to(torch.int32), (rows, columns))
    return masks


def concentrated(projection: str, rows: int, columns: int, density: float, device: torch.device) -> Tensor:
    """Positions drawn with the measured shares of the rows and columns of a projection, each set in random order.

    `mask_profile.json` has these shares, over their mean, of gradient masks of SmolLM2-135M at two densities.
    """
    profile = json.loads(MASK_PROFILE.read_text(encoding="utf-8"))["quantiles"]
    shares = profile[min(profile, key=lambda known: abs(math.log(float(known) / density)))][projection]
    chances = torch.zeros(rows, columns, device=device)
    for size, quantiles, shape in ((rows, shares["rows"], (-1, 1)), (columns, shares["cols"], (1, -1))):
        quantiles = torch.tensor(quantiles, device=device)
        place = torch.rand(size, device=device) * (len(quantiles) - 1)
        share = torch.lerp(quantiles[place.long()], quantiles[place.ceil().long()], place.frac())
        chances += share.clamp(min=1e-6).log().view(shape)
    # The k largest of log p + Gumbel noise are k draws without replacement with chances p.
    noise = torch.rand(rows, columns, device=device).clamp_(1e-20, 1 - 1e-7).log_().neg_().log_().neg_()
    return chances.add_(noise).flatten().topk(round(density * rows * columns)).indices


def attach_lora(model: nn.Module, args: argparse.Namespace) -> tuple[torch.optim.Optimizer, int]:
    """PEFT's LoRA, injected in place, adapters in bf16 as QLoRA trains them."""
    import peft

    options = dict(r=args.rank, lora_alpha=2 * args.rank, target_modules=PROJECTIONS)
    peft.inject_adapter_in_model(peft.LoraConfig(**options), model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.to(torch.bfloat16)
    fused = trained[0].is_cuda
    return torch.optim.AdamW(trained, lr=1e-5, fused=fused), sum(parameter.nbytes for parameter in trained)


ATTACH = {"frozen": attach_nothing, "ours": attach_ours, "lora": attach_lora, "qlora": attach_lora}


# ---------------------------------------------------------------------------------------------------------------------
# Report


def table(rows: list[dict]) -> str:
    """The rows for people; times also as multiples of the frozen bf16 step."""
    floor = next((row["step_ms"] for row in rows if row["mode"] == "frozen-bf16" and "error" not in row), None)
    lines = [
        "| mode | trained | ms a step | / floor | optimizer ms | peak GiB | estimate |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sizes = [f"{row[key]:.2f}" if row.get(key) else "-" for key in ("peak_gib", "estimate_gib")]
        if "error" in row:
            cells = ["-", "-", "-", "-", row["error"], sizes[1]]
        else:
            ratio = f"{row['step_ms'] / floor:.2f}" if floor else "-"
            cells = [f"{row['trained']:,}", f"{row['step_ms']:.0f}", ratio, f"{row['optimizer_ms']:.1f}", *sizes]
        lines.append("| " + " | ".join([row["mode"], *cells]) + " |")
    return "\n".join(lines)


def draw(rows: list[dict], path: Path, title: str) -> None:
    """A stacked bar for each mode: where the bytes are at the peak."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = ["weights", "values and positions", "adapters", "moments", "activations and gradients"]
    bottom = [0.0] * len(rows)
    for number, name in enumerate(names):
        sizes = [row["parts_gib"].get(name, 0.0) for row in rows]
        axes.bar([row["mode"] for row in rows], sizes, bottom=bottom, label=name, color=f"C{number}")
        bottom = [low + size for low, size in zip(bottom, sizes, strict=True)]
    for place, (row, total) in enumerate(zip(rows, bottom, strict=True)):
        axes.annotate(
            f"{row['peak_gib'] or total:.2f}", (place, total), xytext=(0, 3), textcoords="offset points", ha="center"
        )
    axes.set(ylabel="GiB at the peak", title=title)
    axes.tick_params(axis="x", rotation=20)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
