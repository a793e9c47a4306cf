"""Which attention a base model computes with: the recipe's word for it, and whether family and machine can do it."""

from typing import Literal

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from qlite.errors import ModelError, shown
from qlite.model.documents import attend_by_documents

Attention = Literal["auto", "eager", "sdpa", "flex", "flash"]


def meta_model(config: PreTrainedConfig, attention: Attention, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Return the causal LM that ``config`` describes, on the meta device, made to compute ``attention`` on ``device`` later.

    Raises:
        ModelError: the family is no causal LM, or it or the machine cannot do that attention.
    """
    name = _name(attention, config, dtype, device)
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=name)
        except ValueError as error:
            reason = str(error).splitlines()[0]
            if name and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
                raise _refused(attention, f'the family "{config.model_type}" has none: {reason}') from error
            raise ModelError(f'base.model: "{config.model_type}" is no causal language model: {reason}') from error
        except Exception as error:  # of numbers that fit no model, each family's code fails in its own way
            reason = shown(f"{type(error).__name__}: {error}".splitlines()[0], 200)
            raise ModelError(f'base.model: its config.json describes no "{config.model_type}" that can be made ({reason})') from error
    if attention == "auto":
        attend_by_documents(model)
    return model


def _name(attention: Attention, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return transformers' name of ``attention``; None: SDPA where the family has it."""
    # SDPA has no soft-capping: a model that was trained with it (Gemma 2) needs the written-out attention.
    has_softcap = bool(getattr(config, "attn_logit_softcapping", None))
    if attention == "auto":
        return "eager" if has_softcap else None
    if attention == "sdpa" and has_softcap:
        raise _refused(attention, f'it has no soft-capping, which the family "{config.model_type}" was trained with')
    if attention in ("flex", "flash") and device.type == "cpu":
        raise _refused(attention, "it is trained on CUDA cards only, and the model is loaded on the CPU")
    if attention != "flash":
        return "flex_attention" if attention == "flex" else attention
    if dtype == torch.float32:
        raise _refused(attention, 'it computes in 16 bit only, and base.dtype = "float32"')
    # Asked here: where the package is missing, or another kernel is meant, transformers would fetch compiled code from the hub.
    name = "flash_attention_3" if is_flash_attn_3_available() else "flash_attention_2" if is_flash_attn_2_available() else None
    if name is None:
        raise _refused(attention, "the package flash-attn is not installed (pip install flash-attn)")
    own_kernels = getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), "_compatible_flash_implementations", None)
    if own_kernels and name not in own_kernels:
        raise _refused(attention, f'the family "{config.model_type}" needs kernels of its own, and none are fetched')
    return name


def _refused(attention: Attention, why: str) -> ModelError:
    return ModelError(f'base.attention = "{attention}": {why}; use "auto"')
