"""GGUF files of merged models: read back by gguf's reader, by qlite's and by transformers', compared tensor by tensor and in logits."""

import json
import weakref
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedTokenizerFast

from qlite.errors import ExportError, NotMergeable, RecipeError
from qlite.files import new_folder
from qlite.formats import gguf_file
from qlite.formats.gguf_merged import Saying, write_merged_gguf
from qlite.formats.gguf_tokenizer import SPLITS, tokenizer_fields
from qlite.formats.gguf_types import TYPES, gguf_type
from qlite.formats.merged import merged_tensors
from qlite.methods.lora import LoRA
from qlite.model.checkpoint import open_checkpoint
from qlite.model.gguf_architecture import ARCHITECTURES
from qlite.model.load import Base, LoadedBase
from qlite.model.source import ModelFiles
from tests.families import FAMILIES, saved_folder
from tests.model.test_gguf import MODELS, SIZES, TEMPLATE, VOCABULARY, byte_vocabulary, logits, rebuilt, tiny_model, write_gguf

LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500000.0}
LONG = {"rope_type": "longrope", "long_factor": [2.5] * 8, "short_factor": [1.1] * 8, "rope_theta": 10000.0}
# Name -> llama.cpp's architecture, and what the tiny model has beside test_gguf's.
WRITTEN = {
    **{name: (name, {}) for name in MODELS},
    "qwen3": ("qwen3", {"head_dim": 128}),  # transformers drops another width from the file
    "mistral": ("mistral", {"sliding_window": 48}),  # as many as logits() reads
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama 3": ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 8192}, "max_position_embeddings": 131072}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}}),
    "yarn": (
        "qwen2",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5000.0, "original_max_position_embeddings": 32}},
    ),
    "phi3": ("phi3", {"sliding_window": 48}),
    "long phi3": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 32, "sliding_window": None}),
}
# transformers 5.23 drops the biases of Llama, rotary scaling, Gemma's window and scale, and Phi-3's partial rotation from its config.
TRANSFORMERS_COMPUTES = ["llama", "mistral", "qwen2", "qwen3"]
TRANSFORMERS_READS = [*TRANSFORMERS_COMPUTES, "phi3", "gemma2", "gemma3", "llama 3", "linear"]
ROWS = VOCABULARY + 3
METHOD = LoRA(rank=4, alpha=4.0)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return test_gguf's byte-level vocabulary as a tokenizer."""
    tokens, merges = byte_vocabulary()
    pairs = [tuple(merge.split(" ")) for merge in merges]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **named)


