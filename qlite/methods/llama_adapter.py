"""LLaMA-Adapter: prompts in the upper blocks, attended to apart and let in by a gate from zero.   Zhang et al. 2023, arXiv:2303.16199.

What stands where is as in the authors' code (ZrrSkywalker/LLaMA-Adapter, alpaca_finetuning_v1/llama/model.py): the block's own frozen
linears make keys and values of the prompts; only queries are turned by their positions; the prompts' softmax is theirs alone; and what it
gives, times the gate, is added before the output projection.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlite.errors import ModelError, RecipeError
from qlite.methods.base import PEFT_PREFIX, Beside, Method
from qlite.methods.beside import Attend, as_heads, attentions, drawn, dtype_and_place, key_heads, put_beside

Gate = Literal["heads", "block"]


class GatedPrompt(Beside):
    """``prompt`` [P, D] beside one attention, and its ``gate``: a number for each query head, or one."""

    def __init__(self, attention: nn.Module, length: int, gates: Gate):
        super().__init__()
        dtype, where = dtype_and_place(attention)
        # Of size 1, as the authors' nn.Embedding begins. They stand in the place of what a norm gives.
        self.prompt = drawn((length, attention.k_proj.in_features), dtype, where)
        # float32: a few numbers, on which all depends.
        self.gate = nn.Parameter(torch.zeros(attention.config.num_attention_heads if gates == "heads" else 1, device=where))
        self.gates = gates
        self.__dict__["attention"] = attention  # not as a submodule: this module is one of its

    def forward(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, documents: object) -> Tensor:
        """Return the attention's output [B, T, H, D] with what the prompts add."""
        own = attend(query, key, value, mask, documents)
        of_prompts = (x.expand(len(query), -1, -1, -1) for x in self.keys_and_values(query.dtype))
        # Written out: without a mask the attention would be causal.
        all_seen = torch.ones(1, 1, query.shape[2], len(self.prompt), dtype=torch.bool, device=query.device)
        added = attend(query, *of_prompts, all_seen, None)
        return own + self.opening().to(own.dtype).unsqueeze(-1) * added

    def keys_and_values(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the prompts' [1, key heads, P, D] each."""
        x, heads = self.prompt.to(dtype).unsqueeze(0), key_heads(self.attention)[0]
        key, value = (as_heads(linear(x), heads) for linear in (self.attention.k_proj, self.attention.v_proj))
        norms = (getattr(self.attention, name, None) for name in ("k_norm", "v_norm"))
        return tuple(norm(states) if norm else states for norm, states in zip(norms, (key, value), strict=True))

    def opening(self) -> Tensor:
        """Return what the prompts' part is multiplied by: of each head, or of all."""
        return torch.tanh(self.gate) if self.gates == "heads" else self.gate


@dataclass(frozen=True, kw_only=True)
class LlamaAdapter(Method):
    """Gated prompts in the upper blocks."""

    name: ClassVar[str] = "llama_adapter"
    is_mergeable: ClassVar[bool] = False
    length: Annotated[int, Field(ge=1)] = 10
    """Prompt vectors in each block that has them (the paper's K)."""
    first_block: Annotated[int, Field(ge=0)] = 2
    """The first block that has them, counted from 0; all above have them, too (the paper's: 30 of 32)."""
    gate: Gate = "heads"
    """"heads": tanh of a number for each head, as in the authors' code; "block": one number for all heads as it is, as PEFT has it."""

    def attach(self, model: PreTrainedModel) -> None:
        for attention in self.places(model):
            put_beside(attention, GatedPrompt(attention, self.length, self.gate))

    def places(self, model: PreTrainedModel) -> list[nn.Module]:
        """Return the attentions that get prompts. Raises RecipeError, ModelError where there are none."""
        found = attentions(model, self.name)
        if self.first_block >= len(found):
            raise RecipeError(
                f"method.first_block = {self.first_block}: this model has {len(found)} blocks, counted from 0, so none would have prompts; "
                "lower it"
            )
        for attention in found:
            norm = getattr(attention, "k_norm", None)
            if not (hasattr(attention, "k_proj") and hasattr(attention, "v_proj")):
                lacks = "has one linear for queries, keys and values together, and the prompts need those of keys and values alone"
            elif norm is not None and norm.weight.shape != (key_heads(attention)[1],):
                lacks = "norms the keys of all heads together, which the prompts' would not fit"
            else:
                continue
            raise ModelError(f'method.name = "{self.name}": the family "{model.config.model_type}" {lacks}; choose another method')
        return found[self.first_block :]

    @torch.no_grad()
    def peft(self, model: PreTrainedModel) -> tuple[dict, dict[str, Tensor]] | None:
        """Return PEFT's ADAPTION_PROMPT. None with a gate for each head, which it has not, and in families that it does not know."""
        places = self.places(model)
        if self.gate == "heads" or not all(_is_known_to_peft(model, each) for each in places):
            return None
        names = {module: name for name, module in model.named_modules()}
        tensors = {}
        for attention in places:
            place = f"{PEFT_PREFIX}{names[attention]}.adaption_"
            tensors |= {f"{place}prompt": attention.side.prompt.unsqueeze(0), f"{place}gate": attention.side.gate}
        config = {"peft_type": "ADAPTION_PROMPT", "adapter_len": self.length, "adapter_layers": len(places)}
        return {**config, "target_modules": names[places[0]].rpartition(".")[2]}, tensors

    @classmethod
    def of_peft(cls, config: dict[str, int], blocks: int) -> "LlamaAdapter":
        """Return the method that PEFT's ``config`` names, of a model of ``blocks`` blocks."""
        return cls(length=config["adapter_len"], first_block=max(0, blocks - config["adapter_layers"]), gate="block")

    def from_peft(self, model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of ``model``'s prompts that PEFT's ``tensors`` are, by dotted name."""
        own = {name.removeprefix(PEFT_PREFIX).replace(".adaption_", ".side."): tensor for name, tensor in tensors.items()}
        return {name: tensor.squeeze(0) if name.endswith(".prompt") else tensor for name, tensor in own.items()}


def _is_known_to_peft(model: PreTrainedModel, attention: nn.Module) -> bool:
    """Return whether PEFT 0.21 computes the same in ``attention``: it knows two families, heads as wide as the hidden states, no biases."""
    width = model.config.num_attention_heads * key_heads(attention)[1]
    is_wide = width == attention.k_proj.in_features
    return model.config.model_type in ("llama", "mistral") and is_wide and getattr(attention.o_proj, "bias", None) is None
