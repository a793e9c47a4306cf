"""Keys turned to other positions, in families whose rotary positions are Llama's.   Su et al. 2021, arXiv:2104.09864, section 3.2.2."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import rotate_half

from qlite.model.fusing import turns_as_llama

# Whose angles depend on the length of what is read.
CHANGING = ("dynamic", "longrope")


def can_turn(model: PreTrainedModel, attention: nn.Module, size: int) -> bool:
    """Return whether ``turned`` is right for the keys, of ``size`` numbers, of ``attention``, one of ``model``'s."""
    rotary = getattr(model.base_model, "rotary_emb", None)
    frequencies = getattr(rotary, "inv_freq", None)
    if frequencies is None or getattr(rotary, "rope_type", None) in (None, *CHANGING):
        return False
    return turns_as_llama(attention) and size == 2 * len(frequencies)  # some families turn a part of each key


def turned(model: PreTrainedModel, attention: nn.Module, keys: Tensor, steps: int) -> Tensor:
    """Return ``keys`` [..., D] of ``attention`` as they are ``steps`` positions further, or back, in float32.

    Their product with a query that is turned by as much stays what it was.
    """
    assert can_turn(model, attention, keys.shape[-1]), "another rotation would be another function"
    if not getattr(attention, "use_rope", True):  # SmolLM3 leaves it out in some blocks
        return keys.float()
    angles = model.base_model.rotary_emb.inv_freq.float() * steps
    angles = torch.cat([angles, angles], dim=-1)
    keys = keys.float()
    return keys * angles.cos() + rotate_half(keys) * angles.sin()
