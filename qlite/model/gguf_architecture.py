"""What llama.cpp's converter does to each architecture it knows, undone: tensor names, rotary row order, norm offsets, config keys.

Only architectures whose every metadata key is understood are listed; a file that says more than is understood is refused, because
a forgotten key (a rope factor, say) would train a silently different model. Source: llama.cpp, convert_hf_to_gguf.py.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from math import pi
from pathlib import Path

import numpy as np
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qlite.errors import ModelError
from qlite.model.gguf_header import GgufHeader

SAFETENSORS_FIX = "use the model's safetensors folder instead"
# Tensors that describe the rotary embedding; they become config entries, not weights.
ROPE_TENSORS = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
# What may stand under "<architecture>." in the metadata: each is used or checked below, or says nothing about the computation.
KNOWN_KEYS = {
    *("context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size", "expert_count", "expert_used_count"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "attention.sliding_window", "attention.causal", "tensor_data_layout"),
    *("attn_logit_softcapping", "final_logit_softcapping", "mm.tokens_per_image"),
    *("rope.dimension_count", "rope.freq_base", "rope.freq_base_swa", "rope.scaling.type", "rope.scaling.factor"),
    *("rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scaling.attn_factor"),
}


@dataclass(frozen=True)
class GgufModel:
    """A GGUF file's header together with the small tensors that belong to its config."""

    path: Path
    header: GgufHeader
    rope_factors: dict[str, list[float]] = field(default_factory=dict)
    """The contents of ROPE_TENSORS that the file has, by GGUF name."""

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture, such as "llama" or "qwen2"."""
        return str(self.header.metadata.get("general.architecture", ""))

    def get(self, key: str, default: object = None) -> object:
        """Return the architecture's own metadata ``key``; an array of equal values is that value."""
        value = self.header.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise self.error(f"{key} differs from layer to layer, which is not read")
            value = value[0]
        return _shortest(value) if isinstance(value, float) else value

    def require(self, key: str) -> object:
        """Return the architecture's own metadata ``key``. Raises ModelError without one."""
        value = self.get(key)
        if value is None:
            raise self.error(f"the metadata lacks {self.architecture}.{key}")
        return value

    def has(self, tensor: str) -> bool:
        """Whether the file holds a tensor of that GGUF name."""
        return tensor in self.header.tensors

    def error(self, problem: str) -> ModelError:
        """Return an error about this file, with the general way out."""
        return ModelError(f"{self.path}: {problem}; {SAFETENSORS_FIX}")


@dataclass(frozen=True)
class Architecture:
    """How one llama.cpp architecture maps to a transformers model."""

    model_type: str
    leaves: dict[str, str]
    """Within a block: GGUF's module name -> transformers' module name."""
    settings: Callable[[GgufModel], dict]
    """Returns the config entries beyond the common ones."""
    interleaves_rotary_rows: bool = False
    """Whether rows of q and k stand in llama.cpp's rotary order (pairs side by side) instead of two halves."""
    norm_offset: float = 0.0
    """What the converter added to every norm weight."""


def architecture_of(model: GgufModel) -> Architecture:
    """Return the entry of ARCHITECTURES for the file. Raises ModelError for others, split files and mixtures of experts."""
    known = ", ".join(sorted(ARCHITECTURES))
    if model.architecture not in ARCHITECTURES:
        raise ModelError(f'{model.path}: architecture "{model.architecture}" is not read from GGUF; read are {known}; {SAFETENSORS_FIX}')
    if int(model.header.metadata.get("split.count", 1) or 1) > 1:
        raise ModelError(f"{model.path}: is one part of a split model; join the parts with llama.cpp's `llama-gguf-split --merge`")
    if model.get("expert_count", 0):
        raise model.error("a mixture of experts is not read from GGUF")
    prefix = f"{model.architecture}."
    given = {key.removeprefix(prefix) for key in model.header.metadata if key.startswith(prefix)}
    if unknown := sorted(given - KNOWN_KEYS):
        raise model.error(f"its metadata sets {prefix}{unknown[0]}, which is not understood")
    return ARCHITECTURES[model.architecture]


