"""llama.cpp itself on what is written: tiny models of every architecture, logits against the adapted model's; then a real one.

Run with ``pytest -m slow -n 0 -s tests/formats/test_llama_cpp.py`` where llama-cpp-python is installed.
"""

from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qlite.formats.gguf_lora import write_adapter_gguf
from qlite.formats.gguf_tokenizer import DIGITS, GPT2, SPLITS
from qlite.methods.lora import LoRA
from qlite.recipe.read import read_recipe
from tests.formats.test_gguf_out import ROWS, TEXTS, WRITTEN, folder_of, loaded, sentencepiece_tokenizer, written
from tests.model.test_gguf import logits
from tools import check_gguf

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed, so llama.cpp itself is not asked")
pytestmark = pytest.mark.slow
IDS = [index * 5 % 261 for index in range(48)]  # those of logits()
ARITHMETIC = 5e-3
"""Largest difference, relative to the largest logit: llama.cpp's CPU keeps keys and values in float16; Gemma needs most, 2.4e-3."""


def in_llama_cpp(file: Path, adapter: Path | None = None) -> check_gguf.LlamaCpp:
    return check_gguf.LlamaCpp(file, adapter, context=64)


@pytest.mark.parametrize("name", WRITTEN)
def test_llama_cpp_computes_the_adapted_model(name, tmp_path):
    base = loaded(folder_of(tmp_path, name))
    theirs, ours = torch.from_numpy(in_llama_cpp(written(tmp_path, base)).logits(IDS)), logits(base.model)[0]
    plain = logits(loaded(tmp_path / "base", None).model)[0]
    print(f"{name}: largest difference {(theirs - ours).abs().max():.2e} of logits up to {ours.abs().max():.2f}")
    assert theirs.shape == (48, ROWS)
    assert (theirs - ours).abs().max() < ARITHMETIC * ours.abs().max()
    assert (theirs - plain).abs().max() > 10 * ARITHMETIC * ours.abs().max()


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma", "phi3"])
@pytest.mark.parametrize("rslora", [False, True])
def test_llama_cpp_puts_the_adapter_on_its_base(name, rslora, tmp_path):
    method = LoRA(rank=4, alpha=8.0, rslora=rslora, rank_per_target={"o_proj": 2})
    base = loaded(folder_of(tmp_path, name), method)
    file = written(tmp_path, loaded(tmp_path / "base", None))
    write_adapter_gguf(tmp_path / "lora.gguf", base, method.alpha, "tiny", lambda *_: None)
    theirs, ours = torch.from_numpy(in_llama_cpp(file, tmp_path / "lora.gguf").logits(IDS)), logits(base.model)[0]
    print(f"{name}: largest difference {(theirs - ours).abs().max():.2e} of logits up to {ours.abs().max():.2f}")
    assert (theirs - ours).abs().max() < ARITHMETIC * ours.abs().max()


def test_llama_cpp_gives_the_same_ids(tmp_path):
    base = loaded(folder_of(tmp_path, "llama"))
    cpp = in_llama_cpp(written(tmp_path, base))
    assert [cpp.ids(text) for text in TEXTS] == [base.tokenizer(text).input_ids for text in TEXTS]


PROSE = [
    "I'll say: they'RE 1234567 words, DON'T   join\n\n\tthem (all) of 2024-11-26!",
    "camelCase HTTPServer x86_64 naïve café ünd 漢字仮名 🙂 3.14 ٤٥٦",
    "def f(x):\n    return x**2  # tabs\t\tand\r\nline ends\n\n\n",
]


@pytest.mark.parametrize(("split", "ignores"), SPLITS, ids=SPLITS.values())
def test_llama_cpp_splits_text_as_the_name_says(split, ignores, tmp_path):
    """The merges were learned without any split, so that each one that a split forbids shows in the ids."""
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend = Tokenizer(models.BPE(ignore_merges=ignores))
    backend.pre_tokenizer = whole
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(PROSE * 5, trainer)
    backend.model.ignore_merges = ignores
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    steps = {GPT2: [plain], DIGITS: [pre_tokenizers.Digits(individual_digits=True), plain]}
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps.get(split, [pre_tokenizers.Split(Regex(split), "isolated"), whole]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    base = loaded(folder_of(tmp_path, "llama"), None)
    base.model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    base.__dict__["tokenizer"] = tokenizer
    cpp = in_llama_cpp(written(tmp_path, base, stop_ids=(1,), template=None))
    assert [cpp.ids(text) for text in PROSE] == [tokenizer(text).input_ids for text in PROSE]


@pytest.mark.parametrize("prefix", [True, False])
def test_llama_cpp_gives_the_same_ids_with_sentencepieces_bpe(prefix, tmp_path):
    folder = folder_of(tmp_path, "llama")
    base, tokenizer = loaded(folder), sentencepiece_tokenizer(prefix)
    base.model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    base.__dict__["tokenizer"] = tokenizer
    cpp = in_llama_cpp(written(tmp_path, base, stop_ids=(2,), template=None))
    texts = ["the bad cab", " the  the", "thethab é", "ab\ntha"]
    assert [cpp.ids(text) for text in texts] == [tokenizer(text).input_ids for text in texts]


def test_a_real_run_answers_the_same_in_llama_cpp(tmp_path, smollm2_files):
    from qlite.export import main as export
    from tests.tiny_run import run

    few = ["train.steps=3", "schedule.warmup_steps=1", "train.micro_batch=4", "train.exact_match_rows=0"]
    changes = [*few, f"output.dir={tmp_path / 'run'}"]
    run(read_recipe(Path("recipes/quickstart.toml"), changes))
    folder = str(tmp_path / "run")
    export(["--gguf", "f16", folder, "--device", "cpu"])
    export(["--gguf-adapter", folder, "--device", "cpu"])
    check_gguf.main([folder])
    check_gguf.main([folder, "--adapter", "--rows", "20"])
