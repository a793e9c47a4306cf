"""The audit of a GGUF export: what few bits leave of training is measured before anything is written, and what is written is that."""

import json
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from qlite.errors import ExportError
from qlite.export import main
from qlite.files import is_whole
from qlite.formats.gguf_file import round_trip
from qlite.formats.gguf_types import TYPES
from qlite.methods.base import adapted_linears
from qlite.serving.merge_audit import Agreement
from qlite.serving.survival import Survival, survival
from qlite.training import auditing, merging
from qlite.training.auditing import Audit
from qlite.training.merging import Merge, write_audited_gguf
from qlite.training.open_run import OpenRun, open_run
from qlite.training.run_folder import RunFolder
from tests.model.test_gguf import tiny_model, write_gguf
from tests.tiny_run import Watcher, run, tiny_recipe


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> OpenRun:
    """A finished run over a base that is a GGUF file of Q4_0, opened with its adapter on; its changes are far smaller than Q4_0's steps."""
    tmp = tmp_path_factory.mktemp("run")
    model = tiny_model("llama", {"max_position_embeddings": 256})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.cat(list(round_trip(torch.randn(parameter.shape) / 8, name, Kind.Q4_0))))
            else:
                parameter.fill_(1)
    write_gguf(tmp / "base.gguf", "llama", model)
    changes = {"train": {"steps": 12, "exact_match_rows": 0}, "optimizer": {"lr": 5e-4}, "data": {"template": "plain"}}
    run(tiny_recipe(tmp, base={"model": str(tmp / "base.gguf"), "dtype": "float32"}, **changes))
    opened = open_run(RunFolder(tmp / "run"), "cpu", lambda *_: None)
    opened.attach()
    return opened


def audited(opened: OpenRun, out: Path, kind: str, **options: object) -> Audit:
    return write_audited_gguf(opened, out, "m.gguf", TYPES[kind], Merge(**{"most_kl": 100.0} | options), Watcher())


def test_changes_are_rounded_away_on_the_bases_own_grid_and_the_audit_takes_the_other_base(opened, tmp_path):
    audit = audited(opened, tmp_path / "out", "q4_0")
    assert audit.onto == "dequantised"
    undone = audit.found["original"]
    assert undone.kl > audit.base.kl, "it is further from the run than the untrained base"
    forced = audited(opened, tmp_path / "forced", "q4_0", onto="original")
    assert forced.all_survival.kept < 0.2
    assert "own steps, to which" in forced.advice()
    assert "--gguf-adapter" in forced.advice()
    kept = json.loads((tmp_path / "forced" / "audit.json").read_text())
    assert (kept["type"], kept["onto"], kept["left"]) == ("q4_0", "original", forced.left)
    assert kept["survival"].keys() == {name for name, _ in adapted_linears(opened.base.model)}
    assert "is there after rounding, under noise" in (tmp_path / "forced" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_more_bits_leave_more(opened, tmp_path, kind):
    audit = audited(opened, tmp_path / "out", kind)
    assert audit.left > 0.99
    assert audit.advice() is None
    assert audit.written.kl == pytest.approx(audit.found[audit.onto].kl, rel=1e-3, abs=1e-9)
    assert bool(audit.survival) == (kind == "q8_0")
    assert is_whole(tmp_path / "out")


def test_the_figures_are_those_of_the_weights_in_the_file(opened, tmp_path):
    """Every matrix out of the file, put into the model in place of what is there, gives the logits whose KL was told."""
    audit = audited(opened, tmp_path / "out", "q4_0", rows=3)
    names = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out" / "m.gguf").tensors}
    stored = torch.from_numpy(gguf.dequantize(names["blk.1.ffn_down.weight"].data, Kind.Q4_0))
    module = opened.base.model.get_submodule("model.layers.1.mlp.down_proj")
    merged = module.merged_weight(module.base.dense(torch.float32))
    assert torch.equal(stored, torch.cat(list(round_trip(merged, "x", Kind.Q4_0))))
    assert audit.written == replace(audit.found[audit.onto], kl=audit.written.kl)


def test_survival_is_what_its_formula_says(opened):
    halved = survival(opened.base.model, None, lambda dense: [(part / 2) for part in dense.parts()], lambda *_: None)
    name, module = next(iter(adapted_linears(opened.base.model)))
    base = module.base.dense(torch.float32)
    merged = module.merged_weight(base)
    change = merged - base
    assert halved[name].kept == pytest.approx(float(((merged / 2 - base) * change).sum() / change.square().sum()), rel=1e-4)
    assert halved[name].noise == pytest.approx(float((merged / 2).norm() / change.norm()), rel=1e-4)
    exact = survival(opened.base.model, None, lambda dense: dense.parts(), lambda *_: None)
    assert all((each.kept, each.noise) == (1, 0) for each in exact.values())
    assert len(exact) == 14


def test_what_answers_otherwise_is_not_written_and_what_would_keep_more_is_said(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(auditing, "ENOUGH_LEFT", 2.0)
    with pytest.raises(ExportError, match=r"at most 1e-09 is allowed \(--most-kl\).* A type of more bits keeps more"):
        audited(opened, tmp_path / "exports" / "out", "q4_0", most_kl=1e-9)
    assert list((tmp_path / "exports").iterdir()) == []
    assert (Merge().limit(16), Merge().limit(8.5), Merge().limit(4.5), Merge(most_kl=0.3).limit(4.5)) == (0.1, 0.1, 0.5, 0.3)


def test_a_file_that_is_not_written_right_is_found_when_it_is_read_back(opened, tmp_path, monkeypatch):
    def wrong(path: Path, *args: object) -> None:
        changed = opened.base.model.get_submodule("model.layers.0.mlp.up_proj")
        scaling, changed.scaling = changed.scaling, 0.0
        merging_write(path, *args)
        changed.scaling = scaling

    merging_write = merging.write_merged_gguf
    monkeypatch.setattr(merging, "write_merged_gguf", wrong)
    with pytest.raises(ExportError, match="what was written answers otherwise than what was compared"):
        audited(opened, tmp_path / "exports" / "out", "q8_0")
    assert list((tmp_path / "exports").iterdir()) == []


def test_advice_says_why_so_little_is_left():
    def found(kl: float) -> Agreement:
        return Agreement(kl, 1.0, 0.1, 0.1, 1, 1, {})

    noisy = Audit("original", 1, True, {"original": found(0.5)}, found(1.0), {"q": Survival(1.0, 0.9, 400.0)})
    assert noisy.left == 0.5
    assert (
        "only 50% of what training changed is left (KL of run and base): what it rounds is 20 times what training changed" in noisy.advice()
    )
    assert "trained for longer" in replace(noisy, survival={}).advice()
    assert replace(noisy, found={"original": found(0.05)}).advice() is None
    assert Audit("original").advice() is None


def test_the_command_says_what_is_left(opened, tmp_path, capsys):
    main(
        ["--gguf", "q4_0", str(opened.run.path), "--device", "cpu", "--out", str(tmp_path / "out"), "--onto", "original", "--most-kl", "9"]
    )
    told = capsys.readouterr().out
    assert "over the original weights" in told
    assert "of it is left" in told
    assert "only" in told
    assert {"run-q4_0.gguf", "audit.json", "README.md", "Modelfile", "manifest.json"} == {
        file.name for file in (tmp_path / "out").iterdir()
    }
