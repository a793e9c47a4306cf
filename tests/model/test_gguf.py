"""qlite.model.gguf against transformers: tiny models written as llama.cpp writes them, read back, compared weight by weight."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PreTrainedConfig

from qlite.errors import ModelError
from qlite.model.checkpoint import open_checkpoint
from qlite.model.gguf import GgufCheckpoint
from qlite.model.gguf_architecture import ARCHITECTURES
from qlite.model.source import ModelFiles

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
WIDE = SIZES | {"head_dim": 32}  # not hidden / heads
WINDOWED = WIDE | {"sliding_window": 8, "query_pre_attn_scalar": 32}

# llama.cpp's architecture -> the transformers model type and the config of the tiny model.
MODELS = {
    "llama": ("llama", SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}),
    "smollm3": ("smollm3", SIZES | {"num_hidden_layers": 4, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", SIZES | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", WIDE),
    "phi3": ("phi3", SIZES | {"sliding_window": 16, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    "gemma": ("gemma", WIDE),
    "gemma2": ("gemma2", WINDOWED),
    "gemma3": ("gemma3_text", WINDOWED | {"num_hidden_layers": 6}),
}
# What transformers 5.23 loads from GGUF itself.
TRANSFORMERS_READS = ["gemma2", "gemma3", "llama", "phi3", "qwen2", "qwen3"]


def byte_vocabulary() -> tuple[list[str], list[str]]:
    """Return tokens and merges of a byte-level BPE: 256 bytes, three special tokens, the merges "th" and "the"."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    spelling = bytes_to_unicode()
    tokens = [spelling[byte] for byte in range(256)] + ["<s>", "</s>", "<pad>"]
    return [*tokens, "th", "the"], ["t h", "th e"]


VOCABULARY = len(byte_vocabulary()[0])


def tiny_model(architecture: str, extra: dict | None = None) -> torch.nn.Module:
    """Return a model whose float32 weights are multiples of 1/64, so that bfloat16 and an added 1 are exact."""
    model_type, settings = MODELS[architecture]
    config = AutoConfig.for_model(model_type, vocab_size=VOCABULARY, **(settings | (extra or {})))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-24, 25, parameter.shape) / 64)
    return model


def llama_cpp_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder q or k as llama.cpp does: rows i and i + dim/2 of a head become neighbours (its LlamaModel.permute)."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def converted(architecture: str, model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Return the model's tensors as convert_hf_to_gguf.py writes them, under the gguf package's own names."""
    config = model.config
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, suffix = name.rsplit(".", 1)
        values = tensor.numpy()
        if architecture in ("llama", "smollm3") and stem.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads
            values = llama_cpp_rows(values, heads)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        tensors[f"{names.get_name(stem)}.{suffix}"] = values
    return tensors


