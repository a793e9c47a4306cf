"""A model as llama.cpp knows it: its architecture's metadata, its tensors' names, the order of q's and k's rows, the norms' offset.

What is written has been read back before: qlite's own reader makes a config of the metadata, and what that does not say as the model
does is refused by name, because llama.cpp would compute something else. Source: llama.cpp, src/llama-model.cpp and llama-arch.cpp.
"""

from dataclasses import dataclass, field
from math import log, prod, sqrt
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType
from torch import Tensor
from transformers import PreTrainedConfig

from qlite.errors import ExportError, ModelError
from qlite.model.gguf_architecture import ARCHITECTURES, GgufModel, build_config, rotary_rows, transformers_name
from qlite.model.gguf_header import GgufHeader, StoredTensor

# transformers' model type -> llama.cpp's architecture; Mistral's differs from Llama's in its window alone.
MODEL_TYPES = {known.model_type: name for name, known in ARCHITECTURES.items()} | {"mistral": "llama"}
# llama.cpp computes these architectures' attention without a window: the context ends where the window would begin to matter.
WINDOWLESS = {"llama", "smollm3", "qwen2", "qwen3", "phi3"}
WINDOW_KEYS = {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "max_position_embeddings"}
WITHOUT_EFFECT = {
    *("transformers_version", "architectures", "output_hidden_states", "output_attentions", "return_dict", "dtype", "model_type"),
    *("chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type", "initializer_range", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp", "attention_dropout", "resid_pdrop", "embd_pdrop", "_name_or_path"),
    *("tie_word_embeddings", "no_rope_layer_interval"),  # the tensors tell, and no_rope_layers does
}


@dataclass(frozen=True)
class Written:
    """How a model is written: GGUF's names and metadata for what transformers calls otherwise."""

    described: GgufModel
    """What the file will say, without its tokenizer."""
    names: dict[str, str]
    """transformers' name of each tensor -> llama.cpp's."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that describe the rotary embedding, by llama.cpp's names, float32."""

    @property
    def architecture(self) -> str:
        return self.described.architecture

    @property
    def metadata(self) -> dict[str, object]:
        """The architecture's own keys."""
        prefix = f"{self.architecture}."
        return {key: value for key, value in self.described.header.metadata.items() if key.startswith(prefix)}

    def stored(self, name: str, values: Tensor) -> Tensor:
        """Return the ``values`` of transformers' tensor ``name`` as llama.cpp has them: the norms' offset added, rows in its order."""
        offset = ARCHITECTURES[self.architecture].norm_offset if name.endswith("norm.weight") else 0.0
        # float32: 1 + weight in bfloat16 has lost the weight's digits.
        return self.in_rows(name, values.float() + offset if offset else values)

    def in_rows(self, name: str, values: Tensor) -> Tensor:
        """Return ``values`` [rows of transformers' tensor ``name``, ...] with the rows in llama.cpp's order."""
        rows = rotary_rows(self.described, self.names[name])
        return values if rows is None else values[torch.from_numpy(rows).to(values.device)]


def written_model(config: PreTrainedConfig, shapes: dict[str, tuple[int, ...]], base: GgufModel | None) -> Written:
    """Return how the model of ``config`` with tensors of ``shapes`` (by transformers' names) is written.

    ``base``: the GGUF file that it was read from, whose architecture's metadata and rotary factors are kept as they are.

    Raises:
        ExportError: llama.cpp has no such architecture, or computes it otherwise; the message names what.
    """
    architecture = _architecture(config)
    names = _names(architecture, config, shapes)
    if base is not None:
        metadata, factors = dict(base.header.metadata), base.rope_factors
    else:
        metadata = {"general.architecture": architecture} | {f"{architecture}.{key}": value for key, value in _metadata(config).items()}
        factors = _rope_factors(config)
    placed = {names[name]: _place(names[name], shape) for name, shape in shapes.items()}
    described = GgufModel(Path("the GGUF file"), GgufHeader(metadata, placed, 0), factors)
    if base is None:
        _require_same(described, config)
    for name, ours in names.items():
        if transformers_name(described, ours) != name:
            raise ExportError(f"{name} would be {ours} in a GGUF file, which is another tensor of {architecture}; use --merge")
    return Written(described, names, {name: torch.tensor(values, dtype=torch.float32) for name, values in factors.items()})


def _architecture(config: PreTrainedConfig) -> str:
    if config.model_type not in MODEL_TYPES:
        known = ", ".join(sorted(MODEL_TYPES))
        raise ExportError(
            f'"{config.model_type}" models are not written as GGUF; these are: {known}. Use --merge, and llama.cpp\'s own '
            "convert_hf_to_gguf.py on the folder that it makes"
        )
    return MODEL_TYPES[config.model_type]


def _names(architecture: str, config: PreTrainedConfig, shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    mapping = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    names = {name: mapping.get_name(name, try_suffixes=(".weight", ".bias")) for name in shapes}
    if unknown := [name for name, found in names.items() if found is None]:
        raise ExportError(f"{unknown[0]} has no name in llama.cpp's {architecture}, which would leave it out; use --merge")
    return names


def _place(name: str, shape: tuple[int, ...]) -> StoredTensor:
    return StoredTensor(name, shape, GGMLQuantizationType.F32, 0, 4 * prod(shape))


def _require_same(described: GgufModel, config: PreTrainedConfig) -> None:
    """Raise ExportError unless the metadata, read back, describes a model that computes what ``config``'s does."""
    try:
        rebuilt = build_config(described).to_dict()
    except ModelError as error:
        raise ExportError(f"this model cannot be written as GGUF, for it could not be read back ({error}); use --merge") from error
    unread = WITHOUT_EFFECT | (WINDOW_KEYS if described.architecture in WINDOWLESS else set())
    ours = config.to_dict() | {"head_dim": _head_dim(config)}
    for key, value in rebuilt.items():
        if key not in unread and (ours.get(key, value) or None) != (value or None):
            raise ExportError(
                f"{key} = {ours[key]!r} has no place in a GGUF file of architecture {described.architecture}, with which llama.cpp "
                f"computes as for {value!r}; use --merge"
            )


# What the metadata says


def _metadata(config: PreTrainedConfig) -> dict[str, object]:
    """Return the architecture's keys, without its name in front."""
    head_dim, rope = _head_dim(config), _rope(config)
    window, architecture = getattr(config, "sliding_window", None), _architecture(config)
    keys: dict[str, object] = {
        "context_length": _context_length(config, architecture),
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if architecture in ("phi3", "gemma2", "gemma3"):
        keys["attention.sliding_window"] = window or 0  # 0: none
    if architecture == "gemma3":
        keys["rope.freq_base_swa"] = float(config.rope_parameters["sliding_attention"]["rope_theta"])
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None):
            keys[name] = float(getattr(config, name))
    return keys | _rope_scaling(config, rope)


def _context_length(config: PreTrainedConfig, architecture: str) -> int:
    window, length = getattr(config, "sliding_window", None), config.max_position_embeddings
    layers = getattr(config, "layer_types", None) or ["sliding_attention"]
    if architecture not in WINDOWLESS or not window or window >= length or "sliding_attention" not in layers:
        return length
    if _rope(config)["rope_type"] == "longrope":
        raise ExportError(f"sliding_window = {window} is less than the context of {length}, and llama.cpp has no such window; use --merge")
    return window


def _rope_scaling(config: PreTrainedConfig, rope: dict) -> dict[str, object]:
    """Return the keys of a scaled rotary embedding; what they cannot say (other yarn constants) is found when they are read back."""
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        keys = {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
        original = rope.get("original_max_position_embeddings")
        return keys | ({"rope.scaling.original_context_length": original} if original else {})
    if config.model_type == "phi3":
        original = config.original_max_position_embeddings
        scale = config.max_position_embeddings / original
        # Phi-3's own: its long and short factors' sines and cosines are scaled by this (arXiv:2402.13753, equation 8 and section 3.2).
        factor = sqrt(1 + log(scale) / log(original)) if kind == "longrope" and scale > 1 else 1.0
        return {"rope.scaling.original_context_length": original, "rope.scaling.attn_factor": factor}
    return {}


def _rope_factors(config: PreTrainedConfig) -> dict[str, list[float]]:
    """Return the tensors by which llama.cpp divides rotary frequencies, by name: Llama 3's, and Phi-3's long and short ones.

    Of Phi-3's, llama.cpp takes the long ones where its context is the longer one, transformers where the text is.
    """
    rope = _rope(config)
    if rope["rope_type"] == "longrope":
        return {f"rope_factors_{length}.weight": list(map(float, rope[f"{length}_factor"])) for length in ("long", "short")}
    if rope["rope_type"] == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        dim = _head_dim(config)
        plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        return {"rope_freqs.weight": (plain / scaled).tolist()}
    return {}


def _rope(config: PreTrainedConfig) -> dict:
    """Return the rotary parameters, of Gemma 3 those of its layers without a window."""
    return config.rope_parameters.get("full_attention", config.rope_parameters)


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
