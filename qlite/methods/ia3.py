"""(IA)^3: one learned factor for each key, value and inner activation of the MLP.   Liu et al. 2022, arXiv:2205.05638, section 3.3.

The paper rescales what a linear gives (keys, values) and what the MLP's last linear is given (its inner activations). Both are a row
or a column of factors on a weight, so they merge into it. Names and shapes follow PEFT's files (``ia3_l``), so PEFT reads them as they are.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from qlite.errors import RecipeError
from qlite.methods.base import (
    PEFT_PREFIX,
    AdaptedLinear,
    Method,
    Targets,
    adapt_linears,
    adapted_linears,
    matches,
    select_linears,
    short_names,
)
from qlite.methods.lora_linear import part_from_siblings


class ScaledLinear(AdaptedLinear):
    """A frozen linear whose output features, or else its input features, are multiplied by trained factors that start at 1."""

    def __init__(self, base: nn.Module, scales_input: bool):
        super().__init__(base)
        self.scales_input = scales_input
        shape = (1, self.in_features) if scales_input else (self.out_features, 1)
        # float32: next to 1 a bfloat16 has steps of 0.8 %, and most of what is learned is smaller.
        self.ia3_l = nn.Parameter(torch.ones(shape, device=self.frozen.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out], in x's dtype."""
        return self.base(self._scaled(x)) if self.scales_input else self._scaled(self.base(x))

    def _scaled(self, x: Tensor) -> Tensor:
        # x + (l - 1) x: the factor's distance from 1 keeps its digits in x's dtype, which l itself would not.
        return torch.addcmul(x, x, (self.ia3_l.flatten() - 1).to(x.dtype))

    def merged_weight(self, dense: Tensor) -> Tensor:
        return dense * self.ia3_l

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        own = super().merged_bias(bias)
        return own if own is None or self.scales_input else own * self.ia3_l.flatten()


@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """Factors on the outputs, or the inputs, of the chosen linears of the frozen base."""

    name: ClassVar[str] = "ia3"
    targets: Targets = ("k_proj", "v_proj", "down_proj")
    """Layers that are rescaled: names or patterns as LoRA's. The paper's are the keys, the values and the MLP's last linear, which other
    families call otherwise."""
    feedforward: tuple[str, ...] = ("down_proj",)
    """Those of targets whose input is rescaled, not their output: names or patterns. In the paper the MLP's last linear; [] is none."""

    def attach(self, model: nn.Module) -> None:
        chosen = select_linears(model, self.targets)
        if unused := [pattern for pattern in self.feedforward if not any(matches(name, pattern) for name in chosen)]:
            told = f"is none of the {len(chosen)} layers of method.targets; add it there, or set method.feedforward = [] where no layer's"
            raise RecipeError([f'method.feedforward: "{each}" {told} input is to be rescaled' for each in unused])
        adapt_linears(model, self.targets, self._adapt)

    def _adapt(self, name: str, base: nn.Module) -> ScaledLinear:
        scales_input = any(matches(name, pattern) for pattern in self.feedforward)
        if scales_input:
            part_from_siblings(base)
        return ScaledLinear(base, scales_input)

    def peft(self, model: nn.Module) -> tuple[dict, dict[str, Tensor]]:
        scaled = {name: module for name, module in adapted_linears(model) if isinstance(module, ScaledLinear)}
        names, inner = list(scaled), [name for name, module in scaled.items() if module.scales_input]
        # PEFT takes what ends with one of the second names, and wants each of them among the first.
        leaves, inner_leaves = short_names(model, names), {name.rpartition(".")[2] for name in inner}
        is_told = leaves != names and not any(name.rpartition(".")[2] in inner_leaves for name in names if name not in inner)
        config = {
            "peft_type": "IA3",
            "target_modules": leaves if is_told else names,
            "feedforward_modules": sorted(inner_leaves) if is_told else inner,
            "fan_in_fan_out": False,
        }
        return config, {f"{PEFT_PREFIX}{name}.ia3_l": module.ia3_l for name, module in scaled.items()}
