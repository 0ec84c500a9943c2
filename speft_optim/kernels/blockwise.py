"""Block-wise quantisation to eight bits: a code for each number and an fp32 scale for each block of 256.

The code book is that of Dettmers et al. (2022, arXiv 2110.02861): dense near 1, and spread over seven decades below, so
that small numbers beside large ones keep some digits. Numbers are rounded to the nearest code. bitsandbytes' own CPU
routine was rejected: it looks codes up in a coarse table and reads a zero as 1.4e-5, which would differ from the GPU.
"""

import functools

import torch
from torch import Tensor

BLOCK = 256


@functools.cache
def dynamic_codes(signed: bool, device: torch.device) -> Tensor:
    """Return the numbers that the codes 0 to 255 represent, (256,) fp32, sorted.

    They lie in [-1, 1], zero included, or (unsigned) in (0, 1]. The unsigned book has no zero, since AdamW divides by
    the root of what it stores; its smallest number is half the one that would come next to zero.
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
    """Return the midpoints between neighbours of the code book, (255,) fp32, where rounding goes to the next code."""
    codes = dynamic_codes(signed, device)
    return (codes[1:] + codes[:-1]) / 2


def blocks_in(count: int) -> int:
    """Return how many blocks so many numbers take, the last one perhaps not whole."""
    return -(-count // BLOCK)


def quantize_blockwise(numbers: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Quantise `numbers`, block by block of 256.

    Args:
        numbers: (k,) fp32.
        signed: whether numbers may be negative or zero; else a zero is read back as a small positive number.

    Returns:
        Codes (k,) uint8 and scales (blocks,) fp32; a block's scale is its largest magnitude.
    """
    blocks = blocks_in(numbers.numel())
    padded = torch.nn.functional.pad(numbers, (0, blocks * BLOCK - numbers.numel())).view(blocks, BLOCK)
    scales = padded.abs().amax(dim=1)
    # A block of zeros has scale 0 and must not divide by it; any of its codes times 0 is 0.
    share = padded / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
    nearest = torch.bucketize(share, code_bounds(signed, numbers.device), out_int32=True)
    return nearest.view(-1)[: numbers.numel()].to(torch.uint8), scales


def dequantize_blockwise(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """Return the numbers, (k,) fp32, of codes (k,) uint8 and scales (blocks,) fp32 from `quantize_blockwise`."""
    numbers = dynamic_codes(signed, codes.device)[codes.int()]
    return numbers.mul_(scales.repeat_interleave(BLOCK)[: codes.numel()])
