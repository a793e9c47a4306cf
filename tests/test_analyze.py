"""Adapters looked into on the command line and from Python: what is printed and written, over runs, PEFT's folders and what is neither."""

import csv
import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from qlite import analyze
from qlite.analysis.amplification import amplification
from qlite.analysis.similarity import similarities
from qlite.analysis.spectrum import Spectrum, input_directions
from qlite.errors import AdapterError, QliteError, RecipeError, RunError
from qlite.formats.peft import write_adapter
from qlite.methods.lora import LoRA
from tests.adapters import put_on
from tests.test_report import Page
from tests.tiny_run import run, save_tiny_base, tiny_recipe

FEW = {"steps": 2, "accumulation": 1, "eval_every": 2, "exact_match_rows": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base; runs of rank 4 and 8 on it, the second with another seed; adapters in PEFT's format."""
    folder = tmp_path_factory.mktemp("analyze")
    for name, rank, seed in (("r4", 4, 0), ("r8", 8, 1)):
        run(tiny_recipe(folder, method={"rank": rank}, train={**FEW, "seed": seed}, output={"dir": str(folder / name)}))
    run(tiny_recipe(folder, method={"name": "low_rank", "rank": 8}, train=FEW, output={"dir": str(folder / "pure")}))
    for name, method in (("dora", LoRA(rank=3, dora=True)), ("head", LoRA(rank=3, modules_to_save=("lm_head",)))):
        model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).requires_grad_(False)
        put_on(model, method, 1)
        write_adapter(folder / name, model, method, str(folder / "base"))
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_is_told_by_the_names_of_its_linears(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    analyze.main([str(folder / "r4")])
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert all(len(line) <= 60 for line in lines if str(folder) not in line)
    table = {line.split()[0]: line.split() for line in lines if "_proj  " in line}
    assert list(table) == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert all(cells[1:3] == ["2", "4"] for cells in table.values())
    assert sum(float(cells[-1].rstrip("%")) for cells in table.values()) == pytest.approx(100, abs=0.5)
    assert "method.rank" in out
    assert "amplification" not in out


def test_two_adapters_their_base_and_a_folder(folder, tmp_path):
    out = tmp_path / "study"
    found = analyze(folder / "r4", folder / "r8", base=True, out=out, quiet=True)
    assert found.folder == out
    one, other = (peft_updates(folder / name) for name in ("r4", "r8"))
    phi = {(row["linear"], int(row["i"]), int(row["j"])): float(row["phi"]) for row in rows(out / "phi.csv")}
    assert len(phi) == 14 * 4 * 8
    for name, update in one.items():
        expected = similarities(input_directions(update), input_directions(other[name]))
        assert phi[name, 2, 5] == pytest.approx(float(expected[1, 4]))
    weights = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).state_dict()
    for row in rows(out / "amplification.csv"):
        expected = amplification(weights[f"{row['linear']}.weight"], Spectrum.of(one[row["linear"]]))
        assert float(row["factor"]) == pytest.approx(expected.factor, rel=1e-5)
    record = json.loads((out / "analysis.json").read_text(encoding="utf-8"))
    assert record["advice"] == found.findings.advice()
    assert len(record["linears"]) == len(record["overlap"]) == 14
    page = Page((out / "analysis.html").read_text(encoding="utf-8"))
    assert "How alike the two are" in page.text
    assert "r4 beside r8" in page.text
    assert str(folder) not in page.text  # a page goes to others
    assert "What it makes of the base" in page.text
    assert "cosine" in str(found)
    for counted in ("rank", "block"):
        assert f'data-unit="{counted}"' in (out / "analysis.html").read_text(encoding="utf-8")


def peft_updates(path: Path) -> dict:
    """Return a run's updates, read from its files without qlite's reader of them."""
    from safetensors.torch import load_file

    from qlite.methods.low_rank import LowRank

    tensors, config = load_file(path / "adapter" / "adapter_model.safetensors"), peft.LoraConfig.from_pretrained(path / "adapter")
    names = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in tensors}
    parts = {name: [tensors[f"base_model.model.{name}.lora_{each}.weight"] for each in "AB"] for name in names}
    return {name: LowRank(A, B, config.lora_alpha / config.r) for name, (A, B) in parts.items()}


