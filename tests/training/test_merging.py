"""The audited merge: its figures are those of the models that are compared, and what is not right is not written."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qlite import room
from qlite.data.dataset import Data
from qlite.errors import DataError, DiskError, ExportError, MachineError
from qlite.formats import merged
from qlite.formats.card import MERGED, model_card
from qlite.hashes import sha256
from qlite.methods.base import adapted_linears
from qlite.methods.token_rows import RowsEmbedding
from qlite.serving import merge_audit
from qlite.serving.answer import Sampling, answer_ids
from qlite.training import auditing, merging
from qlite.training.auditing import Audit
from qlite.training.merging import Merge, write_audited
from qlite.training.open_run import OpenRun, open_run
from qlite.training.run_folder import RunFolder
from tests.marks import slow
from tests.model.test_gguf import SIZES
from tests.tiny_run import Watcher, run, tiny_recipe
from tests.tiny_tokenizer import VOCAB_SIZE

CHANGES = {"train": {"steps": 12, "exact_match_rows": 0}, "optimizer": {"lr": 2e-2}}
KINDS = {
    "4 bit": {},
    "8 bit": {"base": {"bits": 8}},
    "16 bit": {"base": {"bits": 16}},
    # In float32: in bfloat16 two letters of one answer are tied on a processor that multiplies it, and rounding decides.
    "DoRA": {"method": {"dora": True}, "base": {"dtype": "float32"}},
    "vocabulary in 8 bit": {"base": {"embedding_bits": 8, "head_bits": 8}},
    "adapted head": {"method": {"targets": ["lm_head", "q_proj"]}},
    "float32": {"base": {"dtype": "float32"}},
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> OpenRun:
    return trained(tmp_path_factory.mktemp("merging"), {"base": {"dtype": "float32"}})


def trained(folder: Path, changes: dict) -> OpenRun:
    """Return a finished run over a 4-bit base, opened with its adapter on; its head is large, so that small errors show in the logits."""
    tiny_recipe(folder)
    weights = folder / "base" / "model.safetensors"
    tensors = load_file(weights)
    tensors["lm_head.weight"] *= 20
    save_file(tensors, weights, metadata={"format": "pt"})
    run(tiny_recipe(folder, **{**CHANGES, **changes}))
    opened = open_run(RunFolder(folder / "run"), "cpu", lambda *_: None)
    opened.attach()
    return opened


def audited(opened: OpenRun, out: Path, **options: object) -> Audit:
    return write_audited(opened, out, Merge(**options), Watcher())


@torch.no_grad()
def kl_and_loss(opened: OpenRun, merged: nn.Module) -> tuple[float, float]:
    """Return mean KL(live || merged) and the merged model's loss over all trained positions, in nats, row by row."""
    kl = loss = count = 0
    data = opened.recipe.data.load(opened.base.tokenizer, opened.recipe.train.tokens, lambda _: None, encoder=opened.encoder)
    for row in (data.test[index] for index in range(len(data.test))):
        ids = torch.tensor([list(map(int, row.ids))])
        live, other = (model(input_ids=ids).logits[0].float().log_softmax(-1) for model in (opened.base.model, merged))
        for place in range(1, len(row)):
            if row.trained[place]:
                kl += float((live[place - 1].exp() * (live[place - 1] - other[place - 1])).sum())
                loss -= float(other[place - 1, int(row.ids[place])])
                count += 1
    return kl / count, loss / count


@pytest.mark.parametrize("onto", ["dequantised", "original"])
def test_the_figures_are_those_of_the_model_that_is_written(opened, tmp_path, onto):
    audit = audited(opened, tmp_path / "out", dtype=torch.float32, onto=onto, most_kl=100.0)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    kl, loss = kl_and_loss(opened, merged)
    found = audit.found[onto]
    assert (found.kl, found.loss) == (pytest.approx(kl, rel=1e-3, abs=1e-7), pytest.approx(loss, rel=1e-5))
    assert audit.written == found
    assert (found.kl < 1e-6) == (onto == "dequantised")
    kept = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert (kept["onto"], kept["dtype"], kept["candidates"][onto]["kl"]) == (onto, "float32", found.kl)


