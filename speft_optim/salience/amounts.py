"""How many entries each weight keeps, from a density or a budget."""

from collections.abc import Mapping

from speft_optim.checks import check_share, check_whole, is_whole
from speft_optim.salience.topk import BestEntries


def candidate_bytes(sizes: Mapping[str, int], shares: Mapping[str, int] | None, total: int, score_bytes: int) -> int:
    """Return the most bytes that candidates for the masks take during selection.

    Args:
        sizes: entries of each weight.
        shares: how many each keeps, in local scope: candidates are those of one weight, beside finished masks. None in
            global scope: candidates of all weights are held together.
        total: how many entries are kept in all.
        score_bytes: bytes of a score.
    """
    if shares is None:
        return BestEntries.bytes(total, sum(sizes.values()), score_bytes)
    return max(BestEntries.bytes(shares[name], size, score_bytes) for name, size in sizes.items()) + 4 * total


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


def check_amount(density: float | None, budget: int | None, total: int) -> None:
    """Refuse a density or budget that is out of range, and both or neither.

    Args:
        density: share of the targeted entries, or None.
        budget: number of entries, or None.
        total: how many entries are targeted.

    Raises:
        ValueError: not exactly one is given, or it is out of range.
        TypeError: it is not a number.
    """
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


def check_shares(budget: Mapping[str, int], sizes: dict[str, int], scope: str, density: float | None) -> None:
    """Refuse a budget for each weight that does not fit the targets or the other arguments.

    Args:
        budget: entries to keep of each weight, by name.
        sizes: entries of each targeted weight.
        scope: must be "local".
        density: must be None.

    Raises:
        ValueError: a name is missing or not targeted, a number is out of range, or another argument excludes it.
    """
    if scope != "local" or density is not None:
        raise ValueError(f"A budget for each weight needs scope='local' and density=None; got {scope!r} and {density}.")
    if budget.keys() != sizes.keys():
        odd = sorted(budget.keys() ^ sizes.keys())[0]
        raise ValueError(f"budget must name exactly the targeted weights; {odd} is only in one of the two.")
    for name, count in budget.items():
        if not is_whole(count) or not 0 <= count <= sizes[name]:
            raise ValueError(f"budget of {name} is {count!r}; pass a whole number of entries in 0..{sizes[name]:,}.")
