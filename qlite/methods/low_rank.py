"""A LoRA update as its two factors, dW = s B A, and what can be computed of it without ever making dW: sums, sizes, smaller ranks.

Hu et al. 2021, arXiv:2106.09685, section 4.1. The nearest matrix of a smaller rank and its distance are Eckart and Young's (1936,
Psychometrika 1, 211): the largest singular values are kept, and what is dropped is the error.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlite.errors import RecipeError
from qlite.methods.base import PEFT_PREFIX
from qlite.quant.linear import is_linear


@dataclass(frozen=True)
class LowRank:
    """What one adapter does to one linear: W x becomes W x + scaling * B A x, and with ``lengths`` each row is that long (DoRA)."""

    A: Tensor
    """[R, in]"""
    B: Tensor
    """[out, R]"""
    scaling: float
    lengths: Tensor | None = None
    """[out]; Liu et al. 2024, arXiv:2402.09353, section 4.1."""

    @property
    def rank(self) -> int:
        return len(self.A)

    @property
    def shape(self) -> tuple[int, int]:
        """That of the linear's weight, [out, in]."""
        return len(self.B), self.A.shape[1]

    def to(self, dtype: torch.dtype, device: torch.device) -> "LowRank":
        """Return the same with its factors in ``dtype`` on ``device``; lengths stay float32."""
        lengths = None if self.lengths is None else self.lengths.to(device, torch.float32)
        return LowRank(self.A.to(device, dtype), self.B.to(device, dtype), self.scaling, lengths)

    def dense(self) -> Tensor:
        """Return s B A as [out, in] float32, without lengths."""
        # float32: the product of two bfloat16 factors needs more digits than either.
        return (self.B.float() @ self.A.float()).mul_(self.scaling)


def weighted_sum(parts: Sequence[tuple[float, LowRank]]) -> LowRank:
    """Return the sum of ``parts``, each times its number, exactly: its factors are theirs side by side, its rank the sum of theirs.

    Adding the A and the B themselves would be another update: (B1 + B2)(A1 + A2) also has B1 A2 and B2 A1. In float32; no lengths.
    """
    assert all(part.lengths is None for _, part in parts), "a row's length is no part of a sum"
    A = torch.cat([part.A.float() for _, part in parts])
    B = torch.cat([part.B.float() * (weight * part.scaling) for weight, part in parts], dim=1)
    return LowRank(A, B, 1.0)


def require_pair(name: str, base: nn.Module, rank: int, key: str = "method.rank", way: str = "leave it out of method.targets") -> None:
    """Raise RecipeError unless the linear ``base`` called ``name`` is the model's own and can have two factors of ``rank``, from ``key``.

    ``way``: what else can be done than to lower it.
    """
    if not is_linear(base):
        raise RecipeError(f"method.name: {name} is adapted by another of the methods already, and this one needs its own weight; {way}")
    smaller = min(base.in_features, base.out_features)
    if rank > smaller:
        raise RecipeError(f"{key} = {rank}: is more than {name} can have ({smaller}); lower it, or {way}")


def peft_updates(updates: dict[str, LowRank]) -> tuple[dict, dict[str, Tensor]]:
    """Return ``updates``, what an adapter adds to each linear by its dotted name, as PEFT's LoRA: fields of its config, and tensors.

    Each linear has a rank and an alpha of its own, so nothing of a scaling has to be rounded into a factor.
    """
    first = next(iter(updates.values()))
    alphas = {name: update.scaling * update.rank for name, update in updates.items()}
    fields = {
        "peft_type": "LORA",
        "r": first.rank,
        "lora_alpha": first.scaling * first.rank,
        "target_modules": list(updates),
        "rank_pattern": {name: update.rank for name, update in updates.items() if update.rank != first.rank},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != first.scaling * first.rank},
    }
    tensors = {}
    for name, update in updates.items():
        assert update.lengths is None, "rows' lengths would need DoRA's file"
        tensors |= {f"{PEFT_PREFIX}{name}.lora_A.weight": update.A, f"{PEFT_PREFIX}{name}.lora_B.weight": update.B}
    return fields, tensors


@dataclass(frozen=True)
class Resized:
    """An update of a smaller rank, and how far it is from what it was."""

    update: LowRank
    kept: float
    """Share of ||dW||_F^2 that is left, 0 to 1."""
    error: float
    """||dW - dW_r||_F, the root of the sum of the dropped singular values' squares."""
    largest_dropped: float
    """||dW - dW_r||_2, the first singular value that was dropped; 0 where none was."""
    norm: float
    """||dW||_F"""


def resize(update: LowRank, rank: int) -> Resized:
    """Return the update of at most ``rank`` that is nearest to ``update``, in the Frobenius and in the spectral norm.

    From the QR of the thin factors and the SVD of an [R, R] matrix, in float64: the largest tensor is a factor. Each factor takes the
    root of the singular values, so both are of one size. Float32; a rank that the update has not is not made up.
    """
    # W = B A = Q_B (R_B R_A^T) Q_A^T: the middle one has the singular values of all.
    left, left_core = torch.linalg.qr(update.B.double() * update.scaling)
    right, right_core = torch.linalg.qr(update.A.double().T)
    U, sigma, V = torch.linalg.svd(left_core @ right_core.T)
    rank = min(rank, len(sigma))
    roots = sigma[:rank].sqrt()
    B, A = (left @ U[:, :rank]) * roots, roots[:, None] * (V[:rank] @ right.T)
    total, dropped = sigma.square().sum(), sigma[rank:].square().sum()
    return Resized(
        LowRank(A.float(), B.float(), 1.0),
        kept=float(1 - dropped / total) if total > 0 else 1.0,
        error=float(dropped.sqrt()),
        largest_dropped=float(sigma[rank]) if rank < len(sigma) else 0.0,
        norm=float(total.sqrt()),
    )
