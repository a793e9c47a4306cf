"""What directions an update s B A has and how strong each is: its singular values, found from the factors, without ever making B A."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qlite.methods.low_rank import LowRank

SHARE = 0.9
"""Of an update's energy ||dW||_F^2: what its strong directions hold, and what an advised rank keeps."""


@dataclass(frozen=True)
class Spectrum:
    """s B A = left diag(sigma) right^T, in float64; strongest direction first."""

    left: Tensor
    """[out, R], orthonormal columns: directions of what the update gives."""
    sigma: Tensor
    """[R], falling."""
    right: Tensor
    """[in, R], orthonormal columns: directions of its input."""

    @classmethod
    def of(cls, update: LowRank) -> "Spectrum":
        """Return the spectrum of ``update``, without a DoRA row's length."""
        left, left_core = torch.linalg.qr(update.B.double() * update.scaling)
        right, right_core = torch.linalg.qr(update.A.double().T)
        U, sigma, V = torch.linalg.svd(left_core @ right_core.T)
        count = min(len(sigma), update.rank)
        return cls(left @ U[:, :count], sigma[:count], right @ V[:count].T)

    @cached_property
    def norm(self) -> float:
        """||s B A||_F."""
        return float(self.sigma.norm())

    @cached_property
    def kept(self) -> list[float]:
        """The share of ||s B A||_F^2 that the nearest update of rank 1, 2, ... R keeps (Eckart and Young 1936); the last is 1."""
        energy = self.sigma.square()
        return (energy.cumsum(0) / energy.sum()).tolist() if self.norm else [1.0] * len(self.sigma)

    @cached_property
    def effective_rank(self) -> float:
        """exp(H), H the entropy of the singular values as shares of their sum: R where all are alike, 1 where one is all there is.

        Source: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality", EUSIPCO, definition 1. 0 where the
        update is zero.
        """
        if not self.norm:
            return 0.0
        share = self.sigma / self.sigma.sum()
        return math.exp(float(-torch.xlogy(share, share).sum()))

    def rank_for(self, share: float) -> int:
        """Return the smallest rank that keeps at least ``share`` of ||s B A||_F^2."""
        # A share of 1 is never quite reached in floating point.
        return next(rank for rank, kept in enumerate(self.kept, start=1) if kept >= share - 1e-9)


def input_directions(update: LowRank) -> Tensor:
    """Return the right-singular vectors of A alone, [in, R] float64: what the paper compares (arXiv:2106.09685, section 7.2)."""
    return torch.linalg.svd(update.A.double(), full_matrices=False).Vh.T