def transformers_name(model: GgufModel, name: str) -> str:
    """Return transformers' name of the GGUF tensor ``name``. Raises ModelError for a tensor that the architecture does not have."""
    outer = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}
    if name in outer:
        return outer[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    leaf = ARCHITECTURES[model.architecture].leaves.get(match[2]) if match else None
    if leaf is None:
        raise model.error(f'holds a tensor "{name}" that is unknown for "{model.architecture}"')
    return f"model.layers.{match[1]}.{leaf}.{match[3]}"


def rotary_rows(model: GgufModel, name: str) -> np.ndarray | None:
    """Return for each stored row of the GGUF tensor ``name`` its row in transformers, [rows] int64, or None if they agree.

    transformers rotates row i of a head with row i + head_dim/2, llama.cpp (for some architectures) row 2i with row 2i + 1.
    """
    match = re.search(r"\.attn_([qk])\.", name)
    if match is None or not ARCHITECTURES[model.architecture].interleaves_rotary_rows:
        return None
    rows = model.header.tensors[name].shape[0]
    heads = model.require("attention.head_count")
    if match[1] == "k":
        heads = model.get("attention.head_count_kv", heads)
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


def build_config(model: GgufModel) -> PreTrainedConfig:
    """Return the transformers config that the file's metadata describes, with dtype bfloat16.

    Raises:
        ModelError: the metadata lacks a key, or says something that is not understood.
    """
    architecture = architecture_of(model)
    _refuse_unlike(model)
    settings = _common_settings(model) | architecture.settings(model)
    try:
        return AutoConfig.for_model(architecture.model_type, **settings)
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        raise model.error(f"its metadata does not make a {architecture.model_type} config ({error})") from error


def _common_settings(model: GgufModel) -> dict:
    metadata, architecture = model.header.metadata, ARCHITECTURES[model.architecture]
    if not model.has("token_embd.weight"):
        raise model.error("has no token_embd.weight")
    heads, width = model.require("attention.head_count"), model.require("embedding_length")
    return {
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[architecture.model_type]],
        "dtype": "bfloat16",
        # The table's own height: the converter may have padded the vocabulary.
        "vocab_size": model.header.tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": model.require("feed_forward_length"),
        "num_hidden_layers": model.require("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": model.get("attention.head_count_kv", heads),
        "head_dim": _head_dim(model),
        "max_position_embeddings": model.require("context_length"),
        "rms_norm_eps": model.require("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": not model.has("output.weight"),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def _refuse_unlike(model: GgufModel) -> None:
    """Raise ModelError for what the architecture's transformers class cannot express."""
    dim = _head_dim(model)
    if model.get("attention.value_length", dim) != dim:
        raise model.error(f"its values are {model.get('attention.value_length')} wide and its keys {dim}")
    if model.architecture != "phi3" and model.get("rope.dimension_count", dim) != dim:
        raise model.error(f"it rotates {model.get('rope.dimension_count')} of {dim} dimensions")
    window, length = model.get("attention.sliding_window", 0), model.require("context_length")
    if model.architecture not in ("phi3", "gemma2", "gemma3") and 0 < window < length:
        raise model.error(f"its attention reaches back {window} of {length} tokens")


def _head_dim(model: GgufModel) -> int:
    return model.get("attention.key_length") or model.require("embedding_length") // model.require("attention.head_count")


# The rotary embedding


def _rope(model: GgufModel) -> dict:
    """Return the file's rope parameters in transformers' words."""
    rope = {"rope_type": "default", "rope_theta": model.get("rope.freq_base", 10000.0)}
    kind = model.get("rope.scaling.type", "none")
    if "rope_freqs.weight" in model.rope_factors and kind == "none":
        return rope | _llama3_scaling(model, rope["rope_theta"], np.asarray(model.rope_factors["rope_freqs.weight"]))
    if model.rope_factors:
        raise model.error(f"its {min(model.rope_factors)} is not read for {model.architecture}")
    if kind == "none":
        return rope
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": model.require("rope.scaling.factor")}
    if kind == "yarn":
        length = model.require("rope.scaling.original_context_length")
        return rope | {"rope_type": "yarn", "factor": model.require("rope.scaling.factor"), "original_max_position_embeddings": length}
    raise model.error(f'rope scaling "{kind}" is not read')


def _llama3_scaling(model: GgufModel, theta: float, stored: np.ndarray) -> dict:
    """Return the Llama 3 rope scaling that gives the stored factors, one for each rotary frequency.

    The file keeps the factors only. All of Meta's models have low 1, high 4 and 8192 tokens, and differ in the largest factor.
    Source: Llama 3.1's config.json; the formula is transformers' ``rope_type = "llama3"``.
    """
    # The factors came about in float32: 32.000004 means 32.
    scaling = {"rope_type": "llama3", "factor": float(f"{stored.max():.5g}"), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    wavelengths = 2 * pi * theta ** (np.arange(len(stored)) / len(stored))
    smooth = np.clip((8192 / wavelengths - 1.0) / (4.0 - 1.0), 0, 1)
    expected = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    if not np.allclose(stored, expected, rtol=1e-3):
        raise model.error("its rope_freqs.weight is not Llama 3's rope scaling")
    return scaling


# Single architectures


def _plain(model: GgufModel) -> dict:
    return {"rope_parameters": _rope(model)}


def _llama(model: GgufModel) -> dict:
    biases = {"attention_bias": model.has("blk.0.attn_q.bias"), "mlp_bias": model.has("blk.0.ffn_gate.bias")}
    return biases | _plain(model)


def _smollm3(model: GgufModel) -> dict:
    # llama.cpp fixes the pattern in its code: every fourth layer goes without rotary embedding.
    return _llama(model) | {"no_rope_layer_interval": 4}


def _phi3(model: GgufModel) -> dict:
    rope = {"rope_type": "default", "rope_theta": model.get("rope.freq_base", 10000.0)}
    if model.rope_factors:
        long, short = (model.rope_factors.get(f"rope_factors_{length}.weight") for length in ("long", "short"))
        if long is None or short is None:
            raise model.error("of rope_factors_long.weight and rope_factors_short.weight one is missing")
        rope |= {"rope_type": "longrope", "long_factor": [_shortest(x) for x in long], "short_factor": [_shortest(x) for x in short]}
    elif model.get("rope.scaling.type", "none") != "none":
        raise model.error(f'rope scaling "{model.get("rope.scaling.type")}" without its tensors is not read')
    rope["partial_rotary_factor"] = model.get("rope.dimension_count", _head_dim(model)) / _head_dim(model)
    original = model.get("rope.scaling.original_context_length", model.require("context_length"))
    # 0 in the file stands for none.
    window = model.get("attention.sliding_window", 0) or None
    return {"rope_parameters": rope, "original_max_position_embeddings": original, "sliding_window": window}


def _gemma2(model: GgufModel) -> dict:
    return {
        "rope_parameters": _rope(model),
        "sliding_window": model.require("attention.sliding_window"),
        "attn_logit_softcapping": model.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": model.get("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _query_scale(model, layers_of_27b=46),
    }


def _gemma3(model: GgufModel) -> dict:
    local = {"rope_type": "default", "rope_theta": model.get("rope.freq_base_swa", 10000.0)}
    return {
        "rope_parameters": {"full_attention": _rope(model), "sliding_attention": local},
        "sliding_window": model.require("attention.sliding_window"),
        "final_logit_softcapping": model.get("final_logit_softcapping"),
        "query_pre_attn_scalar": _query_scale(model, layers_of_27b=62),
    }


def _query_scale(model: GgufModel, layers_of_27b: int) -> int:
    """Return Gemma's query scale: the head's width, in the 27B models hidden size / heads. llama.cpp tells them by their depth."""
    if model.require("block_count") == layers_of_27b:
        return model.require("embedding_length") // model.require("attention.head_count")
    return _head_dim(model)


def _shortest(value: float) -> float:
    """Return the shortest decimal that is the same float32: 9.999999747e-06 -> 1e-05, as the original config had it."""
    return float(str(np.float32(value)))


BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
SANDWICH_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
FUSED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}

ARCHITECTURES = {
    "llama": Architecture("llama", BLOCK, _llama, interleaves_rotary_rows=True),
    "smollm3": Architecture("smollm3", BLOCK, _smollm3, interleaves_rotary_rows=True),
    "qwen2": Architecture("qwen2", BLOCK, _plain),
    "qwen3": Architecture("qwen3", BLOCK | HEAD_NORMS, _plain),
    "phi3": Architecture("phi3", BLOCK | FUSED, _phi3),
    "gemma": Architecture("gemma", BLOCK, _plain, norm_offset=1.0),
    "gemma2": Architecture("gemma2", BLOCK | SANDWICH_NORMS, _gemma2, norm_offset=1.0),
    "gemma3": Architecture("gemma3_text", BLOCK | SANDWICH_NORMS | HEAD_NORMS, _gemma3, norm_offset=1.0),
}