def folder_of(tmp: Path, name: str) -> Path:
    """Write the tiny model ``name`` as transformers does, with a tokenizer."""
    model_type, extra = WRITTEN[name]
    if model_type == "mistral":
        from transformers import MistralConfig

        model = AutoModelForCausalLM.from_config(MistralConfig(vocab_size=VOCABULARY, **SIZES | extra), dtype=torch.float32)
    else:
        model = tiny_model(model_type, extra)
    model.resize_token_embeddings(ROWS, mean_resizing=False)  # transformers gives Qwen2's tokenizer a token of its own
    seeded(model)
    folder = tmp / "base"
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def seeded(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(torch.randint(-24, 25, parameter.shape, generator=generator) / 64)
    return model


def loaded(folder: Path | str, method: LoRA | None = METHOD, **base: object) -> LoadedBase:
    """Return the model with an adapter whose products are multiples of 1/64: what is merged is exact in 16 bit, too."""
    opened = Base(**({"model": str(folder), "bits": 16, "dtype": "float32"} | base)).load(torch.device("cpu"), lambda *_: None)
    if method is not None:
        method.attach(opened.model)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in opened.model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.data.copy_(torch.randint(-1, 2, parameter.shape, generator=generator) / 8)
    opened.model.requires_grad_(False).eval()
    return opened


def written(tmp: Path, base: LoadedBase, kind: str = "f32", stop_ids: tuple[int, ...] = (257,), template: str | None = TEMPLATE) -> Path:
    """Write the merged model into ``tmp``/out as the export does; return the file."""
    with new_folder(tmp / "out") as folder:
        write_merged_gguf(folder / "m.gguf", base, Saying("tiny", template, stop_ids), TYPES[kind], lambda *_: None)
    return tmp / "out" / "m.gguf"


def read(path: Path):
    return open_checkpoint(ModelFiles(path.parent, path.name, str(path)))


def metadata_of(path: Path) -> dict[str, object]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def test_every_architecture_that_is_read_is_written():
    assert {name for name, _ in WRITTEN.values()} == set(ARCHITECTURES) | {"mistral"}
    assert len(WRITTEN) == 14


@pytest.mark.parametrize("name", WRITTEN)
def test_the_file_read_back_is_the_adapted_model(name, tmp_path):
    base = loaded(folder_of(tmp_path, name))
    path = written(tmp_path, base)
    checkpoint = read(path)
    again = rebuilt(checkpoint)
    for tensor in merged_tensors(base.model):
        assert torch.equal(checkpoint.read(tensor.name).float(), tensor.whole().float()), tensor.name
    assert len(checkpoint.order()) == len(list(merged_tensors(base.model)))
    torch.testing.assert_close(logits(again), logits(base.model), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", TRANSFORMERS_READS)
def test_transformers_reads_the_file_as_the_adapted_model(name, tmp_path):
    base = loaded(folder_of(tmp_path, name))
    path = written(tmp_path, base, "f16")
    settings = {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    again = AutoModelForCausalLM.from_pretrained(path.parent, attn_implementation="eager", **settings).eval()
    tensors = again.state_dict()
    assert all(torch.equal(tensors[tensor.name], tensor.whole()) for tensor in merged_tensors(base.model))
    if name in TRANSFORMERS_COMPUTES:
        torch.testing.assert_close(logits(again), logits(base.model), rtol=1e-5, atol=1e-4)


def test_a_head_that_was_trained_whole_is_the_files_output(tmp_path):
    base = loaded(folder_of(tmp_path, "llama"), LoRA(rank=4, modules_to_save=("lm_head",)))
    base.model.lm_head.weight.data.add_(0.5)
    (head,) = (tensor for tensor in gguf.GGUFReader(written(tmp_path, base)).tensors if tensor.name == "output.weight")
    assert torch.equal(torch.tensor(head.data), base.model.lm_head.weight)


def test_a_new_token_and_its_row_are_in_the_file(tmp_path):
    base = loaded(folder_of(tmp_path, "llama"), None)
    method = LoRA(rank=4, new_tokens=("<tool>",)).resolved(base.tokenizer)
    method.attach(base.model)
    base.model.model.embed_tokens.token_adapter.trainable_tokens_delta.data.fill_(0.5)
    path, (token,) = written(tmp_path, base), method.trained_tokens
    metadata = metadata_of(path)
    assert metadata["tokenizer.ggml.tokens"][token] == "<tool>"
    assert metadata["tokenizer.ggml.token_type"][token] == gguf.TokenType.USER_DEFINED
    (table,) = (tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "token_embd.weight")
    assert (table.data == 0.5).all(axis=1).nonzero()[0].tolist() == [token]


def test_llamas_q_and_k_stand_in_llama_cpps_order_and_vectors_are_float32(tmp_path):
    base = loaded(folder_of(tmp_path, "llama"))
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(written(tmp_path, base, "f16")).tensors}
    merged = {tensor.name: tensor.whole().numpy() for tensor in merged_tensors(base.model)}
    q, k = (merged[f"model.layers.1.self_attn.{leaf}_proj.weight"] for leaf in "qk")
    for heads, values, leaf in ((4, q, "q"), (2, k, "k")):
        # Rows i and i + 8 of a head of 16 become neighbours.
        expected = np.stack([values[head * 16 + half * 8 + i] for head in range(heads) for i in range(8) for half in range(2)])
        assert np.array_equal(tensors[f"blk.1.attn_{leaf}.weight"].data.astype(np.float32), expected)
    assert tensors["blk.1.attn_q.weight"].tensor_type == Kind.F16
    assert {t.tensor_type for name, t in tensors.items() if name.endswith("norm.weight")} == {Kind.F32}


def test_the_metadata_says_what_the_model_is(tmp_path):
    base = loaded(folder_of(tmp_path, "llama"))
    said = metadata_of(written(tmp_path, base, "q8_0", stop_ids=(257, 258)))
    tokens, merges = byte_vocabulary()
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "tiny",
        "general.base_model.count": 1,
        "general.base_model.0.name": "base",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.vocab_size": ROWS,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 5000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*tokens, "[PAD261]", "[PAD262]", "[PAD263]"],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [1] * 256 + [3] * 3 + [1] * 2 + [5] * 3,
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.ggml.eot_token_id": 258,
        "tokenizer.ggml.padding_token_id": 258,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    eps = said.pop("llama.attention.layer_norm_rms_epsilon")
    assert eps == np.float32(1e-6)
    assert {key: value for key, value in said.items() if not key.startswith("GGUF.")} == expected


@pytest.mark.parametrize(("name", "architecture"), [("mistral", "llama"), ("phi3", "phi3")])
def test_a_window_that_llama_cpp_does_not_know_ends_the_context(name, architecture, tmp_path):
    said = metadata_of(written(tmp_path, loaded(folder_of(tmp_path, name))))
    assert (said["general.architecture"], said[f"{architecture}.context_length"]) == (architecture, 48)


# Kinds of quantisation


@pytest.mark.parametrize(
    ("kind", "error"), [("bf16", 2**-8), ("q8_0", 1 / 127), ("q5_1", 1 / 31), ("q5_0", 1 / 15), ("q4_1", 1 / 15), ("q4_0", 1 / 7)]
)
def test_each_kind_holds_the_weights_within_its_error(kind, error, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "CHUNK_VALUES", 32 * 7)  # slices that end within a row
    base = loaded(folder_of(tmp_path, "qwen2"))
    path = written(tmp_path, base, kind)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    merged = {tensor.name: tensor.whole().numpy() for tensor in merged_tensors(base.model)}
    for name, ours in (
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight"),
        ("token_embd.weight", "model.embed_tokens.weight"),
    ):
        stored = tensors[name]
        in_eight = name == "token_embd.weight" and kind[:2] in ("q4", "q5")
        assert stored.tensor_type == (Kind.Q8_0 if in_eight else TYPES[kind].kind)
        values, expected = gguf.dequantize(stored.data, stored.tensor_type), merged[ours]
        assert np.abs(values - expected).max() <= error * np.abs(expected).max()
        whole = gguf.quantize(expected, stored.tensor_type)
        assert np.array_equal(stored.data.reshape(-1), whole.view(stored.data.dtype).reshape(-1))


def test_rows_that_fill_no_block_are_float16(tmp_path, monkeypatch):
    monkeypatch.setitem(WRITTEN, "narrow", ("qwen2", {"intermediate_size": 80}))
    path = written(tmp_path, loaded(folder_of(tmp_path, "narrow")), "q8_0")
    tensors = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors}
    assert (tensors["blk.0.ffn_down.weight"], tensors["blk.0.ffn_up.weight"]) == (Kind.F16, Kind.Q8_0)


def test_a_type_that_python_cannot_quantise_to_is_refused_with_those_it_can():
    assert gguf_type("Q8_0").name == "q8_0"
    with pytest.raises(RecipeError, match=r"--gguf q4_k_m: .* f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0\. .*llama-quantize"):
        gguf_type("q4_k_m")


def test_the_types_offered_are_those_the_package_quantises():
    for each in TYPES.values():
        assert gguf.quantize(np.ones((1, 64), np.float32), each.kind).nbytes > 0
    with pytest.raises(NotImplementedError):
        gguf.quantize(np.ones((1, 256), np.float32), Kind.Q4_K)


# A base that was a GGUF file


def test_a_gguf_base_gives_its_own_metadata_and_tokenizer_back(tmp_path):
    more = {"tokenizer.ggml.eot_token_id": 258, "general.license": "apache-2.0", "llama.rope.scaling.finetuned": "no"}
    files = write_gguf(tmp_path / "base.gguf", "llama", tiny_model("llama"), (Kind.F16,), metadata=more, split="smollm")
    base = loaded(tmp_path / "base.gguf")
    path = written(tmp_path, base, "f16", stop_ids=(257, 258), template="{{ messages }} another")
    before, after = metadata_of(tmp_path / "base.gguf"), metadata_of(path)
    for key, value in before.items():
        if key.startswith(("llama.", "tokenizer.ggml.")):
            assert after[key] == value, key
    assert after["general.license"] == "apache-2.0"
    assert after["tokenizer.chat_template"] == "{{ messages }} another"
    assert set(after) - set(before) == {
        *("general.type", "general.name", "general.base_model.count", "general.base_model.0.name"),
        *("general.file_type", "general.quantization_version"),
    }
    assert read(path).tokenizer().get_vocab() == open_checkpoint(files).tokenizer().get_vocab()
    torch.testing.assert_close(logits(rebuilt(read(path))), logits(base.model), rtol=1e-5, atol=1e-4)


def test_llama_3s_rope_factors_of_a_gguf_base_are_kept(tmp_path):
    llama3 = written(tmp_path, loaded(folder_of(tmp_path, "llama 3")))
    base = loaded(llama3)
    path = written(tmp_path / "second", base)
    first, second = (next(t.data for t in gguf.GGUFReader(p).tensors if t.name == "rope_freqs.weight") for p in (llama3, path))
    assert first.dtype == np.float32
    assert np.array_equal(first, second)
    assert first.max() == pytest.approx(32.0)


# Tokenizers


TEXTS = ["the 7 words of then, don't", "  twelve 12345\n\n ünd 漢字 🙂", "<s>x</s>"]


def test_the_tokenizer_of_the_file_gives_the_same_ids(tmp_path):
    base = loaded(folder_of(tmp_path, "llama"))
    again = read(written(tmp_path, base)).tokenizer()
    assert [again(text).input_ids for text in TEXTS] == [base.tokenizer(text).input_ids for text in TEXTS]


def test_rows_of_the_embedding_that_no_token_has_are_filled_up():
    fields = tokenizer_fields(byte_tokenizer(), VOCABULARY + 2)
    assert fields["tokenizer.ggml.tokens"][-3:] == ["the", f"[PAD{VOCABULARY}]", f"[PAD{VOCABULARY + 1}]"]
    assert fields["tokenizer.ggml.token_type"][-3:] == [1, 5, 5]
    with pytest.raises(ExportError, match=f"token of id {VOCABULARY - 1}, and the model's embedding 40 rows"):
        tokenizer_fields(byte_tokenizer(), 40)


def test_each_way_to_split_text_gets_llama_cpps_name():
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    found = {}
    for (split, _), name in SPLITS.items():
        if name in GGUF_PRE_TOKENIZER_SPLITS:
            found[name] = split == GGUF_PRE_TOKENIZER_SPLITS[name]
    assert found == {"llama-bpe": True, "smaug-bpe": True, "qwen2": True, "tekken": True, "gpt-4o": True}
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    assert named(digits) == "smollm"
    for (split, ignores), name in SPLITS.items():
        if len(split) > 30:
            steps = [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
            assert named(pre_tokenizers.Sequence(steps), ignores) == name


def named(split: object, ignore_merges: bool = False) -> object:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = split
    tokenizer.backend_tokenizer.model.ignore_merges = ignore_merges
    return tokenizer_fields(tokenizer, VOCABULARY)["tokenizer.ggml.pre"]


def test_a_split_that_llama_cpp_does_not_name_is_refused():
    with pytest.raises(ExportError, match=r"splits text in a way that has no name in llama\.cpp"):
        named(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("x+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]))
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ExportError, match=r"rewrites text first \(Lowercase\)"):
        tokenizer_fields(tokenizer, VOCABULARY)


def sentencepiece_tokenizer(prefix: bool = True, merges: list[tuple[str, str]] | None = None) -> PreTrainedTokenizerFast:
    """Return a BPE with bytes to fall back on, as Llama 2's tokenizer.json has it."""
    letters = ["\u2581", *"abcdht", "e"]
    merges = merges or [("t", "h"), ("th", "e"), ("\u2581", "the"), ("a", "b")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *("".join(pair) for pair in merges)]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "\u2581")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace]) if prefix else replace
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_sentencepieces_bpe_is_written_with_scores_in_the_order_of_its_merges():
    tokenizer = sentencepiece_tokenizer()
    fields = tokenizer_fields(tokenizer, len(tokenizer))
    scores = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"], strict=True))
    assert [scores[piece] for piece in ("th", "the", "\u2581the", "ab", "a")] == [0.0, -1.0, -2.0, -3.0, -1000.0]
    kinds = fields["tokenizer.ggml.token_type"]
    assert (kinds[0], set(kinds[1:3]), set(kinds[3:259]), set(kinds[259:])) == (2, {3}, {6}, {1})
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.add_space_prefix"]) == ("llama", True)
    assert tokenizer_fields(sentencepiece_tokenizer(prefix=False), 300)["tokenizer.ggml.add_space_prefix"] is False


