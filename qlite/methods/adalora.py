"""AdaLoRA: the ranks go where they matter. Zhang et al. 2023, arXiv:2303.10512.

The update is s B (E * A), a singular value decomposition in shape: E [R] are singular values, and a penalty keeps the rows of A and the
columns of B near to orthonormal (section 3.1). Each begins with too many triplets; by a cubic schedule those of least importance, over all
linears together, get the singular value 0 (section 3.2, algorithm 1), until as many are left as ``rank`` allows for. Names are PEFT's.

Two things are the authors' code's and PEFT's, not the paper's: the penalty is the mean of the norms, not the sum of their squares, and a
triplet's importance is the sum of the means of A's and B's, with E's. One is the paper's alone (equation 8): sensitivity is weight times
gradient at one point; the code multiplies the gradient by the weight after the step. Either keeps nearly the same triplets.

The averages that importance is made of take 8 bytes for each trained number, beside what LoRA takes; they are no part of the adapter.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlite.errors import RecipeError
from qlite.methods.base import PEFT_PREFIX, AdaptedLinear, Method, Stepping, Targets, adapt_linears, saved_tensors
from qlite.methods.lora_product import Adapted, lora_products
from qlite.methods.low_rank import require_pair
from qlite.quant.linear import compute_dtype

FACTORS = ("lora_A", "lora_E", "lora_B")
# PEFT's layer divides by rank + 1e-5; so do we, and the file is what was trained.
PEFT_EPS = 1e-5


class SVDLinear(AdaptedLinear):
    """A frozen linear plus s B (E * A), with A [R, in], B [out, R] in the dtype that the base computes in and E [R, 1] in float32.

    E starts at zero, so the adapted model starts as the base model. In float32 it costs nothing, and a masked value is 0 in all digits.
    """

    resumed_buffers: ClassVar[tuple[str, ...]] = ("kept", *(f"{kind}_{name[-1]}" for kind in ("mean", "change") for name in FACTORS))

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float):
        super().__init__(base)
        self.rank, self.scaling = rank, alpha / (rank + PEFT_EPS)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        where, dtype = base.weight.device, compute_dtype(base)
        self.lora_A, self.lora_B = _drawn((rank, base.in_features), dtype, where), _drawn((base.out_features, rank), dtype, where)
        self.lora_E = nn.Parameter(torch.zeros(rank, 1, device=where))
        self.register_buffer("kept", torch.ones(rank, 1, device=where))
        for name in FACTORS:
            for kind in ("mean", "change"):
                self.register_buffer(f"{kind}_{name[-1]}", torch.zeros(getattr(self, name).shape, device=where))

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out], in x's dtype."""
        dropped = self.dropout.p if self.training and isinstance(self.dropout, nn.Dropout) else 0.0
        A = (self.lora_A * self.lora_E).to(x.dtype)
        return lora_products(x, [Adapted(self.base, A, self.lora_B, self.scaling)], dropped)[0]

    def merged_weight(self, dense: Tensor) -> Tensor:
        # float32: the product of two bfloat16 factors needs more digits than either.
        return torch.addmm(dense, self.lora_B.float(), self.lora_A.float() * self.lora_E, alpha=self.scaling)

    @torch.no_grad()
    def remember(self, gradients: dict[nn.Parameter, Tensor], beta_mean: float, beta_change: float) -> None:
        """Let the moving averages of every weight's sensitivity, and of how it changes, hear of a step: equations 8 to 10."""
        for name in FACTORS:
            weight = getattr(self, name)
            average, change = (getattr(self, f"{kind}_{name[-1]}") for kind in ("mean", "change"))
            sensitivity = (gradients[weight] * weight).abs_()
            average.lerp_(sensitivity, 1 - beta_mean)
            change.lerp_(sensitivity.sub_(average).abs_(), 1 - beta_change)

    def importance(self) -> Tensor:
        """Return how much each triplet matters, [R]: equations 7 and 11."""
        A, E, B = (getattr(self, f"mean_{name[-1]}") * getattr(self, f"change_{name[-1]}") for name in FACTORS)
        return E.view(-1) + A.mean(dim=1) + B.mean(dim=0)

    @torch.no_grad()
    def mask(self) -> None:
        """Set the singular values that are not ``kept`` to zero."""
        self.lora_E.mul_(self.kept)

    @property
    def left(self) -> int:
        """How many triplets have a singular value."""
        return int(self.lora_E.count_nonzero())