def add_metadata(writer: gguf.GGUFWriter, architecture: str, config: PreTrainedConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    if architecture in ("phi3", "llama"):
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
    if architecture not in ("phi3", "llama", "qwen2"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if architecture in ("phi3", "gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def add_tokenizer(writer: gguf.GGUFWriter, split: str = "gpt-2") -> None:
    tokens, merges = byte_vocabulary()
    control = {"<s>", "</s>", "<pad>"}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in control else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_pad_token_id(258)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def write_gguf(
    path: Path,
    architecture: str,
    model: torch.nn.Module,
    kinds: tuple[Kind, ...] = (Kind.F32,),
    metadata: dict[str, object] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    split: str = "gpt-2",
) -> ModelFiles:
    """Write a GGUF file, matrices in ``kinds`` by turns and vectors in float32, with further metadata and tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    add_metadata(writer, architecture, model.config)
    add_tokenizer(writer, split)
    for key, value in (metadata or {}).items():
        {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, list: writer.add_array}[type(value)](key, value)
    for place, (name, values) in enumerate((converted(architecture, model) | (tensors or {})).items()):
        kind = kinds[place % len(kinds)] if values.ndim > 1 else Kind.F32
        writer.add_tensor(name, gguf.quantize(values.astype(np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ModelFiles(path.parent, path.name, str(path))


def rebuilt(checkpoint: GgufCheckpoint) -> torch.nn.Module:
    """Return the model that the checkpoint's own config and tensors make, in float32."""
    model = AutoModelForCausalLM.from_config(checkpoint.config(), dtype=torch.float32, attn_implementation="eager").eval()
    missing, unexpected = model.load_state_dict({name: checkpoint.read(name) for name in checkpoint.order()}, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(48)[None] * 5 % VOCABULARY).logits


def test_the_tiny_models_cover_every_architecture():
    assert set(MODELS) == set(ARCHITECTURES)
    assert len(MODELS) == 8


@pytest.mark.parametrize("architecture", MODELS)
def test_tensors_and_config_give_the_model_that_was_converted(architecture, tmp_path):
    original = tiny_model(architecture)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", architecture, original))
    expected = original.state_dict()
    tied = {"lm_head.weight"} if original.config.tie_word_embeddings else set()

    assert set(checkpoint.shapes()) == set(expected) - tied == set(checkpoint.order()) == set(checkpoint.dtypes())
    assert checkpoint.config().tie_word_embeddings == bool(tied)
    for name, shape in checkpoint.shapes().items():
        tensor = checkpoint.read(name)
        assert tensor.dtype == torch.bfloat16
        assert tuple(tensor.shape) == shape
        assert torch.equal(tensor.float(), expected[name]), name
    assert torch.equal(logits(rebuilt(checkpoint)), logits(original))
    assert checkpoint.nbytes == 2 * sum(tensor.numel() for name, tensor in expected.items() if name not in tied)


@pytest.mark.parametrize("architecture", TRANSFORMERS_READS)
def test_quantised_tensors_equal_those_that_transformers_dequantises(architecture, tmp_path):
    kinds = (Kind.Q8_0, Kind.Q4_0, Kind.F16)
    # transformers drops Qwen3's head width from the file and takes its default.
    model = tiny_model(architecture, {"head_dim": 128} if architecture == "qwen3" else None)
    files = write_gguf(tmp_path / "m.gguf", architecture, model, kinds)
    checkpoint = open_checkpoint(files)
    settings = {"gguf_file": "m.gguf", "quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16}
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, **settings).state_dict()
    assert all(torch.equal(checkpoint.read(name), expected[name]) for name in checkpoint.order())


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.BF16, Kind.F16])
def test_a_tensor_larger_than_one_chunk_is_dequantised_like_the_whole(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("qlite.model.gguf.CHUNK_VALUES", 5 * 64)  # 5 rows of 64: 261 rows end in a part of a chunk
    model = tiny_model("qwen2")
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", "qwen2", model, (kind,)))
    weight = model.model.embed_tokens.weight.detach().numpy()
    whole = gguf.dequantize(gguf.quantize(weight, kind), kind)
    assert torch.equal(checkpoint.read("model.embed_tokens.weight"), torch.from_numpy(whole).bfloat16())


def test_a_large_table_never_exists_in_float32(tmp_path):
    psutil = pytest.importorskip("psutil")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen2")
    add_metadata(writer, "qwen2", tiny_model("qwen2").config)
    rows = 2**19  # [524288, 64]: 64 MiB in bfloat16, 128 MiB in float32
    writer.add_tensor("token_embd.weight", np.zeros((rows, 68), np.uint8), raw_dtype=Kind.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(ModelFiles(tmp_path, "m.gguf", "m"))
    process, sizes = psutil.Process(), []
    real = gguf.dequantize

    def watched(data, kind):
        values = real(data, kind)
        sizes.append((values.nbytes, process.memory_info().rss))
        return values

    before = process.memory_info().rss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "dequantize", watched)
        table = checkpoint.read("model.embed_tokens.weight")
    assert table.shape == (rows, 64)
    assert max(size for size, _ in sizes) <= 2**16
    # 64 MiB of result and 34 MiB of the file's pages, which leave with the call.
    assert max(rss for _, rss in sizes) - before < 120 * 2**20


def test_the_tokenizer_carries_vocabulary_special_tokens_and_chat_template(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<other>", "chat_template": "another model's"}))
    files = write_gguf(tmp_path / "m.gguf", "llama", tiny_model("llama"), metadata={"tokenizer.ggml.eot_token_id": 258})
    checkpoint = open_checkpoint(files)
    tokenizer = checkpoint.tokenizer()
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert tokenizer.chat_template == TEMPLATE
    text = "the 7 words, ünd 漢字"
    ids = tokenizer(text).input_ids
    assert ids[0] == VOCABULARY - 1
    assert tokenizer.decode(ids) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=True, return_dict=False)
    assert chat == [256, ord("a"), 257]
    assert tokenizer.name_or_path == files.name
    # Generation stops at the end of the text and at the end of a turn.
    assert checkpoint.generation_config().eos_token_id == [257, 258]


def test_llama_3_rope_scaling_is_recovered_from_its_factors(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    extra = {"rope_parameters": scaling, "max_position_embeddings": 131072, "hidden_size": 256}
    model = tiny_model("llama", extra)
    rotary = model.model.rotary_emb
    plain = 500000.0 ** -(torch.arange(0, 64, 2) / 64)
    factors = (plain / rotary.inv_freq).numpy()  # what the converter stores
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", "llama", model, tensors={"rope_freqs.weight": factors}))
    assert checkpoint.config().rope_parameters == scaling
    assert "rope_freqs.weight" not in checkpoint.order()

    other = write_gguf(tmp_path / "n.gguf", "llama", model, tensors={"rope_freqs.weight": factors**0.5})
    with pytest.raises(ModelError, match=r"rope_freqs\.weight is not Llama 3's"):
        open_checkpoint(other).config()


def test_linear_and_yarn_rope_scaling_are_read(tmp_path):
    keys = {"qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 4.0, "qwen2.rope.scaling.original_context_length": 32}
    rope = open_checkpoint(write_gguf(tmp_path / "a.gguf", "qwen2", tiny_model("qwen2"), metadata=keys)).config().rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 32)

    keys = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    rope = open_checkpoint(write_gguf(tmp_path / "b.gguf", "gemma3", tiny_model("gemma3"), metadata=keys)).config().rope_parameters
    assert rope["full_attention"] == {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0}
    assert rope["sliding_attention"]["rope_type"] == "default"


def test_phi3_long_rope_factors_become_config(tmp_path):
    tensors = {f"rope_factors_{length}.weight": np.full(4, value, np.float32) for length, value in (("long", 2.5), ("short", 1.1))}
    keys = {"phi3.rope.scaling.original_context_length": 64, "phi3.rope.scaling.attn_factor": 1.19}
    config = open_checkpoint(write_gguf(tmp_path / "m.gguf", "phi3", tiny_model("phi3"), metadata=keys, tensors=tensors)).config()
    assert config.rope_parameters["rope_type"] == "longrope"
    assert config.original_max_position_embeddings == 64
    assert config.rope_parameters["long_factor"] == [2.5] * 4
    assert config.rope_parameters["short_factor"] == [1.1] * 4


@pytest.mark.parametrize(
    ("metadata", "tensors", "words"),
    [
        ({"qwen2.rope.scaling.type": "su"}, {}, 'rope scaling "su"'),
        ({"qwen2.logit_scale": 0.1}, {}, r"sets qwen2\.logit_scale"),
        ({"qwen2.expert_count": 8}, {}, "mixture of experts"),
        ({"qwen2.attention.sliding_window": 32}, {}, "reaches back 32 of 128"),
        ({"qwen2.rope.dimension_count": 8}, {}, "rotates 8 of 16"),
        ({"split.count": 2}, {}, "llama-gguf-split --merge"),
        ({}, {"blk.0.ssm_a.weight": np.zeros(4, np.float32)}, r'"blk\.0\.ssm_a\.weight" that is unknown'),
        ({}, {"rope_factors_long.weight": np.ones(8, np.float32)}, r"rope_factors_long\.weight is not read for qwen2"),
    ],
)
def test_what_would_change_the_model_silently_is_refused(metadata, tensors, words, tmp_path):
    files = write_gguf(tmp_path / "m.gguf", "qwen2", tiny_model("qwen2"), metadata=metadata, tensors=tensors)
    with pytest.raises(ModelError, match=words):
        open_checkpoint(files).config()


def test_an_unknown_architecture_is_refused_with_those_that_are_read(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r'"mamba" is not read .* gemma, gemma2, gemma3, llama, phi3, qwen2, qwen3, smollm3'):
        open_checkpoint(ModelFiles(tmp_path, "m.gguf", "m"))


def test_a_tokenizer_with_an_unknown_split_is_refused(tmp_path):
    files = write_gguf(tmp_path / "m.gguf", "llama", tiny_model("llama"), split="deepseek-v3")
    with pytest.raises(ModelError, match='splits text as "deepseek-v3"'):
        open_checkpoint(files).tokenizer()


@pytest.mark.parametrize("kept", [0, 3, 20, 1000, -1])
def test_a_file_cut_short_is_refused(kept, tmp_path):
    files = write_gguf(tmp_path / "m.gguf", "llama", tiny_model("llama"))
    content = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(content[:kept])
    with pytest.raises(ModelError, match=r"m\.gguf: .*(take it anew|download it again|\.gguf file)"):
        open_checkpoint(files)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ModelError, match="is not a GGUF file"):
        open_checkpoint(ModelFiles(tmp_path, "m.gguf", "m"))


def test_the_fingerprint_depends_on_the_header_and_not_on_the_path(tmp_path):
    one = write_gguf(tmp_path / "one.gguf", "llama", tiny_model("llama"))
    (tmp_path / "two.gguf").write_bytes((tmp_path / "one.gguf").read_bytes())
    other = write_gguf(tmp_path / "three.gguf", "llama", tiny_model("llama"), (Kind.F16,))
    prints = [open_checkpoint(files).fingerprint() for files in (one, ModelFiles(tmp_path, "two.gguf", "x"), other)]
    assert prints[0] == prints[1] != prints[2]
    assert prints[0].startswith("gguf:")


def test_smollm2_is_read_from_its_wheel_as_transformers_reads_it(smollm2_files):
    checkpoint = open_checkpoint(smollm2_files)
    config = checkpoint.config()
    assert (config.model_type, config.num_hidden_layers, config.vocab_size) == ("llama", 30, 49152)
    assert config.tie_word_embeddings
    assert len(checkpoint.order()) == 30 * 9 + 2
    # transformers' own reading of the file takes 13 s: its processor for one layer's tensors is enough.
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    processor = LlamaTensorProcessor(config={"num_attention_heads": 9, "num_key_value_heads": 3})
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2_files.folder / smollm2_files.gguf).tensors}
    pairs = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "ffn_down": "mlp.down_proj"}
    for leaf, name in pairs.items():
        tensor = stored[f"blk.29.{leaf}.weight"]
        expected = processor.process(gguf.dequantize(tensor.data, tensor.tensor_type), tensor.name).weights
        assert torch.equal(checkpoint.read(f"model.layers.29.{name}.weight"), torch.tensor(expected).bfloat16())


def test_smollm2s_tokenizer_goes_round_trip_and_keeps_its_template(smollm2_files):
    tokenizer = open_checkpoint(smollm2_files).tokenizer()
    text = "Twelve 12345 don't\n\n  indented, ünd 漢字 🙂"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert len(tokenizer) == 49152
