"""What is measured after a run stands on its page, as it was measured; and nonsense in those files breaks nothing."""

import json
from pathlib import Path

import pytest

from qlite import evaluate, export
from qlite.training.run_folder import RunFolder
from qlite.training.run_report import write_report
from tests.test_report import HOSTILE, Page
from tests.tiny_run import run, tiny_recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("outcome")
    run(tiny_recipe(folder, train={"exact_match_rows": 0}))
    return folder / "run"


def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_an_export_and_an_evaluation_renew_the_page(finished):
    assert "compared with the run" not in page(finished).text
    done = export(finished, merge="fp16", device="cpu", quiet=True)
    found = evaluate(finished, metrics="loss", device="cpu", quiet=True)
    text = page(finished).text
    best = done.audit.found[done.audit.onto]
    assert "Exports, compared with the run" in text
    assert "merged-fp16" in text
    assert f"over the {done.audit.onto} weights written" in text
    assert f"{best.same_answers} of {best.answers}" in text
    assert "the base, untrained" in text
    assert "Evaluations" in text
    assert "held-out" in text
    assert f"{found.scores['adapter']['loss']:.4g}"[:5] in text


def test_an_export_elsewhere_is_none_of_the_runs(finished, tmp_path):
    before = (finished / "report.html").read_bytes()
    export(finished, merge="fp16", out=tmp_path / "elsewhere", device="cpu", quiet=True)
    assert (finished / "report.html").read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        json.dumps({"candidates": {HOSTILE: {"kl": HOSTILE, "top1": None}}, "base": 3, "left": "x", "onto": HOSTILE}).encode(),
        json.dumps({"metrics": {HOSTILE: {"base": [], "adapter": "x", "unit": HOSTILE}, "a": 1}}).encode(),
        json.dumps({"metrics": 5, "candidates": []}).encode(),
    ],
)
def test_nonsense_and_hostile_texts_break_nothing(finished, content):
    for path in (finished / "gguf-x" / "audit.json", finished / "evaluations" / f"{HOSTILE[:9].replace('/', '-')}.json"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    write_report(RunFolder(finished))
    found = page(finished)
    assert "img" not in found.tags()
    assert "merged" in found.text


def test_what_was_measured_of_another_adapter_is_not_told(finished):
    export(finished, merge="bf16", device="cpu", quiet=True)
    audit = finished / "merged-bf16" / "audit.json"
    assert "merged-bf16" in page(finished).text
    audit.write_text(json.dumps(json.loads(audit.read_text()) | {"adapter_sha256": "0" * 64}))
    write_report(RunFolder(finished))
    assert "merged-bf16" not in page(finished).text
