"""GaLore: all weights are trained, those of the chosen linears by gradients projected to a low rank.   Zhao et al. 2024, arXiv:2403.03507.

What a step keeps of such a gradient, and what the optimizer keeps, has the rank of a LoRA adapter; the weights themselves are trained, so
there is no base to go back to afterwards. How it is done is in optim/projected.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import nn

from qlite.errors import RecipeError
from qlite.methods.base import Method, Targets, grouped, select_linears, train_itself, trainable_tensors
from qlite.methods.full import block_of


@dataclass(frozen=True, kw_only=True)
class GaLore(Method):
    """All weights of the model, the chosen linears' by low-rank projections of their gradients."""

    name: ClassVar[str] = "galore"
    trains_base: ClassVar[bool] = True
    rank: Annotated[int, Field(ge=1)] = 128
    """Rank to which the gradients of the chosen linears are projected. What train.clip_norm limits is the norm of the projections."""
    update_every: Annotated[int, Field(ge=1)] = 200
    """Steps for which a projection holds; the next is made of the first gradient after them (T in the paper, algorithm 2)."""
    scale: Annotated[float, Field(gt=0)] = 0.25
    """Factor on the steps that are projected back (alpha in the paper, algorithm 2): the chosen linears move by optimizer.lr times this,
    the rest by optimizer.lr. The default is the authors' for training from nothing; what is fine-tuned takes more, 1 to 4."""
    targets: Targets = "all-linear"
    """Linears whose gradients are projected: names or patterns as LoRA's. All other weights (embedding, norms ...) are trained plainly."""

    def attach(self, model: nn.Module) -> None:
        train_itself(model, self.name)
        for name in select_linears(model, self.targets):
            smaller = min(model.get_submodule(name).weight.shape)
            if self.rank >= smaller:
                raise RecipeError(
                    f"method.rank = {self.rank}: {name} has {smaller} rows or columns, so nothing would be projected; lower it, or leave "
                    "the layer out of method.targets"
                )

    def param_groups(self, model: nn.Module, lr: float) -> list[dict]:
        # Not by name: a head that is the embedding's tensor has that one's.
        projected = {model.get_submodule(name).weight for name in select_linears(model, self.targets)}
        options = {"rank": self.rank, "update_every": self.update_every, "scale": self.scale}
        return grouped(trainable_tensors(model), lr, lambda name, p: options.copy() if p in projected else {"block": block_of(name)})