@pytest.mark.parametrize("kind", ["4 bit", "adapted head", *map(slow, (kind for kind in KINDS if kind not in ("4 bit", "adapted head")))])
def test_the_nearer_base_is_taken_in_every_storage(tmp_path, kind):
    audit = audited(trained(tmp_path, KINDS[kind]), tmp_path / "out", most_kl=100.0)
    assert audit.onto == min(audit.found, key=lambda onto: audit.found[onto].kl)
    assert set(audit.found) == ({"dequantised"} if kind == "16 bit" else {"dequantised", "original"})
    best = audit.found[audit.onto]
    assert best.same_answers == best.answers == 7
    assert best.kl < 1e-3
    assert audit.written.kl == pytest.approx(best.kl, rel=1e-3, abs=1e-9)


def test_an_error_of_a_layer_is_measured_where_it_is(opened, tmp_path, monkeypatch):
    """One weight is merged wrongly: by a tenth."""
    name = "model.layers.1.mlp.down_proj"
    module = opened.base.model.get_submodule(name)
    monkeypatch.setattr(module, "merged_weight", lambda dense: 1.1 * type(module).merged_weight(module, dense))
    found = audited(opened, tmp_path / "out", dtype=torch.float32, onto="dequantised", most_kl=100.0).found["dequantised"]
    assert found.worst_layer == (name, pytest.approx(0.1, rel=1e-3))
    assert max(error for layer, error in found.layers.items() if layer != name) < 1e-5
    assert found.kl > 1e-5


def test_the_greedy_answers_are_those_that_the_merged_model_gives(opened, tmp_path):
    audit = audited(opened, tmp_path / "out", dtype=torch.float32, onto="original", most_kl=100.0)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    rows, _ = auditing.held_out_rows(opened, 32, Watcher())
    prompts = [list(map(int, row.ids[: row.answer_start])) for row in rows]
    sampling = Sampling(opened.recipe.train.answer_tokens)
    answers = [answer_ids(model, opened.encoder, prompts, sampling) for model in (opened.base.model, merged)]
    assert audit.found["original"].same_answers == sum(a == b for a, b in zip(*answers, strict=True))
    assert audit.found["original"].answers == len(prompts) == 7


def test_what_answers_otherwise_is_not_written(opened, tmp_path):
    with pytest.raises(ExportError, match=r"original weights the model answers otherwise than the run: KL .* at most 1e-09.*--most-kl"):
        audited(opened, tmp_path / "exports" / "out", onto="original", most_kl=1e-9)
    assert list((tmp_path / "exports").iterdir()) == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tensors: tensors["model.layers.0.self_attn.q_proj.weight"].mul_(2), "what was written answers otherwise"),
        (lambda tensors: tensors.pop("model.norm.weight"), "not what their config.json describes: model.norm.weight"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}), "not what their config.json describes: model.norm.weight"),
    ],
)
def test_what_is_not_written_right_is_found_when_it_is_read_back(opened, tmp_path, monkeypatch, spoil, message):
    write_company = merging.write_company

    def spoilt(folder: Path, *args: object) -> None:
        write_company(folder, *args)
        tensors = load_file(folder / "model.safetensors")
        spoil(tensors)
        save_file(tensors, folder / "model.safetensors")

    monkeypatch.setattr(merging, "write_company", spoilt)
    with pytest.raises(ExportError, match=message):
        audited(opened, tmp_path / "exports" / "out", most_kl=100.0)
    assert list((tmp_path / "exports").iterdir()) == []


def test_nothing_stays_in_the_model(opened, tmp_path):
    ids = torch.tensor([[1, 5, 9, 7]])
    with torch.no_grad():
        before = opened.base.model(input_ids=ids).logits
        audited(opened, tmp_path / "out", most_kl=100.0)
        assert torch.equal(opened.base.model(input_ids=ids).logits, before)
    assert not any("merged" in str(vars(module).get("forward", "")) for _, module in adapted_linears(opened.base.model))
    assert not any("forward" in vars(module) for _, module in adapted_linears(opened.base.model))


