"""What rounding leaves of an adapter: of the change that training made to each weight, how much is there after it was stored in few bits.

A change smaller than a step of the grid is not lost by that: where the base's weights lie anywhere between two steps, some of them cross
over, and on average the change is there, under noise. It is lost where they lie on the grid's own steps, because the base was stored on
it before: then all of them round back.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from qlite.formats.merged import Dense, joined
from qlite.methods.base import adapted_linears
from qlite.methods.whole import Whole
from qlite.model.originals import Originals
from qlite.quant.linear import dense_weight


@dataclass(frozen=True)
class Survival:
    """Of one weight or of several. D: the change that training made; E: the error that rounding makes of the changed weight."""

    change: float
    """|D|^2, Frobenius."""
    kept_change: float
    """<D + E, D>"""
    error: float
    """|E|^2"""

    @property
    def kept(self) -> float:
        """The share of D that is left: <D + E, D> / <D, D>. 1: all of it; 0: rounding has undone it."""
        return self.kept_change / max(self.change, 1e-30)

    @property
    def noise(self) -> float:
        """|E| / |D|: what rounding adds, beside what training did."""
        return (self.error / max(self.change, 1e-30)) ** 0.5

    def __add__(self, other: "Survival") -> "Survival":
        return Survival(self.change + other.change, self.kept_change + other.kept_change, self.error + other.error)


@torch.no_grad()
def survival(
    model: nn.Module, originals: Originals | None, rounding: Callable[[Dense], Iterable[Tensor]], told: Callable[[int, int], None]
) -> dict[str, Survival]:
    """Return what is left of each adapted linear of ``model``, by name, once ``rounding`` has stored it.

    ``originals``: what the adapters are merged over; without them, what the base's storage has. ``told``: (done, of all).
    """
    linears, found = dict(adapted_linears(model)), {}
    for name, module in linears.items():
        told(len(found), len(linears))
        weight = f"{name}.weight"
        # What was trained whole has no other original.
        is_original = originals is not None and not isinstance(module.frozen, Whole) and weight in originals
        parts = originals.parts(weight) if is_original else [dense_weight(module.frozen)]
        dense = joined(part.to(module.frozen.weight.device, torch.float32) for part in parts)
        frozen = module.unquantised(dense) if is_original else dense
        base, merged = module.untrained(frozen), module.merged(frozen)
        stored = joined(rounding(Dense(weight, tuple(merged.shape), partial(_once, merged)))).to(merged)
        change, error = merged - base, stored - merged
        found[name] = Survival(_square(change), float(((change + error) * change).sum()), _square(error))
    told(len(found), len(linears))
    return found


def _once(tensor: Tensor) -> list[Tensor]:
    return [tensor]


def _square(tensor: Tensor) -> float:
    return float(tensor.square().sum())
