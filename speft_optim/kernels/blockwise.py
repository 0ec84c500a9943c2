"""Numbers in eight bits: a code per number and one fp32 scale per block (Dettmers et al., 2022, arXiv 2110.02861).

The codes are theirs: dense near 1 and spread over seven decades below, so that small numbers beside large ones keep
some digits. Rounding is to the nearest code. bitsandbytes' own CPU routine was rejected: it looks codes up in a coarse
table, reads a zero as 1.4e-5, and so would not agree with the GPU.
"""

import functools

import torch
from torch import Tensor

BLOCK = 256


@functools.cache
def dynamic_codes(signed: bool, device: torch.device) -> Tensor:
    """The sorted code book, fp32, in [-1, 1] with 0, or (unsigned) in (0, 1]; 256 numbers.

    The unsigned one has no zero, since what it stores is divided by: the smallest code stands half-way down instead.
    """
    numbers = [1.0]
    for decade in range(7):
        bounds = torch.linspace(0.1, 1.0, 2 ** (decade if signed else decade + 1) + 1, dtype=torch.float64)
        means = 10.0 ** (decade - 6) * (bounds[1:] + bounds[:-1]) / 2
        numbers += means.tolist() + ((-means).tolist() if signed else [])
    numbers.append(0.0 if signed else min(numbers) / 2)
    return torch.tensor(sorted(numbers), dtype=torch.float32, device=device)


@functools.cache
def code_bounds(signed: bool, device: torch.device) -> Tensor:
    """Half-way between neighbours of the code book: (255,) fp32, below which a number gets which code."""
    codes = dynamic_codes(signed, device)
    return (codes[1:] + codes[:-1]) / 2


def quantize_blockwise(numbers: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes (k,) uint8 and scales (blocks,) fp32 of `numbers` (k,) fp32; a block's scale is its largest magnitude."""
    blocks = -(-numbers.numel() // BLOCK)
    padded = torch.nn.functional.pad(numbers, (0, blocks * BLOCK - numbers.numel())).view(blocks, BLOCK)
    scales = padded.abs().amax(dim=1)
    # A block of zeros has scale 0, and any code times 0 is 0.
    share = padded / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
    nearest = torch.bucketize(share, code_bounds(signed, numbers.device), out_int32=True)
    return nearest.view(-1)[: numbers.numel()].to(torch.uint8), scales


def dequantize_blockwise(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The (k,) fp32 numbers that codes (k,) uint8 and scales (blocks,) fp32 stand for."""
    numbers = dynamic_codes(signed, codes.device)[codes.int()]
    return numbers.mul_(scales.repeat_interleave(BLOCK)[: codes.numel()])
