"""Modules beside the attention of a model's blocks: which blocks have a place for one, and putting it there.

The place is ``attention.side``, which qlite's own attention (model/documents.py) calls in the attention's stead. It is no cache given as
``past_key_values``: under activation checkpointing transformers sets that to None, and what stands there would train nothing, silently.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlite.errors import ModelError, RecipeError
from qlite.methods.base import AdaptedLinear, Beside, dtype_and_device
from qlite.model.blocks import decoder_blocks
from qlite.model.documents import DOCUMENTS
from qlite.quant.linear import is_linear

PROMPT = "prompt_embeddings"
"""The one tensor of PEFT's files of prompts and prefixes."""
Attend = Callable[..., Tensor]
"""The attention itself: of query, key, value, mask and documents; ``before``: a key and a value that are seen by all."""


def attentions(model: PreTrainedModel, method: str) -> list[nn.Module]:
    """Return the attention of each of ``model``'s blocks, in the order in which they run; ``method`` is only named in messages.

    Raises:
        RecipeError, ModelError: not every block has one that is computed here.
    """
    family, own = model.config.model_type, model.config._attn_implementation
    if own != DOCUMENTS:
        raise RecipeError(
            f'method.name = "{method}": it stands beside attention that qlite computes itself, and this "{family}" computes "{own}" '
            f'attention; set base.attention = "auto", or, if it is that, choose another method for this family'
        )
    found = []
    for name, block in decoder_blocks(model).items():
        inside = [module for module in block.modules() if hasattr(module, "is_causal") and hasattr(module, "layer_idx")]
        if len(inside) != 1 or hasattr(inside[0], "kv_lora_rank"):  # keys and values of another form: multi-head latent attention
            raise ModelError(
                f'method.name = "{method}": {name} of the family "{family}" has no attention of the usual form; choose another method'
            )
        found += inside
    return found


def put_beside(attention: nn.Module, side: Beside) -> None:
    """Let ``side`` be called in the stead of ``attention``'s kernel.

    Raises:
        RecipeError: another method's is there.
    """
    if "side" in attention._modules:
        raise RecipeError(
            f"method.name: {type(attention.side).__name__} and {type(side).__name__} both stand beside the attention, which has one place; "
            "leave one of the methods out"
        )
    attention.side = side


def key_heads(attention: nn.Module) -> tuple[int, int]:
    """Return how many key heads ``attention`` has and their size."""
    size = getattr(attention, "head_dim", None) or attention.head_size
    if hasattr(attention, "k_proj"):
        return attention.k_proj.out_features // size, size
    config = attention.config
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads, size


def dtype_and_place(attention: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Return the dtype that ``attention``'s linears compute in, and where they lie."""
    return dtype_and_device(next(module for module in attention.modules() if is_linear(module) or isinstance(module, AdaptedLinear)))


def drawn(shape: tuple[int, ...], dtype: torch.dtype, where: torch.device, std: float = 1.0) -> nn.Parameter:
    """Return a parameter of normal numbers; drawn in float32 on the CPU, so that a seed gives the same on every device."""
    if where.type == "meta":
        return nn.Parameter(torch.empty(shape, dtype=dtype, device=where))
    return nn.Parameter((torch.randn(shape) * std).to(where, dtype))


def linear(in_features: int, out_features: int, dtype: torch.dtype, where: torch.device) -> nn.Linear:
    """Return a linear as torch begins one, drawn as ``drawn`` does."""
    if where.type == "meta":
        return nn.Linear(in_features, out_features, dtype=dtype, device=where)
    made = nn.Linear(in_features, out_features)
    for name, tensor in list(made.named_parameters()):
        setattr(made, name, nn.Parameter(tensor.detach().to(where, dtype)))
    return made


def as_heads(x: Tensor, heads: int) -> Tensor:
    """Return x [..., P, heads * D] as [..., heads, P, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)
