"""Pure low-rank layers, y = B A x + b: the question "what if W itself is replaced by B A", with nothing of W left.

It is what LoRA is not: Hu et al. 2021, arXiv:2106.09685, section 4.1 adds B A to W, for it is the change of W whose rank is low, not W's
own. The nearest matrix of a rank, where "svd" starts, is Eckart and Young's (1936, Psychometrika 1, 211).
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from qlite.errors import RecipeError, some_of
from qlite.methods.base import AdaptedLinear, Method, Original, Stepping, Targets, adapt_linears, adapted_linears, dtype_and_device
from qlite.methods.low_rank import require_pair

LOOKED_AT = 3
"""The step at which what has not moved never will: in a block a gradient that is zero for want of another layer's B passes it when that
has been stepped, and no product of three layers in a row stands between two residual connections."""


class PureLowRankLinear(AdaptedLinear):
    """A linear in whose place B A stands, with A [R, in] and B [out, R] in the dtype that it computes in; its bias stays, frozen.

    The weight of ``base`` is not used. It stays where it is, so that the model can answer without what was trained.
    """

    def __init__(self, base: nn.Module, rank: int, init: str):
        super().__init__(base)
        self.rank, self.is_looked_at = rank, False
        dtype, where = dtype_and_device(base)
        self.factor_A = nn.Parameter(torch.zeros(rank, self.in_features, dtype=dtype, device=where))
        self.factor_B = nn.Parameter(torch.zeros(self.out_features, rank, dtype=dtype, device=where))
        if where.type != "meta" and init != "svd":
            # Both as a linear draws its weight. In float32 on the CPU: the same seed gives the same adapter on every device.
            self.factor_A.data.copy_(_drawn(rank, self.in_features))
            if init == "autoencoder":
                self.factor_B.data.copy_(_drawn(self.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out], in x's dtype."""
        return nn.functional.linear(nn.functional.linear(x, self.factor_A), self.factor_B, self.frozen.bias)

    def merged_weight(self, dense: Tensor) -> Tensor:
        # float32: the product of two bfloat16 factors needs more digits than either. Of the base's weight nothing is left.
        return self.factor_B.float() @ self.factor_A.float()

    @torch.no_grad()
    def approximate(self, weight: Tensor) -> None:
        """Give B A the values that are nearest to ``weight`` [out, in] float32 in their rank; each has the root of the singular values."""
        U, sigma, V = torch.linalg.svd(weight.to(self.factor_A.device), full_matrices=False)
        roots = sigma[: self.rank].sqrt()
        self.factor_A.copy_(roots[:, None] * V[: self.rank])
        self.factor_B.copy_(U[:, : self.rank] * roots)


def _drawn(rows: int, columns: int) -> Tensor:
    """Return a weight as torch's linears begin with: nn.Linear, reset_parameters."""
    weight = torch.empty(rows, columns)
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    return weight


@dataclass(frozen=True, kw_only=True)
class PureLowRank(Method):
    """Low-rank matrices in the place of the chosen linears, whose own weights are left out."""

    name: ClassVar[str] = "low_rank"
    needs_plain_linears: ClassVar[bool] = True
    rank: Annotated[int, Field(ge=1)] = 64
    """Rank of the product B A that stands in the place of a weight. What a model knows needs far more of it than what LoRA adds."""
    targets: Targets = "all-linear"
    """"all-linear", "attention", or a list of layer names or patterns: ["q_proj", "model.layers.1?.mlp.*"]."""
    init: Literal["svd", "autoencoder", "lora"] = "svd"
    """What B A begins as: the matrix of that rank that is nearest to the base's weight ("svd", from its 16-bit files), both drawn at
    random as layers in a row are ("autoencoder"), or A drawn and B zero as in LoRA, so that the layer begins by giving its bias alone."""

    def attach(self, model: nn.Module) -> None:
        adapt_linears(model, self.targets, self._replace)

    def _replace(self, name: str, base: nn.Module) -> PureLowRankLinear:
        require_pair(name, base, self.rank)
        return PureLowRankLinear(base, self.rank, self.init)

    def start(self, model: nn.Module, original: Original) -> None:
        if self.init == "svd":
            for name, linear in _layers(model).items():
                linear.approximate(original(name))

    def before_step(self, model: nn.Module, optimizer: Stepping, step: int, steps: int) -> None:
        """Refuse what would train nothing, where a product or a row of layers begins with two zeros: each waits for the other for ever."""
        layers = _layers(model)
        # Once, at the first such step that is made: those whose loss is no number are not.
        if self.init != "lora" or not (step >= LOOKED_AT or step == steps) or all(linear.is_looked_at for linear in layers.values()):
            return
        gradients = optimizer.gradients()
        dead = [name for name, linear in layers.items() if not (linear.factor_B.any() or gradients[linear.factor_B].any())]
        for linear in layers.values():
            linear.is_looked_at = True
        # In a run that ends sooner some may only wait for another's step; where all wait, none ever comes.
        if dead and (step >= LOOKED_AT or len(dead) == len(layers)):
            raise RecipeError(
                f'method.init = "lora": B is zero and gets no gradient in {some_of(dead, 3)}: what these layers give is multiplied by, or '
                'passed on to, another that is zero, too, so neither ever moves; set method.init = "svd" or "autoencoder", or let '
                "method.targets name one linear of each attention and of each MLP"
            )


def _layers(model: nn.Module) -> dict[str, PureLowRankLinear]:
    return {name: inner for name, linear in adapted_linears(model) for inner in linear.modules() if isinstance(inner, PureLowRankLinear)}