def test_rows_in_batches_and_logits_in_pieces_give_the_same_figures(opened, tmp_path, monkeypatch):
    whole = audited(opened, tmp_path / "whole", most_kl=100.0).found["original"]
    monkeypatch.setattr(merge_audit, "TOKENS_AT_ONCE", 20)
    monkeypatch.setattr(merge_audit, "LOGITS_AT_ONCE", 100)
    parts = audited(opened, tmp_path / "parts", most_kl=100.0).found["original"]
    assert parts.kl == pytest.approx(whole.kl, rel=2e-3)  # float32 logits
    assert (parts.top1, parts.same_answers, parts.answers) == (whole.top1, whole.same_answers, whole.answers)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)


def test_without_rows_it_is_written_and_said_not_to_be_compared(opened, tmp_path):
    audit = audited(opened, tmp_path / "out", rows=0)
    assert (audit.onto, audit.found, audit.written) == ("dequantised", {}, None)
    assert "it was not compared" in (tmp_path / "out" / "README.md").read_text()
    assert audited(opened, tmp_path / "other", rows=0, onto="original").onto == "original"
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "other"))
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed == {f"{name}.weight" for name, _ in adapted_linears(opened.base.model)}


def test_rows_that_are_gone_are_said_with_the_way_to_do_without(opened, tmp_path, monkeypatch):
    def gone(*_: object) -> None:
        raise DataError("there is no rows.jsonl")

    monkeypatch.setattr(Data, "load", gone)
    with pytest.raises(DataError, match="on its rows, and there is no rows.jsonl. Without comparing: --audit-rows 0"):
        audited(opened, tmp_path / "exports" / "out")
    assert list((tmp_path / "exports").iterdir()) == []
    audited(opened, tmp_path / "exports" / "out", rows=0)


def test_raw_text_and_runs_without_held_out_rows_are_compared_too(tmp_path):
    tiny_recipe(tmp_path)
    (tmp_path / "train.txt").write_text("abc def fed cba " * 60)
    data = {"train": str(tmp_path / "train.txt"), "test": None}
    opened = trained(tmp_path, {"data": data, "train": {**CHANGES["train"], "eval_every": 0}})
    audit = audited(opened, tmp_path / "out", most_kl=100.0)
    assert not audit.are_held_out
    assert audit.found["dequantised"].answers == 0
    assert audit.found["dequantised"].kl < 1e-3
    assert "training rows, for the run has held out none" in (tmp_path / "out" / "README.md").read_text()


def test_a_card_makes_no_markup_of_strange_names():
    card = model_card(MERGED, "a<script>|b", "x\n# y", {"base": "[click](http://x)\x1b[2J"}, {"A": ["fine"]}, 'prompt = "```\n# no"')
    assert "<script>" not in card
    assert "\x1b" not in card
    assert r"\[click\](http://x)" in card
    assert card.count("```") == 2
    assert [line for line in card.splitlines() if line.startswith("# ")] == [r"# a&lt;script>\|b", '# no"']


def test_the_figures_are_on_the_card(opened, tmp_path):
    audit = audited(opened, tmp_path / "out", most_kl=100.0)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| the {audit.onto} weights (written) | {audit.found[audit.onto].kl:.2e} |" in card
    assert replace(audit, written=None).lines()[-1] in card


def stopped(monkeypatch, number: int, error: BaseException, export: Callable[[], object]) -> None:
    """Let ``export`` end with ``error`` where it writes its ``number``-th weight file."""
    calls = []

    def write(path: Path, table: dict, pieces: object) -> None:
        calls.append(path)
        if len(calls) == number:
            raise error
        merged_write(path, table, pieces)

    merged_write = merged.write_tensor_file
    with monkeypatch.context() as patched:
        patched.setattr(merged, "write_tensor_file", write)
        with pytest.raises(type(error)):
            export()


