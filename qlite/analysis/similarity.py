"""How much of one adapter's directions lies in another's: subspace similarity, and against it what chance gives.

Hu et al. 2021, arXiv:2106.09685, section 7.2 with figures 3 and 4, and appendix G: phi(A, B, i, j) = ||U_A^i^T U_B^j||_F^2 / min(i, j),
with U^i the i strongest directions. 1: the smaller subspace lies in the larger; 0: they are orthogonal. It is 1 - d^2 / min(i, j) of the
projection metric d on the Grassmann manifold.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qlite.analysis.spectrum import SHARE, Spectrum, input_directions
from qlite.methods.low_rank import LowRank


def similarities(one: Tensor, other: Tensor) -> Tensor:
    """Return phi for all i and j, [I, J], of two sets of orthonormal columns, [D, I] and [D, J], the strongest first."""
    shared = (one.T @ other).square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, count + 1, dtype=shared.dtype) for count in shared.shape)
    return shared / torch.minimum(i[:, None], j)


def by_chance(i: int, j: int, dimensions: int) -> float:
    """Return the mean of phi between random subspaces: of each of j directions i / D lies in i others, so i j / D over min(i, j)."""
    return max(i, j) / dimensions


def random_directions(dimensions: int, count: int, seed: int = 0) -> Tensor:
    """Return ``count`` orthonormal columns [D, count] in float64: a Gaussian matrix's, as in the paper's figure 4."""
    drawn = torch.randn(dimensions, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q


@dataclass(frozen=True)
class Overlap:
    """How alike two adapters' updates of one linear are."""

    phi: Tensor
    """[I, J] of the directions of A alone, as in the paper."""
    chance: Tensor
    """[I, J]: the same with Gaussian directions in the place of the second adapter's."""
    dimensions: int
    inputs: float
    """phi of the directions of input that hold SHARE of each update's energy: whether they look at the same."""
    outputs: float
    """phi of the directions of output that do: whether they write to the same."""
    cosine: float
    """<dW1, dW2> / (||dW1|| ||dW2||): 1, the same up to size; 0, nothing to do with each other; -1, each other's opposite."""

    @classmethod
    def of(cls, one: LowRank, other: LowRank) -> "Overlap":
        """Return it for two updates of one shape."""
        A, B = input_directions(one), input_directions(other)
        first, second = Spectrum.of(one), Spectrum.of(other)
        # <dW1, dW2> = trace of their product, from matrices of both ranks.
        product = (first.left * first.sigma).T @ (second.left * second.sigma) * (first.right.T @ second.right)
        return cls(
            similarities(A, B),
            similarities(A, random_directions(*B.shape)),
            len(A),
            float(similarities(first.right, second.right)[first.rank_for(SHARE) - 1, second.rank_for(SHARE) - 1]),
            float(similarities(first.left, second.left)[first.rank_for(SHARE) - 1, second.rank_for(SHARE) - 1]),
            float(product.sum() / max(first.norm * second.norm, 1e-300)),
        )
