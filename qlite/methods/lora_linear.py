"""The linears that LoRA puts in the place of frozen ones: plain, several that share an input, and DoRA's.

Hu et al. 2021, arXiv:2106.09685, section 4.1; Liu et al. 2024, arXiv:2402.09353, section 4.1.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from qlite.methods.base import AdaptedLinear
from qlite.methods.lora_product import Adapted, lora_products
from qlite.methods.low_rank import LowRank
from qlite.quant.linear import compute_dtype, dense_weight

# Children of one module that are given the same input, by the names that transformers' families give them.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class LoRALinear(AdaptedLinear):
    """A frozen linear plus scaling * B A, with A [R, in] and B [out, R] in the dtype that the base computes in.

    B starts at zero, so the adapted model starts as the base model.
    """

    only_adds: ClassVar[bool] = True
    """Whether it is W x and one low-rank product of x, the ``adapted`` one, and nothing else."""
    knows_origins: ClassVar[bool] = True
    """Whether it keeps what x was made of in the place of x, where that is known."""

    def __init__(self, base: nn.Module, rank: int, scaling: float, dropout: float):
        super().__init__(base)
        self.rank, self.scaling = rank, scaling
        self.siblings: Siblings | None = None
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        where, dtype = base.weight.device, compute_dtype(base)
        self.lora_A, self.lora_B = _factor(base.in_features, rank, dtype, where), _factor(rank, base.out_features, dtype, where)
        if where.type != "meta":
            self.lora_A.weight.data.copy_(first_A(rank, base.in_features))
            nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out], in x's dtype."""
        return self.siblings(self, x) if self.siblings else lora_products(x, [self.adapted()], self.dropped_share)[0]

    def adapted(self) -> Adapted:
        """Return what a joint product needs of this module, as it is now."""
        return Adapted(self.base, self.lora_A.weight, self.lora_B.weight, self.scaling)

    def update(self) -> LowRank:
        """Return what this module adds to the weight in the base's own files, where it ``only_adds``."""
        adapted = self.adapted()
        return LowRank(adapted.A.detach(), adapted.B.detach(), adapted.scaling)

    @property
    def dropped_share(self) -> float:
        """The share of A's input that is dropped now: none outside of training."""
        return self.dropout.p if self.training and isinstance(self.dropout, nn.Dropout) else 0.0

    def merged_weight(self, dense: Tensor) -> Tensor:
        adapted = self.adapted()
        # float32: the product of two bfloat16 factors needs more digits than either.
        return torch.addmm(dense, adapted.B.float(), adapted.A.float(), alpha=adapted.scaling)


def first_A(rank: int, in_features: int, generator: torch.Generator | None = None) -> Tensor:
    """Return A [R, in] as it begins: drawn in float32 on the CPU, so that the same seed gives the same adapter on every device."""
    return nn.init.kaiming_uniform_(torch.empty(rank, in_features), a=math.sqrt(5), generator=generator)


def _factor(in_features: int, out_features: int, dtype: torch.dtype, where: torch.device) -> nn.Linear:
    """Return a linear on ``where``, made on the CPU: a module draws numbers where it is made, and all are to be the same everywhere."""
    linear = nn.Linear(in_features, out_features, bias=False, dtype=dtype, device=where if where.type == "meta" else "cpu")
    linear.weight = nn.Parameter(linear.weight.detach().to(where))
    return linear


