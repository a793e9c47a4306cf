"""LLaMA-Adapter V2, its part for text: every linear's output scaled and shifted, norms trained, prompts as in LLaMA-Adapter.

Gao et al. 2023, arXiv:2304.15010, section 4.1: y = s (W x + b), beginning at s = 1 and b = 0.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlite.methods.base import AdaptedLinear, Targets, adapt_linears, dtype_and_device, outer_modules
from qlite.methods.llama_adapter import Gate, LlamaAdapter
from qlite.methods.whole import Whole, train_whole
from qlite.quant.embedding import is_embedding
from qlite.quant.linear import is_linear


class ScaledLinear(AdaptedLinear):
    """A frozen linear whose outputs are shifted by ``shift`` [out] and then multiplied by ``scale`` [out]."""

    def __init__(self, base: nn.Module):
        super().__init__(base)
        dtype, where = dtype_and_device(base)
        # float32: beside 1, bfloat16 has steps of 0.4 to 0.8 %, and a scale is that near to it.
        self.scale = nn.Parameter(torch.ones(self.out_features, device=where))
        self.shift = nn.Parameter(torch.zeros(self.out_features, dtype=dtype, device=where))

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out], in x's dtype."""
        y = self.base(x) + self.shift.to(x.dtype)
        # What is more than 1 of the scale apart, for the same reason.
        return torch.addcmul(y, y, (self.scale - 1).to(y.dtype))

    def merged_weight(self, dense: Tensor) -> Tensor:
        return self.scale.unsqueeze(1) * dense

    def merged_bias(self, bias: Tensor | None) -> Tensor:
        own = super().merged_bias(bias)
        return self.scale * (self.shift.float() if own is None else own.float() + self.shift.float())


@dataclass(frozen=True, kw_only=True)
class LlamaAdapterV2(LlamaAdapter):
    """Scale and shift of the chosen linears, every norm, and gated prompts in the upper blocks."""

    name: ClassVar[str] = "llama_adapter_v2"
    length: Annotated[int, Field(ge=1)] = 10
    """Prompt vectors in each block that has them."""
    first_block: Annotated[int, Field(ge=0)] = 2
    """The first block that has them, counted from 0; all above have them, too."""
    gate: Gate = "heads"
    """"heads": tanh of a number for each head, as in the authors' code; "block": one number for all heads as it is."""
    targets: Targets = "all-linear"
    """Linears that are scaled and shifted: "all-linear", "attention", or a list of layer names or patterns."""

    def attach(self, model: PreTrainedModel) -> None:
        super().attach(model)
        # What LoRA has been told to train whole is trained already.
        train_whole(model, [name for name, module in outer_modules(model) if _is_norm(module) and not isinstance(module, Whole)])
        adapt_linears(model, self.targets, lambda _, linear: ScaledLinear(linear))

    def peft(self, model: PreTrainedModel) -> None:
        """Return None: PEFT has no such type."""


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1 and not (is_linear(module) or is_embedding(module))
