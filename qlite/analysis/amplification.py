"""How much an adapter strengthens what the base already does: amplification, Hu et al. 2021, arXiv:2106.09685, section 7.3, table 7.

||dW||_F / ||U^T W V||_F, with U and V the update's r strongest directions. Beside it W's own strongest directions and random ones: an
update that repeats W's would have the first, one that has nothing to do with W the second.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qlite.analysis.similarity import random_directions
from qlite.analysis.spectrum import Spectrum

ROUNDS, SPARE = 8, 16
"""Of the search for W's strongest directions: products with W and W^T, and directions beyond the r that are wanted. Halko et al. 2011,
arXiv:0909.4061, algorithm 4.4; over a Gaussian W, the hardest case there is, the energy found is at most 1 % too small (its test)."""


@dataclass(frozen=True)
class Amplification:
    """What table 7 has of one linear."""

    rank: int
    weight: float
    """||W||_F"""
    update: float
    """||dW||_F of the r directions."""
    within: float
    """||U^T W V||_F, U and V from dW: what W does between the update's directions."""
    own: float
    """The same with W's own r strongest directions: the most that it can be."""
    random: float
    """The same with r random directions."""

    @property
    def factor(self) -> float:
        """How much stronger the update makes the directions that it uses: 1, by as much as W has there."""
        return self.update / max(self.within, 1e-300)

    @property
    def own_factor(self) -> float:
        """What the factor would be, had the update gone where W is strongest."""
        return self.update / max(self.own, 1e-300)

    @property
    def random_factor(self) -> float:
        """What the factor would be, had the update gone anywhere."""
        return self.update / max(self.random, 1e-300)


def amplification(weight: Tensor, spectrum: Spectrum, rank: int | None = None) -> Amplification:
    """Return how an update with ``spectrum`` stands to the base's ``weight`` [out, in]; ``rank``: of its directions so many, else all."""
    count = min(rank or len(spectrum.sigma), len(spectrum.sigma))
    W = weight.double()
    U, V = spectrum.left[:, :count], spectrum.right[:, :count]
    one, other = random_directions(len(W), count, seed=1), random_directions(W.shape[1], count, seed=2)
    return Amplification(
        count,
        float(W.norm()),
        float(spectrum.sigma[:count].norm()),
        float((U.T @ W @ V).norm()),
        float(strongest(weight, count).norm()),
        float((one.T @ W @ other).norm()),
    )


def strongest(weight: Tensor, count: int) -> Tensor:
    """Return the ``count`` largest singular values of ``weight`` [out, in], in float64, as good as exactly."""
    W = weight.float()
    found = random_directions(W.shape[1], min(count + SPARE, *W.shape), seed=3).float()
    for _ in range(ROUNDS):
        found = torch.linalg.qr(W.T @ torch.linalg.qr(W @ found).Q).Q
    return torch.linalg.svdvals((W @ found).double())[:count]