class Siblings:
    """Linears of one parent that are given the same x, one after the other: the first to be called computes all of them."""

    def __init__(self, linears: list[LoRALinear]):
        self.linears = linears
        self._x: Tensor | None = None
        self._are_served = False
        self._waiting: dict[LoRALinear, Tensor] = {}
        for linear in linears:
            linear.siblings = self

    def __call__(self, linear: LoRALinear, x: Tensor) -> Tensor:
        """Return what ``linear``, one of them, makes of x."""
        if self._x is not x or linear not in self._waiting:
            outputs = lora_products(x, [each.adapted() for each in self.linears], linear.dropped_share)
            self._x, self._waiting = x, dict(zip(self.linears, outputs, strict=True))
        y = self._waiting.pop(linear)
        if not self._waiting:
            self._x, self._are_served = None, True
        return y

    def parent_is_done(self, _parent: nn.Module, _args: tuple, output: object) -> None:
        """Let go of what nobody has asked for. Called after each forward pass of the parent, with ``output`` None where it failed."""
        # Where all have been asked for one input, some may be asked for another (keys and values of LLaMA-Adapter's prompts). And where a
        # gradient is due the block may be computed again, and has to be as it was: they part in a pass without.
        if self._waiting and output is not None and not self._are_served and not torch.is_grad_enabled():
            self.part()
        self._x, self._waiting, self._are_served = None, {}, False

    def part(self) -> None:
        """Let each be computed for itself from now on: whatever their names, they are no siblings."""
        for linear in self.linears:
            linear.siblings = None


def join_siblings(model: nn.Module) -> None:
    """Let LoRA's linears that see one input be computed together: those of an attention and those of an MLP, if they drop as much of it."""
    for parent in model.modules():
        for names in SIBLINGS:
            linears = [getattr(parent, name, None) for name in names]
            if not all(isinstance(each, LoRALinear) and each.only_adds and each.siblings is None for each in linears):
                continue
            if len({getattr(each.dropout, "p", 0.0) for each in linears}) == 1:
                parent.register_forward_hook(Siblings(linears).parent_is_done, always_call=True)


def part_from_siblings(linear: nn.Module) -> None:
    """Let ``linear``, adapted or not, no longer be computed together with others: it is to be given another input than they."""
    for module in linear.modules():
        if isinstance(module, LoRALinear) and module.siblings is not None:
            module.siblings.part()


class DoRALinear(LoRALinear):
    """LoRA on the weight's direction, with each row's length m trained apart: W' = m (W + sBA) / ||W + sBA||_row.

    Liu et al. 2024, arXiv:2402.09353, section 4.1; the norm counts as a constant in the gradient (section 4.3).
    """

    only_adds = knows_origins = False

    def __init__(self, base: nn.Module, rank: int, scaling: float, dropout: float):
        super().__init__(base, rank, scaling, dropout)
        square = dense_weight(base).square().sum(dim=1)
        self.register_buffer("weight_square", square, persistent=False)
        # float32: rounded to bfloat16 the rows would start up to 0.2 % off, and the model would not start as its base.
        self.lora_magnitude_vector = nn.Parameter(square.sqrt())

    def forward(self, x: Tensor) -> Tensor:
        dropped = self.dropout(x)
        # Dropout belongs to the whole adapted term, so the base is asked again where dropout changes x.
        y = self.base(x)
        bias = 0 if self.base.bias is None else self.base.bias
        plain = (y if dropped is x else self.base(dropped)) - bias
        gain = self.lora_magnitude_vector / self.row_norm()
        update = self.lora_B(self.lora_A(dropped)) * self.scaling
        return y + plain * (gain - 1).to(x.dtype) + update * gain.to(x.dtype)

    @torch.no_grad()
    def row_norm(self) -> Tensor:
        """Return ||W + sBA|| of each row, [out] float32, without forming W + sBA: |w|^2 + 2s (W A^T) b + s^2 b (A A^T) b."""
        A, B = self.lora_A.weight.float(), self.lora_B.weight.float()
        cross = (self._base_times(A) * B).sum(dim=1)
        own = (B @ (A @ A.T) * B).sum(dim=1)
        return (self.weight_square + 2 * self.scaling * cross + self.scaling**2 * own).clamp(min=0).sqrt()

    def _base_times(self, A: Tensor) -> Tensor:
        """Return W A^T, [out, R] float32."""
        dense = dense_weight(self.base, compute_dtype(self.base))
        return (dense @ A.T.to(dense.dtype)).float()

    def merged_weight(self, dense: Tensor) -> Tensor:
        adapted = super().merged_weight(dense)
        return adapted * (self.lora_magnitude_vector / adapted.norm(dim=1)).unsqueeze(1)