def test_an_adapter_beside_itself_is_1_everywhere_and_is_said_to_have_its_seed(folder):
    found = analyze(folder / "r4", folder / "r4", quiet=True).findings
    assert "both runs began with train.seed = 0" in found.notes[0]
    for each in found.overlaps.values():
        assert float(each.phi[-1, -1]) == pytest.approx(1)
        assert each.cosine == pytest.approx(1)


def test_two_runs_of_other_seeds_get_no_such_note(folder):
    assert analyze(folder / "r4", folder / "r8", quiet=True).findings.notes == ()


def test_what_is_left_out_is_said(folder):
    assert "is DoRA" in analyze(folder / "dora", quiet=True).findings.notes[0]
    found = analyze(folder / "head", base=True, quiet=True).findings
    assert found.notes[0].endswith("layers that are trained whole (lm_head) are left out")
    assert len(found.amplified) == 14


def test_no_rank_is_read_off_a_pair_of_twice_the_rank(folder, tmp_path):
    method = {"rank": 4, "init": "pissa", "dropout": 0.0}
    run(tiny_recipe(folder, method=method, train=FEW, output={"dir": str(folder / "begun")}))
    found = analyze(folder / "begun", out=tmp_path / "study", quiet=True).findings
    assert {each.rank for each in found.linears} == {8}
    assert 'began as a part of the weights (method.init = "pissa")' in found.notes[0]
    assert "twice the rank" in found.notes[0]
    assert not any("method.rank =" in line for line in found.advice())
    assert "twice the rank" in found.advice()[0]
    plain = analyze(folder / "r4", folder / "begun", quiet=True).findings
    assert any("twice the rank" in note for note in plain.notes)
    assert "method.rank" in plain.advice()[0]


def test_without_out_nothing_is_written(folder):
    before = sorted(folder.rglob("*"))
    analyze(folder / "r4", base=True, quiet=True)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({"adapter": "gone"}, AdapterError, 'there is no folder "'),
        ({"adapter": "base"}, AdapterError, "neither the folder of a run"),
        ({"adapter": "pure"}, AdapterError, 'method.name = "low_rank", and only updates W \\+ s B A'),
        ({"adapter": "r4", "model": "x"}, RecipeError, "add --base"),
        ({"adapter": "r4", "out": "base"}, RunError, "exists already"),
        (
            {"adapter": "head", "base": True, "model": "wide"},
            AdapterError,
            r"its model.layers.0.mlp.up_proj is \[128, 96\], the update \[128, 64\]",
        ),
        ({"adapter": "r4", "base": True, "model": "wide"}, AdapterError, "was trained over another base"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(folder, given, kind, words):
    if given.get("model") == "wide" and not (folder / "wide").exists():
        from tests.tiny import tiny_llama

        tiny_llama(hidden_size=96, vocab_size=64).save_pretrained(save_tiny_base(folder / "wide"))
    places = {key: str(folder / value) if isinstance(value, str) else value for key, value in given.items()}
    with pytest.raises(kind, match=words) as error:
        analyze(**places, quiet=True)
    assert isinstance(error.value, QliteError)


def test_adapters_that_share_no_linear_or_no_shape_are_refused(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).requires_grad_(False)
    for name, targets in (("q", ("q_proj",)), ("v", ("v_proj",))):
        put_on(model, LoRA(rank=2, targets=targets), 1)
        write_adapter(tmp_path / name, model, LoRA(rank=2, targets=targets), "x")
        model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).requires_grad_(False)
    with pytest.raises(AdapterError, match="change no linear in common"):
        analyze(tmp_path / "q", tmp_path / "v", quiet=True)
    found = analyze(tmp_path / "q", folder / "r4", quiet=True).findings
    assert len(found.overlaps) == 2
    assert any("only one of the two changes" in note for note in found.notes)