def test_a_stopped_merge_goes_on_with_what_it_has_found_and_written(opened, tmp_path, monkeypatch):
    options = {"shard_bytes": 20_000, "most_kl": 100.0}
    audited(opened, tmp_path / "whole", **options)
    stopped(monkeypatch, 4, KeyboardInterrupt(), lambda: audited(opened, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()
    other = partial(audited, opened, tmp_path / "other", **options, dtype=torch.float32)  # of other options: none of its business
    stopped(monkeypatch, 2, KeyboardInterrupt(), other)
    written, watcher = [], Watcher()
    with monkeypatch.context() as patched:
        patched.setattr(auditing.Auditor, "chosen", None)
        write = merged.write_tensor_file
        patched.setattr(merged, "write_tensor_file", lambda path, *rest: (written.append(path.name), write(path, *rest)))
        write_audited(opened, tmp_path / "out", Merge(**options), watcher)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 5
    assert written == files[3:]
    assert any("going on with an export that was stopped" in note for note in watcher.notes)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_a_file_that_is_not_as_it_was_noted_is_written_again(opened, tmp_path, monkeypatch):
    options = {"shard_bytes": 20_000, "most_kl": 100.0}
    audited(opened, tmp_path / "whole", **options)
    stopped(monkeypatch, 4, KeyboardInterrupt(), lambda: audited(opened, tmp_path / "out", **options))
    (left,) = tmp_path.glob(".out.tmp-*")
    second = next(left.glob("model-00002-of-*.safetensors"))
    content = bytearray(second.read_bytes())
    content[-1] ^= 1
    second.write_bytes(content)
    audited(opened, tmp_path / "out", **options)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert list(tmp_path.glob(".*")) == []


def test_a_merge_that_fails_leaves_nothing_to_go_on_with(opened, tmp_path, monkeypatch):
    stopped(monkeypatch, 1, MachineError("broken"), lambda: audited(opened, tmp_path / "out", most_kl=100.0))
    assert list(tmp_path.iterdir()) == []


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.iterdir()}


def test_what_is_trained_beside_the_matrices_is_looked_at_too(tmp_path, monkeypatch):
    """A trained norm that is written wrongly, and trained rows that are left out."""
    changes = {**CHANGES, "method": {"modules_to_save": ["model.norm"], "trained_tokens": ["a", "b", "c"]}, "optimizer": {"lr": 5e-2}}
    opened = trained(tmp_path, changes)
    audited(opened, tmp_path / "good", most_kl=100.0)
    with monkeypatch.context() as patched:
        patched.setattr(RowsEmbedding, "merged_weight", lambda module, dense: dense)
        without = audited(opened, tmp_path / "rows", most_kl=100.0)
    with_rows = json.loads((tmp_path / "good" / "audit.json").read_text())["candidates"][without.onto]["kl"]
    assert without.found[without.onto].kl > 3 * with_rows
    write = merged.write_tensor_file

    def spoilt(path: Path, table: dict, pieces: object) -> None:
        write(path, table, (piece * 0 if piece.dim() == 1 else piece for piece in pieces))

    monkeypatch.setattr(merged, "write_tensor_file", spoilt)
    with pytest.raises(ExportError, match=r"norm.*what was written is not what the run has"):
        audited(opened, tmp_path / "norm", most_kl=100.0)


def test_a_family_that_scales_its_embedding_is_compared_with_trained_rows(tmp_path):
    tiny_recipe(tmp_path)
    config = AutoConfig.for_model(
        "gemma", **SIZES | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}, vocab_size=VOCAB_SIZE, head_dim=16
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "base")
    tables = {**CHANGES, "base": {"dtype": "float32"}, "method": {"trained_tokens": ["a", "b", "c"]}}
    run(tiny_recipe(tmp_path, **tables))
    opened = open_run(RunFolder(tmp_path / "run"), "cpu", lambda *_: None)
    opened.attach()
    audit = audited(opened, tmp_path / "out", dtype=torch.float32, onto="dequantised", most_kl=100.0)
    assert audit.found["dequantised"].kl < 1e-6
    merged_model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert kl_and_loss(opened, merged_model)[0] < 1e-6


def test_room_is_asked_for_only_what_is_not_there_yet(opened, tmp_path, monkeypatch):
    options = {"shard_bytes": 20_000, "most_kl": 100.0}
    stopped(monkeypatch, 4, KeyboardInterrupt(), lambda: audited(opened, tmp_path / "out", **options))
    (left,) = tmp_path.glob(".out.tmp-*")
    there = sum(path.stat().st_size for path in left.glob("*.safetensors"))
    total = 2 * sum(torch.Size(tensor.shape).numel() for tensor in merged.merged_tensors(opened.base.model))
    monkeypatch.setattr(room, "free_disk", lambda _: total - there)
    audited(opened, tmp_path / "out", **options)
    with pytest.raises(DiskError, match="free"):
        audited(opened, tmp_path / "other", **options)
