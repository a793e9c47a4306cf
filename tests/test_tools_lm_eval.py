"""tools/lm_eval_table.py: the tasks that it makes of held-out rows, and that lm-evaluation-harness finds in them what qlite does."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from qlite import export
from qlite.errors import DataError, ExportError, MachineError
from qlite.evaluate import held_out
from qlite.training.open_run import open_run
from qlite.training.run_folder import RunFolder
from tests.tiny_run import Watcher, run, tiny_recipe
from tools.lm_eval_table import ANSWERS, LIKELIHOOD, Side, main, print_table, read_side, require_lm_eval, write_tasks


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lm_eval")
    run(tiny_recipe(folder, train={"steps": 12, "eval_every": 0}, optimizer={"lr": 2e-2}))
    return folder / "run"


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_tasks_ask_what_the_rows_ask_and_weigh_what_training_weighs(finished, tmp_path):
    opened = open_run(RunFolder(finished), "cpu", lambda *_: None)
    material = held_out(opened, 5, Watcher())
    write_tasks(opened, material, tmp_path)
    asked, weighed = rows_of(tmp_path / f"{ANSWERS}.jsonl"), rows_of(tmp_path / f"{LIKELIHOOD}.jsonl")
    tokenizer = opened.base.tokenizer
    assert [tokenizer(row["prompt"], add_special_tokens=False).input_ids for row in asked] == [q.prompt for q in material.questions]
    assert [row["answer"] for row in asked] == [question.references[0] for question in material.questions]
    whole = [row for row in weighed if row["sign"] == 1]
    for row, (encoded, _) in zip(whole, material.rows, strict=True):
        ids = tokenizer(row["prompt"] + row["answer"], add_special_tokens=False).input_ids
        assert ids == [int(token) for token in encoded.ids[: len(ids)]]
        assert row["tokens"] == int(encoded.trained.sum())
    assert sum(row["tokens"] for row in weighed) == material.counts["trained_tokens"]
    # What ends a prompt as white space is weighed as part of the answer by lm_eval, so once more alone.
    spaces = [row for row in whole if row["prompt"] != row["prompt"].rstrip()]
    assert [row["prompt"] + row["answer"] for row in weighed if row["sign"] == -1] == [row["prompt"] for row in spaces]
    task = json.loads((tmp_path / f"{ANSWERS}.yaml").read_text())
    assert task["generation_kwargs"]["max_gen_toks"] == 4
    assert task["dataset_kwargs"]["data_files"]["test"] == str(tmp_path / f"{ANSWERS}.jsonl")


def test_rows_that_weigh_more_than_their_answer_are_refused(finished, tmp_path):
    opened = open_run(RunFolder(finished), "cpu", lambda *_: None)
    material = held_out(opened, 2, Watcher())
    material.rows[1][0].trained[:] = True
    with pytest.raises(DataError, match="has a loss on more than its last answer"):
        write_tasks(opened, material, tmp_path)


def test_what_lm_eval_wrote_is_read(tmp_path):
    (tmp_path / "x").mkdir()
    results = {"results": {ANSWERS: {"exact_match,stripped": 0.75}}, "n-samples": {ANSWERS: {"effective": 4}}}
    (tmp_path / "x/results_1.json").write_text(json.dumps(results))
    samples = [
        {"doc": {"sign": 1, "tokens": 4}, "filtered_resps": [["-3.0", "False"]]},
        {"doc": {"sign": -1, "tokens": 0}, "filtered_resps": [["-1.0", "False"]]},
    ]
    (tmp_path / f"x/samples_{LIKELIHOOD}_1.jsonl").write_text("".join(json.dumps(each) + "\n" for each in samples))
    assert read_side(tmp_path) == Side(3, 0.5)


def test_figures_that_do_not_agree_end_with_an_error(capsys):
    print_table([Side(0, 1.5), Side(19, 0.01)], [Side(0, 1.51), Side(20, 0.0109)], 20)
    assert "they agree" in capsys.readouterr().out
    for wrong in (Side(19, 0.02), Side(17, 0.01)):
        with pytest.raises(ExportError, match="they do not agree on what was after"):
            print_table([Side(0, 1.5), Side(19, 0.01)], [Side(0, 1.5), wrong], 20)


def test_an_environment_without_lm_eval_is_said(tmp_path):
    with pytest.raises(MachineError, match="No such file or directory.*pip install 'lm-eval"):
        require_lm_eval(str(tmp_path / "python"))
    without = tmp_path / "without.sh"
    without.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'lm_eval'\" >&2; exit 1\n")
    without.chmod(0o755)
    with pytest.raises(MachineError, match="No module named 'lm_eval'"):
        require_lm_eval(str(without))


@pytest.mark.slow
def test_lm_eval_finds_in_the_merged_model_what_qlite_finds_in_the_run(finished, tmp_path, capsys):
    if any(importlib.util.find_spec(name) is None for name in ("lm_eval", "accelerate")):
        pytest.skip("pip install 'lm-eval[hf]'")
    export.main(["--merge", str(finished), "--out", str(tmp_path / "merged"), "--most-kl", "100"])
    main([str(finished), "--export", str(tmp_path / "merged"), "--out", str(tmp_path / "out"), "--rows", "7", "--python", sys.executable])
    assert "they agree" in capsys.readouterr().out
