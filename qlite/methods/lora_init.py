"""First values of LoRA's factors made of the weight itself, which a method then trains over what is left of it.

PiSSA (Meng, Wang and Zhang 2024, arXiv:2404.02948, sections 3 and 4): A and B begin as the weight's largest singular directions, and what
is frozen, and quantised, is the residual. LoftQ (Li et al. 2023, arXiv:2310.08659, algorithm 1): they begin as those of what
quantising takes away, T times in turns with quantising what they leave. Both make the quantised model nearer to its original.
"""

import re
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from qlite.methods.lora_linear import LoRALinear
from qlite.methods.lora_product import Adapted, lora_products
from qlite.methods.low_rank import LowRank, weighted_sum
from qlite.quant.linear import dense_weight, overwrite_weight

# Beyond the rank asked for, and products with W W^T: the error of what is left is then at most 0.6 % over the exact SVD's, for
# quantisation errors, whose singular values fall slowly, too (tests/methods/test_lora_init.py); the exact one takes 5 to 100 times as long.
OVERSAMPLING, ITERATIONS = 16, 4


class Factors(NamedTuple):
    """s B A is a part of a weight."""

    A: Tensor
    """[R, in]"""
    B: Tensor
    """[out, R]"""


class BegunLinear(LoRALinear):
    """LoRA whose factors begin as a part of the weight (lora_init), which the adapter then says for ever."""

    saved_buffers: ClassVar[tuple[str, ...]] = ("start_A", "start_B")

    def __init__(self, base: nn.Module, rank: int, scaling: float, dropout: float):
        super().__init__(base, rank, scaling, dropout)
        for name in self.saved_buffers:
            self.register_buffer(name, torch.zeros_like((self.lora_A if name.endswith("A") else self.lora_B).weight.detach()))

    @property
    def moved(self) -> Factors | None:
        """What was taken out of W before it was quantised."""
        raise NotImplementedError

    @torch.no_grad()
    def begin(self, original: Tensor, rounds: int) -> None:
        """Let the factors begin as parts of the ``original`` weight [out, in] float32, and the frozen weight be the rest of it."""
        raise NotImplementedError

    def _begin_with(self, first: Factors) -> None:
        for name, values in (("A", first.A), ("B", first.B)):
            getattr(self, f"lora_{name}").weight.copy_(values)
            getattr(self, f"start_{name}").copy_(values)

    @torch.no_grad()
    def settle(self, original: Tensor) -> None:
        """Let the frozen weight be what the factors were begun over, given the ``original`` one [out, in] float32."""
        if self.moved is not None:
            overwrite_weight(self.base, less(original, self.moved, self.scaling))

    def update(self) -> LowRank:
        start = LowRank(self.start_A, self.start_B, self.scaling)
        return weighted_sum([(1.0, super().update()), (-1.0, start)])

    def unquantised(self, original: Tensor) -> Tensor:
        return less(original, Factors(self.start_A, self.start_B), self.scaling)

    def untrained(self, dense: Tensor) -> Tensor:
        return torch.addmm(dense, self.start_B.float(), self.start_A.float(), alpha=self.scaling)

    def off(self) -> nn.Module:
        return Untrained(self) if self.moved is not None else super().off()


class PissaLinear(BegunLinear):
    """PiSSA: what is frozen is the weight without the factors that it begins with. arXiv:2404.02948, equations 2 to 4."""

    @property
    def moved(self) -> Factors:
        return Factors(self.start_A, self.start_B)

    @torch.no_grad()
    def begin(self, original: Tensor, rounds: int) -> None:
        self._begin_with(principal(original, self.rank, self.scaling))
        self.settle(original)


class LoftqLinear(BegunLinear):
    """LoftQ in one round: what is frozen is the weight as it was quantised, so without the adapter the model is its base bit for bit."""

    @property
    def moved(self) -> None:
        return None

    @torch.no_grad()
    def begin(self, original: Tensor, rounds: int) -> None:
        error = original - dense_weight(self.base).to(original.device)
        self._begin_with(principal(error, self.rank, self.scaling))


class LoftqRoundsLinear(LoftqLinear):
    """LoftQ in several rounds: arXiv:2310.08659, algorithm 1.

    The last of its steps is an SVD, so the frozen weight is made with the factors of the round before: both are kept.
    """

    saved_buffers = ("start_A", "start_B", "moved_A", "moved_B")

    @property
    def moved(self) -> Factors:
        return Factors(self.moved_A, self.moved_B)

    @torch.no_grad()
    def begin(self, original: Tensor, rounds: int) -> None:
        super().begin(original, 1)
        for _ in range(rounds - 1):
            self.moved_A.copy_(self.start_A)
            self.moved_B.copy_(self.start_B)
            self.settle(original)
            super().begin(original, 1)


class Untrained(nn.Module):
    """What a linear was when its training began: the frozen weight and the factors that were taken out of it."""

    def __init__(self, linear: BegunLinear):
        super().__init__()
        self._linear = (linear,)  # in a tuple: it is no part of this module, whose tensors are its

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out], in x's dtype."""
        (linear,) = self._linear
        return lora_products(x, [Adapted(linear.base, linear.start_A, linear.start_B, linear.scaling)])[0]


def begun_linears(model: nn.Module) -> Iterator[tuple[str, BegunLinear]]:
    """Yield (dotted name in the plain model, module) of every linear that begins with a part of its weight, in model order."""
    return ((re.sub(r"(\.base)+$", "", name), module) for name, module in model.named_modules() if isinstance(module, BegunLinear))


def less(weight: Tensor, factors: Factors, scaling: float) -> Tensor:
    """Return W - s B A, [out, in] float32.

    Summed in float64: whatever order a machine sums in, the float32 that is quantised is then the same, but for one in many millions.
    """
    return weight.double().addmm_(factors.B.to(weight.device).double(), factors.A.to(weight.device).double(), alpha=-scaling).float()


def principal(matrix: Tensor, rank: int, scaling: float) -> Factors:
    """Return A, B with s B A nearly the best approximation of ``matrix`` [out, in] float32 of ``rank``; each has the roots of the values.

    Subspace iteration from a seed of its own: Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    is_wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if is_wide else matrix
    width = min(rank + OVERSAMPLING, tall.shape[1])
    drawn = torch.randn(tall.shape[1], width, generator=torch.Generator().manual_seed(0)).to(matrix)
    basis = _orthonormal(tall @ drawn)
    for _ in range(ITERATIONS):
        basis = _orthonormal(tall @ _orthonormal(tall.T @ basis))
    core = (basis.T @ tall).double()
    squares, U = (each.flip(-1)[..., :rank] for each in torch.linalg.eigh(core @ core.T))
    sigma = squares.clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    roots = (sigma / scaling).sqrt()
    left, right = basis.double() @ U * roots, (roots / sigma)[:, None] * (U.T @ core)
    left, right = left.float(), right.float()
    return Factors(left.T.contiguous(), right.T.contiguous()) if is_wide else Factors(right, left)


def _orthonormal(columns: Tensor) -> Tensor:
    """Return an orthonormal basis [N, K] of what ``columns`` [N, K] span, float32; a direction too many is 0.

    By the eigenvectors of the small C^T C, in float64: as quick as LAPACK's QR, and several times as quick on cores that others use, too.
    """
    wide = columns.double()
    squares, V = torch.linalg.eigh(wide.T @ wide)
    inverse = squares.clamp(min=0).rsqrt().where(squares > 1e-13 * squares[-1], 0.0)
    return (wide @ V * inverse).float()
