"""Prefix tuning: learned keys and values before the sequence in every block.   Li & Liang 2021, arXiv:2101.00190, section 4.2.

Every token sees the prefix, whatever a sliding window says, and so does every document of a packed line. Its keys are those that
attention compares with: after norms and rotation, at no position. The tokens' own positions stay as they are.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlite.methods.base import Beside, Method
from qlite.methods.beside import PROMPT, Attend, as_heads, attentions, drawn, dtype_and_place, key_heads, linear, put_beside
from qlite.model.rotation import can_turn, turned


class Prefix(Beside):
    """The key and the value [H, P, D] before one block's sequence, for its H key heads, in the dtype that the base computes in."""

    def __init__(self, heads: int, size: int, length: int, dtype: torch.dtype, where: torch.device):
        super().__init__()
        self.key, self.value = (drawn((heads, length, size), dtype, where, std=0.02) for _ in range(2))

    def key_and_value(self) -> tuple[Tensor, Tensor]:
        """Return both [H, P, D]."""
        return self.key, self.value

    def forward(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, documents: object) -> Tensor:
        """Return the attention's output [B, T, H, D], as ``attend`` gives it after the prefix."""
        own = tuple(x.to(key.dtype) for x in self.key_and_value())
        return attend(query, key, value, mask, documents, before=own)


class Encoder(nn.Module):
    """What all blocks' prefixes have in common: P vectors, and the MLP's first layer with its tanh."""

    def __init__(self, length: int, width: int, hidden: int, dtype: torch.dtype, where: torch.device):
        super().__init__()
        self.embedding = drawn((length, width), dtype, where)
        self.inner = linear(width, hidden, dtype, where)

    def forward(self) -> Tensor:
        """Return [P, hidden]."""
        return torch.tanh(self.inner(self.embedding))


class EncodedPrefix(Beside):
    """A ``Prefix`` that an MLP makes (section 4.3): its last layer is this block's own, the rest is ``encoder``, which blocks share."""

    def __init__(self, heads: int, size: int, encoder: Encoder):
        super().__init__()
        self.heads, self.encoder = heads, encoder
        weight = encoder.inner.weight
        self.outer = linear(weight.shape[0], 2 * heads * size, weight.dtype, weight.device)

    def key_and_value(self) -> tuple[Tensor, Tensor]:
        """Return both [H, P, D]."""
        # Computed by each block anew: it is little, and so nothing has to be kept between the passes of a checkpointed block.
        key, value = self.outer(self.encoder()).chunk(2, dim=-1)
        return as_heads(key, self.heads), as_heads(value, self.heads)

    forward = Prefix.forward


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(Method):
    """Learned keys and values before the sequence in every block."""

    name: ClassVar[str] = "prefix"
    is_mergeable: ClassVar[bool] = False
    length: Annotated[int, Field(ge=1)] = 20
    """Keys and values in each block."""
    hidden: Annotated[int, Field(ge=0)] = 512
    """Width of the MLP that makes them while they are trained, which is steadier (section 4.3); 0: they are trained themselves."""

    @property
    def words(self) -> str:
        return f"prefix of {self.length}"

    def attach(self, model: PreTrainedModel) -> None:
        encoder = None
        for attention in attentions(model, self.name):
            (heads, size), (dtype, where) = key_heads(attention), dtype_and_place(attention)
            if not self.hidden:
                side = Prefix(heads, size, self.length, dtype, where)
            else:
                # As wide as one block's keys: PEFT's PrefixEncoder; in the authors' GPT-2 that is the hidden states' width.
                encoder = encoder or Encoder(self.length, heads * size, self.hidden, dtype, where)
                side = EncodedPrefix(heads, size, encoder)
            put_beside(attention, side)

    @torch.no_grad()
    def peft(self, model: PreTrainedModel) -> tuple[dict, dict[str, Tensor]] | None:
        """Return PEFT's PREFIX_TUNING: one row a prefix token, [block, key or value, head, size], without the MLP that made it.

        PEFT puts the prefix into a cache, so its tokens stand ``length`` positions further on; so do the keys in its file. None where its
        prefix would be another: sliding windows forget it there, and not every family turns its keys as Llama does.
        """
        places = attentions(model, self.name)
        own = [attention.side.key_and_value() for attention in places]
        are_alike = len({key.shape for key, _ in own}) == 1
        if not are_alike or _has_windows(model) or not all(can_turn(model, each, own[0][0].shape[-1]) for each in places):
            return None
        layers = [
            torch.stack([turned(model, each, key, self.length), value.float()]) for each, (key, value) in zip(places, own, strict=True)
        ]
        heads, _, size = own[0][0].shape
        config = {
            "peft_type": "PREFIX_TUNING",
            "num_virtual_tokens": self.length,
            "num_layers": len(places),
            "num_attention_heads": heads,
            "token_dim": heads * size,
            "num_transformer_submodules": 1,
            "encoder_hidden_size": self.hidden or heads * size,
            "prefix_projection": False,
        }
        # From [block, key or value, head, token, size].
        return config, {PROMPT: torch.stack(layers).permute(3, 0, 1, 2, 4).flatten(1).contiguous()}

    @classmethod
    def of_peft(cls, config: dict[str, int], blocks: int) -> "PrefixTuning":
        """Return the method that PEFT's ``config`` names; its file has what an MLP made, not the MLP."""
        return cls(length=config["num_virtual_tokens"], hidden=0)

    def from_peft(self, model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of ``model``'s prefix, attached with ``hidden`` = 0, that PEFT's ``tensors`` are, by dotted name."""
        places = attentions(model, self.name)
        heads, size = key_heads(places[0])
        table = tensors[PROMPT].unflatten(1, (len(places), 2, heads, size)).permute(1, 2, 3, 0, 4)
        names = {module: name for name, module in model.named_modules()}
        found = {}
        for attention, (key, value) in zip(places, table, strict=True):
            place = names[attention.side]
            found |= {f"{place}.key": turned(model, attention, key, -self.length), f"{place}.value": value}
        return found


def _has_windows(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    return "sliding_attention" in kinds if kinds else getattr(config, "sliding_window", None) is not None
