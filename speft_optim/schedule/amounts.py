"""How many entries a schedule keeps after a number of steps."""

from collections.abc import Callable

from speft_optim.checks import check_share
from speft_optim.weights.sparse_weight import SparseWeight


def trained(weights: list[SparseWeight]) -> int:
    """Return how many entries are trained now, over all weights."""
    return sum(len(weight.mask) for weight in weights)


def amount_at(
    step: int, weights: list[SparseWeight], scope: str, density: Callable[[int], float] | None, entries: int
) -> int | dict[str, int]:
    """Return how many entries to keep, over all weights in global scope, of each weight in local scope.

    Args:
        step: the number of steps taken.
        weights: the candidates.
        scope: "local" or "global".
        density: from the number of steps to the share of entries; None to keep as many as are trained.
        entries: how many entries were trained at the start, over all weights.

    Raises:
        ValueError: `density` returned a number outside (0, 1].
        TypeError: it returned something else.
    """
    if density is None:
        return entries if scope == "global" else {weight.name: len(weight.mask) for weight in weights}
    share = density(step)
    check_share(f"density({step})", share, "a schedule must give a share, such as 0.01")
    if scope == "global":
        return max(1, round(share * sum(weight.mask.shape.numel() for weight in weights)))
    return {weight.name: round(share * weight.mask.shape.numel()) for weight in weights}
