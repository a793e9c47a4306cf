"""All that a study of an adapter has found, linear by linear, gathered by what the linears are called, and as rows for files."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import mean

from torch import Tensor

from qlite.analysis.advice import Need, advise
from qlite.analysis.amplification import Amplification, amplification
from qlite.analysis.similarity import Overlap, by_chance
from qlite.analysis.spectrum import SHARE, Spectrum
from qlite.methods.low_rank import LowRank
from qlite.reporting.scale import evenly

NEARLY_ALL = 0.99
"""Of the energy, told beside SHARE."""
MOST_RANKS = 32
"""Of each adapter, for which phi is written and drawn: of more, some evenly spread."""


@dataclass(frozen=True)
class Linear:
    """What an adapter does to one linear."""

    name: str
    rank: int
    norm: float
    """||dW||_F"""
    share: float
    """Of the whole adapter's energy, the sum of all ||dW||_F^2."""
    effective_rank: float
    kept: tuple[float, ...]
    """Share of its energy in rank 1, 2, ..."""
    needed: int
    """Rank for SHARE of its energy."""
    nearly_all: int
    """Rank for NEARLY_ALL of it."""

    @property
    def leaf(self) -> str:
        """What it is called in its block."""
        return self.name.rpartition(".")[2]

    @property
    def block(self) -> int:
        """Its block's number; 0 where its name has none."""
        found = re.search(r"\.(\d+)\.", self.name)
        return int(found[1]) if found else 0


@dataclass(frozen=True)
class Findings:
    """A study of one adapter, beside another one and over its base where these were given."""

    adapter: str
    other: str | None
    base: str | None
    """What its base is called."""
    linears: tuple[Linear, ...]
    overlaps: dict[str, Overlap] = field(default_factory=dict)
    amplified: dict[str, Amplification] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    no_rank: str = ""
    """Why no rank is to be advised, where that is so."""

    @property
    def leaves(self) -> list[str]:
        """What its linears are called, each name once, in the model's order."""
        return list(dict.fromkeys(linear.leaf for linear in self.linears))

    def of(self, leaf: str) -> list[Linear]:
        """Return the linears of that name, block by block."""
        return [linear for linear in self.linears if linear.leaf == leaf]

    def advice(self) -> list[str]:
        """Return what rank to use next time, in sentences."""
        if self.no_rank:
            return [self.no_rank]
        needs = [Need(leaf, max(each.rank for each in own), max(each.needed for each in own), len(own)) for leaf, own in self._by_leaf()]
        return advise(needs)

    def kept(self, leaf: str | None = None) -> list[float]:
        """Return the share of the energy of all linears, or of those of one name, that is left if each is cut to rank 1, 2, ..."""
        own = [linear for linear in self.linears if leaf in (None, linear.leaf)]
        total = sum(each.norm**2 for each in own)
        longest = max(each.rank for each in own)
        if not total:  # nothing is lost of nothing, as Spectrum.kept has it
            return [1.0] * longest
        return [sum(each.norm**2 * each.kept[min(rank, each.rank) - 1] for each in own) / total for rank in range(1, longest + 1)]

    def _by_leaf(self) -> list[tuple[str, list[Linear]]]:
        return [(leaf, self.of(leaf)) for leaf in self.leaves]

    def tables(self) -> dict[str, list[dict[str, object]]]:
        """Return the rows of each file by its name: one row a linear, but in phi one for each i and j."""
        found: dict[str, list[dict[str, object]]] = {
            "linears": [
                {
                    "linear": each.name, "rank": each.rank, "norm": each.norm, "share_of_energy": each.share,
                    "effective_rank": each.effective_rank,
                    f"rank_for_{SHARE:.0%}": each.needed, f"rank_for_{NEARLY_ALL:.0%}": each.nearly_all,
                }
                for each in self.linears
            ],
            "kept_energy": [
                {"linear": each.name, "rank": rank, "kept": kept} for each in self.linears for rank, kept in enumerate(each.kept, start=1)
            ],
            "overlap": [
                {
                    "linear": name, "cosine": each.cosine, "input_directions": each.inputs, "output_directions": each.outputs,
                    "phi_of_A": float(each.phi[-1, -1]), "by_chance": by_chance(*each.phi.shape, each.dimensions),
                }
                for name, each in self.overlaps.items()
            ],
            "phi": [
                {"linear": name, "i": i, "j": j, "phi": phi, "random": random}
                for name, each in self.overlaps.items()
                for i, j, phi, random in _cells(each)
            ],
            "amplification": [
                {
                    "linear": name, "rank": each.rank, "weight_norm": each.weight, "update_norm": each.update, "within_update": each.within,
                    "within_own": each.own, "within_random": each.random, "factor": each.factor, "factor_own": each.own_factor,
                    "factor_random": each.random_factor,
                }
                for name, each in self.amplified.items()
            ],
        }  # fmt: skip
        return {name: rows for name, rows in found.items() if rows}

    def as_record(self) -> dict:
        """Return all of it in JSON's types, but for the many numbers of phi, which are a table of their own."""
        tables = {name: rows for name, rows in self.tables().items() if name != "phi"}
        said = {"adapter": self.adapter, "other": self.other, "base": self.base, "notes": list(self.notes), "advice": self.advice()}
        return {**said, **tables}


def study(
    adapter: str, updates: dict[str, LowRank], told: Callable[[int, int], None], base: str | None = None, notes: Iterable[str] = ()
) -> Findings:
    """Return what the spectra of ``updates``, by the linear's dotted name, say; ``told`` hears how many of how many are done."""
    spectra = {}
    for name, update in updates.items():
        spectra[name] = Spectrum.of(update)
        told(len(spectra), len(updates))
    total = sum(each.norm**2 for each in spectra.values())
    linears = [
        Linear(
            name, len(each.sigma), each.norm, each.norm**2 / total if total else 0.0, each.effective_rank, tuple(each.kept),
            each.rank_for(SHARE), each.rank_for(NEARLY_ALL),
        )
        for name, each in spectra.items()
    ]  # fmt: skip
    return Findings(adapter, None, base, tuple(linears), notes=tuple(notes))


def compare(one: dict[str, LowRank], other: dict[str, LowRank], told: Callable[[int, int], None]) -> dict[str, Overlap]:
    """Return how alike two adapters are in each linear that both change and whose shapes agree."""
    both = [name for name in one if name in other]
    found = {}
    for name in both:
        found[name] = Overlap.of(one[name], other[name])
        told(len(found), len(both))
    return found


def amplify(updates: dict[str, LowRank], weight: Callable[[str], Tensor], told: Callable[[int, int], None]) -> dict[str, Amplification]:
    """Return how much each update amplifies its base; ``weight`` gives a linear's weight [out, in], and only one is held at a time."""
    found = {}
    for name, update in updates.items():
        found[name] = amplification(weight(name), Spectrum.of(update))
        told(len(found), len(updates))
    return found


def chosen(count: int) -> list[int]:
    """Return the ranks 1 .. ``count``, or MOST_RANKS of them, evenly spread, with the first and the last."""
    return evenly(list(range(1, count + 1)), MOST_RANKS)


def average(values: Iterable[float]) -> float:
    """Return the mean, 0 of nothing."""
    values = list(values)
    return mean(values) if values else 0.0


def _cells(overlap: Overlap) -> list[tuple[int, int, float, float]]:
    rows, columns = map(chosen, overlap.phi.shape)
    phi, random = overlap.phi.tolist(), overlap.chance.tolist()
    return [(i, j, phi[i - 1][j - 1], random[i - 1][j - 1]) for i in rows for j in columns]