def test_merges_that_scores_cannot_say_are_refused():
    tokenizer = sentencepiece_tokenizer(merges=[("t", "h"), ("h", "e"), ("th", "e"), ("a", "b"), ("t", "he")])
    with pytest.raises(ExportError, match='makes "the" by merges of different rank'):
        tokenizer_fields(tokenizer, 300)


# What is refused, and leaves nothing


@pytest.mark.parametrize("family", ["gpt_neox", "olmo2", "cohere"])
def test_another_family_is_refused_with_those_that_are_written(family, tmp_path):
    base = loaded(saved_folder(tmp_path, FAMILIES[family]))
    words = (
        rf'"{family}" models are not written as GGUF; these are: gemma, gemma2, gemma3_text, llama, mistral, phi3, qwen2, qwen3, smollm3\.'
    )
    with pytest.raises(ExportError, match=words):
        written(tmp_path, base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "extra", "words"),
    [
        ("qwen3", {"attention_bias": True}, r"attention_bias = True has no place"),
        ("llama", {"hidden_act": "gelu"}, r"hidden_act = 'gelu' has no place .* computes as for 'silu'"),
        ("smollm3", {"no_rope_layer_interval": 2}, r"no_rope_layers = \[1, 0, 1, 0\] has no place"),
        ("gemma2", {"query_pre_attn_scalar": 7}, r"query_pre_attn_scalar = 7 has no place"),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "beta_fast": 9.0}},
            r"rope_parameters = .*'beta_fast': 9\.0",
        ),
        ("phi3", {"rope_parameters": LONG, "sliding_window": 48}, r"sliding_window = 48 is less than the context of 128"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}, r"rope_parameters = .*dynamic"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused_by_name(name, extra, words, tmp_path, monkeypatch):
    monkeypatch.setitem(WRITTEN, name, (name, extra))
    base = loaded(folder_of(tmp_path, name))
    with pytest.raises(ExportError, match=words):
        written(tmp_path, base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_values_that_do_not_fit_or_are_not_finite_leave_nothing(tmp_path):
    base = loaded(folder_of(tmp_path, "llama"))
    last = base.model.lm_head.weight
    last[0, 0] = 1e6
    for kind in ("f16", "q4_0"):
        with pytest.raises(ExportError, match=r"output\.weight: values up to 1e\+06 do not fit (f16|q8_0) .*--gguf bf16"):
            written(tmp_path, base, kind)
    last[0, 0] = float("nan")
    with pytest.raises(ExportError, match=r"output\.weight: has values that are not finite"):
        written(tmp_path, base, "f32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_an_export_that_is_stopped_leaves_nothing_and_the_old_one_as_it_was(tmp_path):
    base = loaded(folder_of(tmp_path, "llama"))
    content = written(tmp_path, base).read_bytes()

    def stop(phase: str, done: int, total: int) -> None:
        assert phase == "merge"
        if done > total / 2:
            raise KeyboardInterrupt

    for name in ("new", "out"):
        with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / name) as folder:
            write_merged_gguf(folder / "m.gguf", base, Saying("other", None, ()), TYPES["f32"], stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]
    assert (tmp_path / "out" / "m.gguf").read_bytes() == content
    assert set(json.loads((tmp_path / "out" / "manifest.json").read_text())) == {"m.gguf"}


def test_what_no_weight_can_say_is_refused(tmp_path):
    base = loaded(folder_of(tmp_path, "llama"))
    base.model.register_parameter("extra", nn.Parameter(torch.ones(1)))
    with pytest.raises(NotMergeable, match="extra is no weight"):
        written(tmp_path, base)


def test_no_more_than_one_merged_tensor_is_alive(tmp_path, monkeypatch):
    base, made = loaded(folder_of(tmp_path, "llama")), []
    own = {parameter.data_ptr() for parameter in base.model.parameters()}
    real = gguf_file._quantised

    def watched(values, tensor):
        assert [name for name, ref in made if ref() is not None] == []
        if values.data_ptr() not in own:
            made.append((tensor.name, weakref.ref(values)))
        return real(values, tensor)

    monkeypatch.setattr(gguf_file, "_quantised", watched)
    written(tmp_path, base)
    assert len(made) == 2 * 7
