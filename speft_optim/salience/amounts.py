"""How many entries each weight keeps, from a density or a budget."""

from collections.abc import Mapping

from speft_optim.checks import check_share, check_whole, is_whole
from speft_optim.salience.topk import BestEntries


def amount_kept(
    sizes: dict[str, int], scope: str, density: float | None, budget: int | Mapping[str, int] | None
) -> int | Mapping[str, int]:
    """Return how many entries to keep: of each weight, by name, in local scope, and of all together in global scope.

    Args:
        sizes: entries of each weight.
        scope: "local" or "global".
        density: share of the entries to keep, or None.
        budget: the number of entries to keep, in local scope also for each weight by name; or None.
    """
    # Products of numpy integers can overflow, those of Python integers cannot.
    budget = int(budget) if is_whole(budget) else budget
    density = None if density is None else float(density)
    if scope == "local":
        return share_out(sizes, density, budget)
    return budget or round(density * sum(sizes.values()))


def candidate_bytes(sizes: Mapping[str, int], amount: int | Mapping[str, int], score_bytes: int) -> int:
    """Return the most bytes that candidates for the masks take during selection.

    Args:
        sizes: entries of each weight.
        amount: how many to keep of each weight, by name: candidates are those of one weight, beside finished masks. Or
            how many of all weights together, whose candidates are then held together.
        score_bytes: bytes of a score.
    """
    if not isinstance(amount, Mapping):
        return BestEntries.bytes(amount, sum(sizes.values()), score_bytes)
    largest = max(BestEntries.bytes(amount[name], size, score_bytes) for name, size in sizes.items())
    return largest + 4 * sum(amount.values())


def share_out(
    sizes: dict[str, int], density: float | None, budget: int | Mapping[str, int] | None
) -> Mapping[str, int]:
    """Return how many entries each weight keeps.

    Args:
        sizes: entries of each weight.
        density: the share of each to keep, rounded to whole entries; or None.
        budget: the number for each weight, or a number for all together, shared out in proportion to the sizes by the
            method of largest remainders; or None.
    """
    if isinstance(budget, Mapping):
        return {name: int(budget[name]) for name in sizes}
    if density is not None:
        return {name: round(density * size) for name, size in sizes.items()}
    total = sum(sizes.values())
    shares = {name: budget * size // total for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: -(budget * sizes[name] % total))
    for name in by_remainder[: budget - sum(shares.values())]:
        shares[name] += 1
    return shares


def check_amount(
    density: float | None, budget: int | Mapping[str, int] | None, sizes: dict[str, int], scope: str
) -> None:
    """Refuse a density or budget that is out of range, and both or neither.

    Args:
        density: share of the targeted entries, or None.
        budget: number of entries, for each weight by name in local scope; or None.
        sizes: entries of each targeted weight.
        scope: "local" or "global".

    Raises:
        ValueError: not exactly one is given, or it is out of range.
        TypeError: it is not a number.
    """
    if isinstance(budget, Mapping):
        return _check_shares(budget, sizes, scope, density)
    total = sum(sizes.values())
    if (density is None) == (budget is None):
        raise ValueError(f"Give exactly one of density and budget; got density={density}, budget={budget}.")
    if density is not None:
        check_share("density", density, "0.01 keeps one entry in a hundred")
    else:
        check_whole("budget", budget, usual=f"{max(1, total // 100)} entries")
        if not 1 <= budget <= total:
            raise ValueError(
                f"budget={budget:,} is outside 1..{total:,}, the number of targeted entries; choose one of these."
            )


def _check_shares(budget: Mapping[str, int], sizes: dict[str, int], scope: str, density: float | None) -> None:
    """Refuse a budget for each weight that does not fit the targets or the other arguments."""
    if scope != "local" or density is not None:
        raise ValueError(f"A budget for each weight needs scope='local' and density=None; got {scope!r} and {density}.")
    if budget.keys() != sizes.keys():
        odd = sorted(budget.keys() ^ sizes.keys())[0]
        raise ValueError(f"budget must name exactly the targeted weights; {odd} is only in one of the two.")
    for name, count in budget.items():
        if not is_whole(count) or not 0 <= count <= sizes[name]:
            raise ValueError(f"budget of {name} is {count!r}; pass a whole number of entries in 0..{sizes[name]:,}.")