def _drawn(shape: tuple[int, int], dtype: torch.dtype, where: torch.device) -> nn.Parameter:
    """Return numbers of the size that the authors draw, made in float32 on the CPU: the same seed gives the same on every device."""
    if where.type == "meta":
        return nn.Parameter(torch.empty(shape, dtype=dtype, device=where))
    return nn.Parameter((torch.randn(shape) * 0.02).to(where, dtype))


class _Skewness(torch.autograd.Function):
    """||M M^T - 1||_F of M [R, N]; what is kept for its gradient is M itself and an [R, R] matrix."""

    @staticmethod
    def forward(ctx, matrix: Tensor) -> Tensor:
        rows = matrix.float()
        off = rows @ rows.T - torch.eye(len(rows), device=rows.device)
        norm = torch.linalg.matrix_norm(off)
        ctx.save_for_backward(matrix, off / norm.clamp(min=torch.finfo(torch.float32).tiny))
        return norm

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        matrix, direction = ctx.saved_tensors
        return (2 * grad * (direction @ matrix.float())).to(matrix.dtype)


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Method):
    """LoRA whose ranks are dealt out among the linears while it trains."""

    name: ClassVar[str] = "adalora"
    needs_plain_linears: ClassVar[bool] = True
    rank: Annotated[int, Field(ge=1)] = 8
    """Mean rank of a linear in the end."""
    start_rank: Annotated[int, Field(ge=1)] = 12
    """Rank of every linear in the beginning, more than rank: 1.5 times as much in the paper (section 4.1)."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The update is scaled by alpha / start_rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's input that is dropped in training."""
    targets: Targets = "all-linear"
    """"all-linear", "attention", or a list of layer names or patterns: ["q_proj", "model.layers.1?.mlp.*"]."""
    orthogonality: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the penalty that keeps A's rows and B's columns orthonormal (arXiv:2303.10512, equation 4)."""
    betas: tuple[Annotated[float, Field(gt=0, lt=1)], Annotated[float, Field(gt=0, lt=1)]] = (0.85, 0.85)
    """Decay rates of the averages of a weight's sensitivity and of its changes (arXiv:2303.10512, equations 9 and 10)."""
    start_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the run's steps in which all triplets are kept, to begin with."""
    final_share: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Share of the run's steps after the last triplet is dropped: what is kept then stays."""
    interval: Annotated[int, Field(ge=1)] = 10
    """Triplets are dropped, or taken up again, every so many steps."""

    def check(self, steps: int) -> None:
        first, last = self._bounds(steps)
        if first >= last:
            raise RecipeError(
                f"method.start_share = {self.start_share:g}, method.final_share = {self.final_share:g}: of {steps} steps that leaves "
                "none in which triplets could be dropped; lower one of them or train longer"
            )
        # Singular values begin at 0: in step 1 no factor matters but by the penalty's gradient, and without it none does.
        if last < (2 if self.orthogonality else 3):
            raise RecipeError(
                f"method.final_share = {self.final_share:g}: of {steps} steps the last triplets would be dropped after step {last}, "
                "before any was seen to matter; lower it or train longer"
            )

    def attach(self, model: nn.Module) -> None:
        if self.start_rank <= self.rank:
            raise RecipeError(
                f"method.start_rank = {self.start_rank}: nothing would be dropped; should be more than method.rank = {self.rank}"
            )
        adapt_linears(model, self.targets, self._adapt)

    def _adapt(self, name: str, base: nn.Module) -> SVDLinear:
        require_pair(name, base, self.start_rank, "method.start_rank")
        return SVDLinear(base, self.start_rank, self.alpha, self.dropout)

    def penalty(self, model: nn.Module) -> Tensor | None:
        if not self.orthogonality:
            return None
        norms = [_Skewness.apply(matrix) for layer in _layers(model) for matrix in (layer.lora_A, layer.lora_B.T)]
        return self.orthogonality * torch.stack(norms).mean()

    def before_step(self, model: nn.Module, optimizer: Stepping, step: int, steps: int) -> None:
        if step < self._bounds(steps)[1]:
            gradients = optimizer.gradients()
            for layer in _layers(model):
                layer.remember(gradients, *self.betas)

    def after_step(self, model: nn.Module, optimizer: Stepping, step: int, steps: int) -> None:
        first, last = self._bounds(steps)
        if step == last or (first < step < last and step % self.interval == 0):
            self._deal_out(list(_layers(model)), step, steps)
        if step >= last:
            for layer in _layers(model):
                layer.mask()

    def _bounds(self, steps: int) -> tuple[int, int]:
        """Return the last step in which all triplets are kept, and the one after which what is kept stays."""
        return round(self.start_share * steps), steps - round(self.final_share * steps)

    def budget(self, linears: int, step: int, steps: int) -> int:
        """Return how many triplets ``linears`` linears may keep after ``step`` of ``steps``: equation 12."""
        first, last = self._bounds(steps)
        to_go = 1 - min(1.0, max(0.0, (step - first) / (last - first)))
        return int(linears * (self.start_rank - self.rank) * to_go**3) + linears * self.rank

    @torch.no_grad()
    def _deal_out(self, layers: list[SVDLinear], step: int, steps: int) -> None:
        """Keep the most important triplets, as many as the budget allows for, and mask the others."""
        found = [layer.importance() for layer in layers]
        scores = torch.cat(found)
        budget = self.budget(len(layers), step, steps)
        if budget < len(scores):
            # By place, not by a threshold: of equal ones as many are kept as there is room for.
            kept = torch.zeros_like(scores)
            kept[scores.argsort(descending=True, stable=True)[:budget]] = 1
            for layer, own in zip(layers, kept.split([len(each) for each in found]), strict=True):
                layer.kept.copy_(own.view(-1, 1))
                layer.mask()

    def findings(self, model: nn.Module) -> list[str]:
        left: dict[str, list[int]] = {}
        for name, layer in _named(model):
            left.setdefault(name.rpartition(".")[2], []).append(layer.left)
        told = [f"{leaf} {mean(counts):.1f} ({min(counts)} to {max(counts)})" for leaf, counts in left.items()]
        whole = sum(map(sum, left.values()))
        of = sum(map(len, left.values())) * self.start_rank
        return [f"adalora kept {whole} of {of} triplets; mean of each kind of linear, and least to most: {', '.join(told)}"]

    def peft(self, model: nn.Module) -> tuple[dict, dict[str, Tensor]]:
        fields = {
            "peft_type": "ADALORA",
            "target_modules": [name for name, _ in _named(model)],
            "target_r": self.rank,
            "init_r": self.start_rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "orth_reg_weight": self.orthogonality,
            "beta1": self.betas[0],
            "beta2": self.betas[1],
            # Masked triplets are in the file with the singular value 0; PEFT wants to hear of some number of steps.
            "total_step": 1,
        }
        return fields, {PEFT_PREFIX + name: tensor for name, tensor in saved_tensors(model).items()}


def _layers(model: nn.Module) -> Iterator[SVDLinear]:
    return (layer for _, layer in _named(model))


def _named(model: nn.Module) -> Iterator[tuple[str, SVDLinear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SVDLinear))
