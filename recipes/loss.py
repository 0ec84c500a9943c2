"""Cross-entropy of a large vocabulary without its logits: head and loss together, a chunk of tokens at a time.

The logits of 2 x 2048 tokens over 128,256 words take 1 GiB in bf16, twice that in fp32, and as much again for their
gradient: they would set the peak of a checkpointed run. Here a chunk's logits give its loss and its input gradient at
once, in forward, and are gone. The head is frozen, as everywhere in these recipes.
"""

import torch
from torch import Tensor

IGNORED = -100
CHUNK_BYTES = 128 * 2**20


def linear_cross_entropy(
    hidden: Tensor, head: Tensor, targets: Tensor, *, softcap: float | None = None, chunk_bytes: int = CHUNK_BYTES
) -> Tensor:
    """Cross-entropy of `hidden @ head.T` against `targets`, summed over the tokens that count.

    Args:
        hidden: (tokens, width), in the dtype that the head computes in.
        head: (vocabulary, width), frozen.
        targets: (tokens,) class numbers; -100 does not count.
        softcap: cap the logits to `softcap * tanh(logits / softcap)`, as Gemma 2 does.
        chunk_bytes: largest fp32 chunk of logits; about three times this is alive at once.

    Returns:
        The sum, a scalar in fp32.
    """
    return _LinearCrossEntropy.apply(hidden, head.detach(), targets, softcap, chunk_bytes)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, softcap: float | None, chunk_bytes: int) -> Tensor:
        wanted = hidden.requires_grad
        gradient = torch.empty_like(hidden) if wanted else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        step = max(1, chunk_bytes // (4 * head.shape[0]))
        for first in range(0, len(targets), step):
            rows, target = slice(first, first + step), targets[first : first + step]
            counted = target != IGNORED
            place = target.clamp(min=0)[:, None]
            logits = (hidden[rows] @ head.t()).float()
            slope = None
            if softcap is not None:
                tanh = logits.div_(softcap).tanh_()
                slope = 1 - tanh.square() if wanted else None
                logits = tanh * softcap
            normaliser = logits.logsumexp(1, keepdim=True)
            total += ((normaliser - logits.gather(1, place)).squeeze(1) * counted).sum()
            if wanted:
                # d loss / d logits = softmax(logits) - one-hot(target), times the slope of the cap
                logits.sub_(normaliser).exp_().scatter_add_(1, place, -torch.ones_like(place, dtype=logits.dtype))
                logits.mul_(counted[:, None])
                if slope is not None:
                    logits.mul_(slope)
                torch.mm(logits.to(head.dtype), head, out=gradient[rows])
        ctx.save_for_backward(*([gradient] if wanted else []))
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None, None
