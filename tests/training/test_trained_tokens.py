"""Runs that train rows of single tokens, old ones and new ones: only these rows, resumed, switched off, merged and exported."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlite.errors import RecipeError
from qlite.export import export
from qlite.formats.peft import PREFIX, WEIGHTS
from qlite.methods.base import adapters_off
from qlite.training.forecast import PHASES
from qlite.training.merging import Merge, write_audited
from qlite.training.open_run import open_run
from qlite.training.planning import planned_and_measured
from qlite.training.run_folder import RunFolder
from tests.marks import slow
from tests.tiny import tiny_llama
from tests.tiny_run import Watcher, opened_run, run, tiny_recipe
from tests.tiny_tokenizer import VOCAB_SIZE, tiny_tokenizer
from tools.merge import main as merge_tool

SPARE = 5
TOOL, OLD = VOCAB_SIZE, tiny_tokenizer().convert_tokens_to_ids("q")
TOKENS = {"trained_tokens": ["q"], "new_tokens": ["<tool>"]}
EMBED, HEAD = "model.embed_tokens", "lm_head"
DELTA = "token_adapter.trainable_tokens_delta"
CASES = {
    "tied": {"tied": True},
    "dense vocabulary": {},
    "head in 4 bit, embedding in 8, on the host": {"base": {"head_bits": 4, "embedding_bits": 8}, "memory": {"embedding": "host"}},
    "tied, in 4 bit, packed lines": {"tied": True, "base": {"head_bits": 4, "embedding_bits": 4}, "train": {"packing": True}},
    "base on the host": {"memory": {"base": "host"}},
}
IN_DEFAULT = ("head in 4 bit, embedding in 8, on the host",)


def recipe_of(folder: Path, method: dict, tied: bool = False, **changes: dict):
    """Return the recipe over a base with ``SPARE`` rows that no token has, and rows of text that hold the new token."""
    if not (folder / "base").exists():
        tiny_llama(vocab_size=VOCAB_SIZE + SPARE, tie_word_embeddings=tied).save_pretrained(folder / "base")
        tiny_tokenizer().save_pretrained(folder / "base")
        for name, count in (("train", 40), ("test", 7)):
            rows = [{"prompt": f"a{'q' * (n % 3)}", "completion": f"<tool>{n}q<tool>"} for n in range(count)]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables = {"train": {"exact_match_rows": 0, "eval_every": 0}, **changes}
    tables["train"] = {"exact_match_rows": 0, "eval_every": 0, **tables["train"]}
    return tiny_recipe(folder, method=method, **tables)


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    ids = torch.tensor([[5, OLD, 9, TOOL, 11, OLD, TOOL, 30]])
    return model(input_ids=ids).logits.float()


@pytest.mark.parametrize("case", [case if case in IN_DEFAULT else slow(case) for case in CASES])
def test_a_run_that_trains_rows_goes_on_to_the_same_bytes_switches_off_and_merges(case, tmp_path):
    changes, is_tied = CASES[case], CASES[case].get("tied", False)
    for place in ("whole", "stopped"):
        (tmp_path / place).mkdir()
    run(recipe_of(tmp_path / "whole", TOKENS, **changes))
    run(recipe_of(tmp_path / "stopped", TOKENS, **changes), stop_after=3)
    run(recipe_of(tmp_path / "stopped", TOKENS, **changes))
    adapter, again = (tmp_path / place / "run" / "adapter" / WEIGHTS for place in ("whole", "stopped"))
    assert adapter.read_bytes() == again.read_bytes()
    rows = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(adapter).items() if "lora" not in name}
    assert set(rows) == {f"{EMBED}.{DELTA}"} | (set() if is_tied else {f"{HEAD}.{DELTA}"})
    assert {tuple(tensor.shape) for tensor in rows.values()} == {(2, 64)}

    opened = opened_run(tmp_path / "whole")
    model, live = opened.base.model, logits_of(opened.base.model)
    plain = open_run(RunFolder(tmp_path / "whole" / "run"), "cpu", lambda *_: None)
    with adapters_off(model):
        assert torch.equal(logits_of(model), logits_of(plain.base.model))
    assert torch.equal(logits_of(model), live)

    base = load_file(tmp_path / "whole" / "base" / "model.safetensors")
    write_audited(opened, tmp_path / "merged", Merge(torch.float32, "original", most_kl=1.0), Watcher())
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert written.keys() == base.keys()
    own = sorted([OLD, TOOL])
    for layer in (EMBED,) if is_tied else (EMBED, HEAD):
        expected = base[f"{layer}.weight"].float()
        assert not torch.equal(expected[own].bfloat16(), rows[f"{layer}.{DELTA}"])
        expected[own] = rows[f"{layer}.{DELTA}"].float()
        assert torch.equal(written[f"{layer}.weight"], expected)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.convert_tokens_to_ids("<tool>") == TOOL
    assert TOOL in tokenizer("a<tool>b").input_ids

    write_audited(opened, tmp_path / "over", Merge(torch.float32, "dequantised", most_kl=1.0), Watcher())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "over", dtype=torch.float32)
    # The run rounds every product to bfloat16.
    assert (logits_of(merged) - live).abs().max() < 0.05 * live.abs().max()
    assert merged.config.tie_word_embeddings == is_tied


def test_the_optimizer_holds_only_the_rows_they_move_and_the_adapter_has_its_tokenizer_beside_it(tmp_path):
    run(recipe_of(tmp_path, TOKENS, tied=True))
    tensors = load_file(tmp_path / "run" / "adapter" / WEIGHTS)
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    assert load_file(newest / "optimizer.safetensors")["0.remainder"].numel() == sum(tensor.numel() for tensor in tensors.values())
    base = load_file(tmp_path / "base" / "model.safetensors")[f"{EMBED}.weight"]
    rows = tensors[f"{PREFIX}{EMBED}.{DELTA}"].float()
    assert all(not torch.equal(row, base[token].bfloat16().float()) for token, row in zip(sorted([OLD, TOOL]), rows, strict=True))
    export(tmp_path / "run", adapter="peft", out=tmp_path / "peft", quiet=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "peft")
    assert tokenizer.decode(tokenizer("a<tool>b").input_ids, skip_special_tokens=True) == "a<tool>b"
    assert tokenizer.convert_tokens_to_ids("<tool>") == TOOL


def test_the_merge_tool_writes_the_tokenizer_of_training_from_the_runs_own_folder_and_from_the_exported_one(tmp_path, capfd):
    run(recipe_of(tmp_path, TOKENS, tied=True))
    export(tmp_path / "run", adapter="peft", out=tmp_path / "peft", quiet=True)
    for adapter, out in ((tmp_path / "run" / "adapter", tmp_path / "of-run"), (tmp_path / "peft", tmp_path / "of-peft")):
        capfd.readouterr()
        merge_tool([str(adapter), "--base", str(tmp_path / "base"), "--out", str(out)])
        assert "not the one of training" not in " ".join("".join(capfd.readouterr()).split())
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert tokenizer.convert_tokens_to_ids("<tool>") == TOOL
        assert TOOL in tokenizer("a<tool>b").input_ids
    # A base whose tokenizer has them is left as it is.
    tokenizer.save_pretrained(tmp_path / "base")
    merge_tool([str(tmp_path / "run" / "adapter"), "--base", str(tmp_path / "base"), "--out", str(tmp_path / "again")])
    assert AutoTokenizer.from_pretrained(tmp_path / "again").convert_tokens_to_ids("<tool>") == TOOL


@pytest.mark.parametrize("tied", [slow(True), slow(False)])
def test_a_run_with_rows_measures_what_was_planned(tied, tmp_path):
    run(recipe_of(tmp_path, TOKENS, tied=tied, memory={"plan": "require"}))
    record = json.loads((tmp_path / "run" / "memory.json").read_text())
    found = {phase: (planned, measured) for phase, planned, measured in planned_and_measured(record)}
    assert found.keys() <= set(PHASES)
    assert len(found) >= 4
    assert all(abs(planned - measured) <= 0.01 * measured for planned, measured in found.values()), found


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            {"trained_tokens": ["<|im_strt|>"]},
            'the tokenizer has no token "<|im_strt|>"; did you mean "<|im_start|>"? A text that is to become',
        ),
        ({"trained_tokens": ["q", "q"]}, f"method.trained_tokens: token {OLD} is named twice"),
        ({"new_tokens": ["q"]}, 'method.new_tokens: "q" is a token already; name it in method.trained_tokens'),
        ({"new_tokens": ["<a>", "<a>"]}, 'method.new_tokens: "<a>" stands twice'),
        ({"new_tokens": [f"<{n}>" for n in range(SPARE + 1)]}, f"token {VOCAB_SIZE + SPARE} has no row, for the embedding has"),
        ({"trained_tokens": [5000]}, "token 5000 has no row"),
        ({"trained_tokens": ["q"], "modules_to_save": ["lm_head"]}, "lm_head is trained otherwise, too"),
        ({"trained_tokens": ["q"], "targets": ["lm_head"]}, "lm_head is trained otherwise, too"),
    ],
    ids=["unknown", "twice", "a token already", "new twice", "no spare row", "no such id", "whole head", "adapted head"],
)
def test_tokens_that_cannot_be_trained_are_refused_before_anything_is_written(method, message, tmp_path):
    with pytest.raises(RecipeError) as caught:
        run(recipe_of(tmp_path, method))
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()
