"""The trained part of each mode of the benchmark: nothing, masked entries by this library, or LoRA by peft."""

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from recipes import moving
from recipes.random_models import PROJECTIONS
from speft_optim import Mask, Masks, SparseAdamW, find_targets, patch_model, sparsify

# An optimizer, and the bytes that the trained part holds beside it.
Attached = tuple[torch.optim.Optimizer, int]
MASK_PROFILE = Path(__file__).with_name("mask_profile.json")


def attach_nothing(model: nn.Module, args: argparse.Namespace, device: torch.device) -> Attached:
    """Freeze the model; its quantised layers are computed as in ours."""
    patch_model(model)
    # An optimizer over a scalar outside the model lets all modes share one training step.
    return torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.0), 0


def attach_ours(model: nn.Module, args: argparse.Namespace, device: torch.device) -> Attached:
    """Attach random masks of the seven projections; return SparseAdamW and the bytes of values and positions."""
    values = sparsify(model, random_masks(model, args.density, args.masks, device))
    optimizer = SparseAdamW(values, lr=1e-5, state_bits=args.state_bits)
    return optimizer, held_by(optimizer)


def attach_moving(model: nn.Module, args: argparse.Namespace, device: torch.device) -> Attached:
    """Attach the same masks, a group of which moves every few steps; return as `attach_ours`."""
    masks = random_masks(model, args.density, args.masks, device)
    # Without waiting, gradients are summed in each step, as they are of a large model, which has many groups.
    steps = dict(window=moving.WINDOW, interval=moving.WINDOW)
    options = dict(salience="snip", power=moving.power_for(args.density), state_bits=args.state_bits, lr=1e-5)
    optimizer, _ = moving.attach(model, masks, **steps, **options)
    return optimizer, held_by(optimizer)


def held_by(optimizer: SparseAdamW) -> int:
    """Return the bytes of values and positions."""
    held = optimizer.memory_summary()
    return held["values"] + held["positions"]


def random_masks(model: nn.Module, density: float, kind: str, device: torch.device) -> Masks:
    """Draw masks of the seven projections: the same share of every row, or concentrated as gradients choose them.

    Args:
        model: the model, on any device.
        density: share of the entries of each weight.
        kind: `uniform` or `gradient`.
        device: the device that draws the masks and holds them.
    """
    masks = Masks()
    for name, target in find_targets(model, PROJECTIONS).items():
        rows, columns = target.matrix_shape
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
    """Draw positions with the measured shares of a projection's rows and columns, each set in random order.

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


def attach_lora(model: nn.Module, args: argparse.Namespace, device: torch.device) -> Attached:
    """Inject PEFT's LoRA in place, in bf16 as QLoRA trains it; return AdamW and the bytes of the adapters.

    The adapters are on `device`, wherever the base is.
    """
    import peft

    options = dict(r=args.rank, lora_alpha=2 * args.rank, target_modules=PROJECTIONS)
    peft.inject_adapter_in_model(peft.LoraConfig(**options), model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.to(device, torch.bfloat16)
    fused = trained[0].is_cuda
    return torch.optim.AdamW(trained, lr=1e-5, fused=fused), sum(parameter.nbytes for parameter in trained)


ATTACH = {
    "frozen": attach_nothing,
    "ours": attach_ours,
    "moving": attach_moving,
    "lora": attach_lora,
    "qlora": attach_lora,
}
