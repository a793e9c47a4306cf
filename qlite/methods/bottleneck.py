"""Bottleneck adapters: a small network with a residual path behind a sub-layer, y + U f(D y).   Houlsby et al. 2019, arXiv:1902.00751.

Houlsby puts one behind the attention and one behind the MLP of each block, before the block adds its own residual (section 2.1, figure 2);
Pfeiffer et al. 2020 (arXiv:2005.00247, section 3) found the one behind the MLP alone to be as good. Both are one linear's output: that of
the attention's last, and of the MLP's. Of Pfeiffer's only the place is taken: theirs reads the MLP's output with the block's residual
added, this one without.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from qlite.errors import NotMergeable, RecipeError
from qlite.methods.base import AdaptedLinear, Method, adapt_linears, dtype_and_device, select_linears

ACTIVATIONS = {"gelu": nn.functional.gelu, "relu": nn.functional.relu, "silu": nn.functional.silu, "tanh": torch.tanh}


class BottleneckLinear(AdaptedLinear):
    """A sub-layer's last linear, y, followed by y + U f(D y + d) + u with D [width, out] and U [out, width].

    U and u start at zero, so the adapted model starts as the base model; D starts as torch's linears do.
    """

    def __init__(self, base: nn.Module, width: int, activation: str):
        super().__init__(base)
        dtype, where = dtype_and_device(base)
        self.adapter_down = _linear(self.out_features, width, dtype, where)
        self.adapter_up = _linear(width, self.out_features, dtype, where)
        nn.init.zeros_(self.adapter_up.weight)
        nn.init.zeros_(self.adapter_up.bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out], in x's dtype."""
        y = self.base(x)
        return y + self.adapter_up(self.activation(self.adapter_down(y)))

    def merged_weight(self, dense: Tensor) -> Tensor:
        raise NotMergeable("a bottleneck adapter is a network of its own and no change of a weight, so there is nothing to merge")

    def require_mergeable(self) -> None:
        self.merged_weight(torch.empty(0))


def _linear(in_features: int, out_features: int, dtype: torch.dtype, where: torch.device) -> nn.Linear:
    """Return a linear on ``where``, drawn in float32 on the CPU: the same seed gives the same adapter on every device."""
    linear = nn.Linear(in_features, out_features, device=where if where.type == "meta" else "cpu")
    for name, tensor in list(linear.named_parameters()):
        setattr(linear, name, nn.Parameter(tensor.detach().to(where, dtype)))
    return linear


@dataclass(frozen=True, kw_only=True)
class Bottleneck(Method):
    """Small networks behind the sub-layers of the frozen base."""

    name: ClassVar[str] = "bottleneck"
    is_mergeable: ClassVar[bool] = False
    width: Annotated[int, Field(ge=1)] = 64
    """Units of each adapter, which has two matrices of them."""
    placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    """"houlsby": an adapter behind each block's attention and one behind its MLP; "pfeiffer": behind the MLP alone, as they place it."""
    activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu"
    """Function between the two matrices."""
    attention_output: tuple[str, ...] = ("o_proj",)
    """The attention's last linear, behind which an adapter stands: names or patterns. Other families call it dense, out_proj, c_proj ..."""
    mlp_output: tuple[str, ...] = ("down_proj",)
    """The MLP's last linear, likewise: fc2, dense_4h_to_h ... in other families."""

    def attach(self, model: nn.Module) -> None:
        keys = ("mlp_output", "attention_output") if self.placement == "houlsby" else ("mlp_output",)
        places: dict[str, list[str]] = {}
        problems = [
            f"method.{key} = []: names no layer; name that behind which an adapter is to stand" for key in keys if not self.get(key)
        ]
        for key in keys:
            try:
                places[key] = select_linears(model, self.get(key), f"method.{key}")
            except RecipeError as error:
                problems += error.problems
        twice = [name for name in places.get("attention_output", ()) if name in places.get("mlp_output", ())]
        problems += [f"method.attention_output: {name} is one of method.mlp_output, too; leave it out of one" for name in twice[:1]]
        if problems:
            raise RecipeError(problems)
        for names in places.values():
            adapt_linears(model, tuple(names), lambda _, base: BottleneckLinear(base, self.width, self.activation))
