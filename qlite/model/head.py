"""A causal LM in two halves: token ids to hidden states, and hidden states to logits.

The loss needs logits of a few tokens at a time, never of all. The second half is the family's own code (Gemma's
soft-capping, Granite's and Cohere's scaling ...), run on hidden states that are given to it.
"""

import copy

from torch import Tensor, nn
from transformers import PreTrainedModel

from qlite.model.documents import packed_inputs


def hidden_states(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """Return the last hidden states [B, T, D] for ``input_ids`` [B, T].

    There is no padding mask: rows are padded on the right, where a causal model's real tokens cannot look. With
    ``position_ids`` [B, T], best on the CPU, a line holds several documents: positions count from 0 in each (padding is a
    document, too), and no document sees another.
    """
    packed = {"input_ids": input_ids} if position_ids is None else packed_inputs(model, input_ids, position_ids)
    states = model.base_model(**packed, use_cache=False).last_hidden_state
    return states.reshape(*input_ids.shape, states.shape[-1])


def logits_head(model: PreTrainedModel) -> nn.Module:
    """Return a module mapping hidden states [..., N, D] to logits [..., N, V] by ``model``'s own code and weights."""
    return _Head(model)


class _Head(nn.Module):
    def __init__(self, model: PreTrainedModel):
        super().__init__()
        # A second view of the same model whose decoder hands over what it is given. Weights are shared, not copied.
        view = copy.copy(model)
        view._modules = {**model._modules, model.base_model_prefix: _Given(model.base_model)}
        self.view = view

    def forward(self, hidden: Tensor) -> Tensor:
        # Of one row of states the result is a view of what the model makes, and what is written over in a view costs autograd a copy.
        rows = hidden if hidden.dim() > 2 else hidden.unsqueeze(0)
        logits = self.view(inputs_embeds=rows, use_cache=False).logits
        return logits if rows is hidden else logits[0]


class _Given(nn.Module):
    """Stands where the decoder stood and returns its input as the last hidden state."""

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.__dict__["decoder_replaced"] = decoder  # not as a submodule: its weights are not the head's

    def forward(self, *_: object, inputs_embeds: Tensor, **__: object) -> "_Outputs":
        return _Outputs((inputs_embeds,))

    def __getattr__(self, name: str) -> object:
        """Return the decoder's own number (Falcon-H1's lm_head_multiplier); a part of it that would be run (OPT's decoder) is this."""
        value = getattr(self.__dict__["decoder_replaced"], name)
        return self if isinstance(value, nn.Module) else value


class _Outputs(tuple):
    """A decoder's output: the hidden states first, and None for whatever else a family passes on (Mamba's caches)."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, _: str) -> None:
        return None
