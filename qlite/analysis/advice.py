"""What rank to use next time: what a finished adapter's spectrum says of it, and what it does not say."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from qlite.analysis.spectrum import SHARE

NEARLY_ALL = 0.75
"""Of the trained rank: where more is needed, the rank was used to its end, and the spectrum cannot say where it would have ended."""
LIMITS = (
    "This is the size of what was changed, and no more: whether the last tenth matters, only held-out figures of a run at that rank tell "
    "(python -m qlite.train RECIPE method.rank=...). A run at another rank finds its own directions, and what it needs depends on the rows "
    "and on how long it trains."
)
SCALING = "alpha = old alpha x new rank / old rank, with rslora by the root of the ranks"


@dataclass(frozen=True)
class Need:
    """What linears of one name, "q_proj" of all blocks, have and need."""

    name: str
    trained: int
    """The largest rank among them."""
    needed: int
    """That which keeps SHARE of the energy in each of them."""
    layers: int

    @property
    def advised(self) -> int:
        """The power of two from ``needed`` on, as ranks usually are, or the trained rank where that is less."""
        return min(self.trained, 1 << (self.needed - 1).bit_length())

    @property
    def is_at_its_end(self) -> bool:
        """Whether nearly all of the trained rank is needed."""
        return self.needed > NEARLY_ALL * self.trained


def advise(needs: Iterable[Need]) -> list[str]:
    """Return the advice in whole sentences, with the keys to set."""
    needs = list(needs)
    at_end = [need for need in needs if need.is_at_its_end and need.trained > 1]
    others = [need for need in needs if need not in at_end]
    lines = []
    if others:
        lines.append(_ranks(others, at_end))
    if at_end:
        names = ", ".join(f"{need.name} ({need.needed} of {need.trained})" for need in at_end)
        larger = 2 * max(need.trained for need in at_end)
        lines.append(
            f"{names}: {SHARE:.0%} of the energy needs nearly all of the rank that there was, so it may have been too small; what a larger "
            f"one would add cannot be seen here, only tried: method.rank = {larger}"
        )
    return [*lines, LIMITS]


def _ranks(needs: list[Need], at_end: list[Need]) -> str:
    """Return the sentence on the ranks that are enough; linears ``at_end`` keep theirs."""
    counts = Counter()
    for need in needs:
        counts[need.advised] += need.layers
    usual = max(counts, key=lambda rank: (counts[rank], rank))
    other = {need.name: need.advised for need in needs} | {need.name: need.trained for need in at_end}
    own = {name: rank for name, rank in other.items() if rank != usual}
    most = max(need.needed for need in needs if need.advised == usual)
    which = "" if len(counts) == 1 and not at_end else f" of {', '.join(need.name for need in needs if need.advised == usual)}"
    line = f"{SHARE:.0%} of the energy{which} lies in rank {most} or less: method.rank = {usual}"
    if own:
        table = ", ".join(f"{name} = {rank}" for name, rank in own.items())
        line += f", and for the others: method.rank_per_target = {{{table}}}"
    if all(need.advised == need.trained for need in needs):
        line += ", as it was"
    keys = "method.alpha along with it" + (", and method.alpha_per_target for those with a rank of their own" if own else "")
    return f"{line}. Keep the scaling, alpha / rank, as it was: set {keys}: {SCALING}"
