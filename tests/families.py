"""Tiny random models of the families that users train: each with the one trait that makes it unlike the others."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 128
# Wide enough for 4-bit blocks of 64; two layers are the fewest with a first and a last one.
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
SPECIAL = ["<bos>", "<eos>", "<pad>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class Family:
    """One architecture: its transformers name and what it has beside ``SIZES``."""

    model_type: str
    options: dict = field(default_factory=dict)
    stored: torch.dtype = torch.bfloat16
    """The dtype that the files hold."""

    def config(self) -> PreTrainedConfig:
        options = SIZES | self.options
        return CONFIG_MAPPING[self.model_type](**{key: value for key, value in options.items() if value is not None})


LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    **{f"linear_{side}_head_dim": 16 for side in ("key", "value")},
    **{f"linear_num_{side}_heads": 4 for side in ("key", "value")},
}
FOUR_MULTIPLIERS = {"logits_scaling": 0.5, "embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.2}

FAMILIES = {
    "llama": Family("llama", stored=torch.float32),
    "llama_biased": Family("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": Family("mistral", {"sliding_window": 8}),
    "qwen2": Family("qwen2", {"tie_word_embeddings": True}),  # biases on q, k and v
    "qwen3": Family("qwen3"),  # norms of queries and keys
    "qwen3_5": Family("qwen3_5_text", LINEAR_ATTENTION),  # convolutions
    "gemma": Family("gemma", {"tie_word_embeddings": True}),  # scaled embeddings
    "gemma2": Family(  # both soft-cappings, set low enough to bend
        "gemma2", {"tie_word_embeddings": True, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16}
    ),
    "gemma3": Family("gemma3_text", {"tie_word_embeddings": True, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "phi": Family("phi", {"partial_rotary_factor": 0.5}),  # a bias on the output head too
    "phi3": Family("phi3", {"head_dim": None}),  # fused linears
    "gpt_neox": Family("gpt_neox", {"num_key_value_heads": None, "head_dim": None}),  # fused, not interleaved, parallel residual
    "stablelm": Family("stablelm", {"head_dim": None, "use_qkv_bias": True, "qk_layernorm": True}),
    "olmo2": Family("olmo2", {"head_dim": None}),  # norms after the sublayers
    "granite": Family("granite", {"head_dim": None, **FOUR_MULTIPLIERS}),
    "smollm3": Family("smollm3", {"head_dim": None, "no_rope_layer_interval": 2, "tie_word_embeddings": True}, torch.float32),
    "cohere": Family("cohere", {"head_dim": None, "logit_scale": 0.25, "tie_word_embeddings": True, "use_qk_norm": True}),
    "cohere2": Family("cohere2", {"logit_scale": 0.25, "tie_word_embeddings": True, "sliding_window": 8}),
    "starcoder2": Family("starcoder2", {"head_dim": None}),  # layer norms with biases
    "glm4": Family("glm4", {"partial_rotary_factor": 0.5, "attention_bias": True}),
    "opt": Family("opt", {"ffn_dim": 96, "word_embed_proj_dim": 32}),  # a projection between the last hidden state and the head
    "gptj": Family("gptj", {"n_inner": 96, "rotary_dim": 8}),  # no SDPA
    "gemma4": Family("gemma4_text", {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 0}),
    "falcon": Family("falcon", {"head_dim": None, "tie_word_embeddings": True, "new_decoder_architecture": True}),  # its own linear class
}
EXPERTS = {
    "mixtral": Family("mixtral", {"num_local_experts": 4}),
    "qwen3_moe": Family("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "olmoe": Family("olmoe", {"head_dim": None, "num_experts": 4, "num_experts_per_tok": 2}),
}


# A state-space model beside the attention, which is refused; its head asks the decoder for a number.
MAMBA = Family("falcon_h1", {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "lm_head_multiplier": 0.5})


def new_model(family: Family) -> PreTrainedModel:
    """Return a float32 model with every parameter drawn anew: one that starts at 0 or 1 would hide its own loss."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family.config(), dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            drawn = torch.randn_like(p) * (0.1 if p.dim() > 1 else 0.2)
            p.copy_(p + drawn if p.dim() == 1 else drawn)
    return model.eval()


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of at most ``VOCAB`` tokens with a chat template.

    Byte-level BPE: transformers rebuilds the tokenizers of some families (Qwen2) as that, whatever the file says.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    printable = [*sorted(letter for letter in alphabet if letter.isascii()), "\u0120", "\u010a"]  # space and new line
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=printable, limit_alphabet=len(printable))
    backend.train_from_iterator([f"{role} the {word} of then" for role in ("user", "assistant") for word in ("one", "two")] * 9, trainer)
    named = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT_TEMPLATE, **named)


def saved_folder(tmp: Path, family: Family) -> Path:
    """Return a new folder under ``tmp`` with ``family``'s model, tokenizer and generation config, as transformers saves them."""
    folder = tmp / f"{family.model_type}-{len(list(tmp.iterdir()))}"
    new_model(family).to(family.stored).save_pretrained(folder)
    new_tokenizer().save_pretrained(folder)
    GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2).save_pretrained(folder)
    return folder
