"""Cross-entropy of a large vocabulary without its logits: head and loss together, a chunk of tokens at a time.

The logits of 2 x 2048 tokens over 128,256 words take 1 GiB in bf16, twice that in fp32, and as much again for their
gradient, so they would determine the peak memory of a checkpointed run. Here the loss and the input gradient of a chunk
are both computed from its logits in forward, and the logits are freed. The head must be frozen, and the loss can be
differentiated only once.

Chunks are rows of a (tokens, width) matrix. Chunks along the length of (batch, length, width) would be several times
slower: if a weight requires no gradient, PyTorch computes the product with such a strided chunk as a batched product,
for which it copies the head in forward and backward.
"""

import torch
from torch import Tensor, nn

# The losses of PyTorch and transformers leave out tokens with this label.
IGNORED = -100
CHUNK_BYTES = 96 * 2**20
# In these architectures of transformers the logits are the product with the head, at most capped.
DECODERS = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")


def is_known(model: nn.Module) -> bool:
    """Tell whether the model's logits are the product of its decoder's hidden states and its head, at most capped."""
    return getattr(getattr(model, "config", None), "model_type", None) in DECODERS


def frozen_head(model: nn.Module) -> nn.Module | None:
    """Return the head if `head_loss` can replace its logits and their loss, else None.

    It cannot for an unknown architecture, a trained head, or a head with hooks, which would see a loss as its output.
    """
    if not is_known(model):
        return None
    head = model.get_output_embeddings()
    hooked = head._forward_hooks or head._forward_pre_hooks
    return None if hooked or head.weight.requires_grad else head


def head_loss(head: nn.Module, hidden: Tensor, targets: Tensor, *, softcap: float | None = None) -> Tensor:
    """Compute `linear_cross_entropy` with the weight of a frozen head, inside a call of the head.

    A weight that is kept in host memory, or divided among processes, is whole and beside `hidden` only then.

    Args:
        head: a linear layer without bias, (vocabulary, width).
        hidden: see `linear_cross_entropy`, as are `targets` and `softcap`.
        targets: (tokens,).
        softcap: the cap of the logits.
    """
    # accelerate's hooks are in the place of `forward`, and call the module's own under this name.
    name = "_old_forward" if hasattr(head, "_old_forward") else "forward"
    covered = head.__dict__.get(name)
    setattr(head, name, lambda rows: linear_cross_entropy(rows, head.weight, targets, softcap=softcap))
    try:
        return head(hidden)
    finally:
        delattr(head, name)
        if covered is not None:
            setattr(head, name, covered)


def linear_cross_entropy(
    hidden: Tensor, head: Tensor, targets: Tensor, *, softcap: float | None = None, chunk_bytes: int = CHUNK_BYTES
) -> Tensor:
    """Compute cross-entropy of `hidden @ head.T` against `targets`, summed over the tokens with a label.

    Args:
        hidden: (tokens, width), in the dtype that the head computes in.
        head: (vocabulary, width), frozen.
        targets: (tokens,) class numbers; -100 for tokens without a label.
        softcap: cap the logits to `softcap * tanh(logits / softcap)`, as Gemma 2 does.
        chunk_bytes: largest fp32 chunk of logits; one and a half times this is alive at once, with a cap twice.

    Returns:
        The sum, a scalar in fp32.
    """
    return _LinearCrossEntropy.apply(hidden, head.detach(), targets, softcap, chunk_bytes)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, softcap: float | None, chunk_bytes: int) -> Tensor:
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        step = max(1, chunk_bytes // (4 * head.shape[0]))
        for first in range(0, len(targets), step):
            rows = slice(first, first + step)
            out = None if gradient is None else gradient[rows]
            total += chunk_loss(hidden[rows], head, targets[rows], softcap, out)
        ctx.save_for_backward(*([] if gradient is None else [gradient]))
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor):
        # The gradient was computed in forward without a graph, so a second derivative would silently be wrong.
        if torch.is_grad_enabled():
            raise RuntimeError("linear_cross_entropy has no second derivative; take the loss from the model's logits")
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None, None


def _chunk_loss(hidden: Tensor, head: Tensor, targets: Tensor, softcap: float | None, out: Tensor | None) -> Tensor:
    """Return the summed loss of one chunk of tokens, and write its gradient to `out`, (tokens, width), or None."""
    counted, place, slope = targets != IGNORED, targets.clamp(min=0)[:, None], None
    logits = (hidden @ head.t()).float()
    if softcap is not None:
        tanh = logits.div_(softcap).tanh_()
        slope = None if out is None else tanh.square().neg_().add_(1)
        logits = tanh.mul_(softcap)
    # In place, since `logsumexp` takes as much memory again.
    largest, chosen = logits.amax(1, keepdim=True), logits.gather(1, place)
    total = logits.sub_(largest).exp_().sum(1, keepdim=True)
    loss = ((largest + total.log() - chosen).squeeze(1) * counted).sum()
    if out is not None:
        # d loss / d logits = softmax(logits) - one-hot(target), times the slope of the cap
        weight = counted[:, None].to(logits.dtype)
        logits.mul_(weight / total).scatter_add_(1, place, -weight)
        if slope is not None:
            logits.mul_(slope)
            del slope
        torch.mm(logits.to(head.dtype), head, out=out)
    return loss


# This is the function that is called; `recipes.compiled` replaces it by a compiled one.
chunk_loss = _chunk_loss
