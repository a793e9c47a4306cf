"""The real tools: what they have of a run that was stopped and went on is each figure once, at its step. Needs their packages."""

import json
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from qlite.device import MemoryUse
from qlite.loggers import LOGGERS
from qlite.loggers.base import Logger
from qlite.recipe.schema import Recipe
from qlite.stopping import stopping_at_once
from qlite.training.logging import Loggers
from qlite.training.report import EvalReport, SampleReport, StepReport
from qlite.training.run_folder import RunFolder
from qlite.training.state import TrainState
from tests.tiny_run import tiny_recipe

LOSSES = {1: 4.5, 2: 3.25, 3: 2.0, 4: 1.5, 5: 1.25}


def record(loggers: Loggers, run: RunFolder, first: int, last: int) -> None:
    """Tell both of the steps from ``first`` to ``last``, with an evaluation and a sample after the third."""
    for step in range(first, last + 1):
        reports = [StepReport(step, 5, step / 5, LOSSES[step], 1e-4, 0.5, 100, 50, 0.1, MemoryUse(2**30, 2**31, 2**33))]
        for report in reports:
            run.step(report)
            loggers.step(report)
        if step == 3:
            for told in (run, loggers):
                told.evaluated(EvalReport(step, 2.5, 12.2, 7, 70, 0.1))
                told.sampled(SampleReport(step, [("Hello?", "# <b>Hi</b>")]))


def stopped_and_gone_on(recipe: Recipe) -> list[str]:
    """Make steps 1 to 4, be stopped, go on from the checkpoint of step 2, and finish; return what was told of the tools."""
    run, faults = RunFolder(Path(recipe.output.dir)), []
    run.path.mkdir()
    loggers = Loggers(recipe, run, faults.append)
    with suppress(KeyboardInterrupt), loggers.going_on_after(0):
        for told in (run, loggers):
            told.note(f"rows of {recipe.data.train}")
        record(loggers, run, 1, 4)
        raise KeyboardInterrupt
    loggers = Loggers(recipe, run, faults.append)
    run.records.rewind(TrainState(step=2, measured=2))
    with loggers.going_on_after(2):
        loggers.note("going on after step 2")
        record(loggers, run, 3, 5)
    return [fault for fault in faults if not fault.startswith("waiting for")]  # as it may on a slow machine


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Return a maker of recipes that name one tool, in an empty folder in which the command was given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qlite.training.logging.STOPPED_PATIENCE_SECONDS", 60)
    return lambda name: tiny_recipe(tmp_path, output={"loggers": [name]})


def test_tensorboard_shows_each_figure_once(tmp_path, recipe):
    pytest.importorskip("tensorboard", reason="pip install -e '.[tensorboard]'")
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    assert stopped_and_gone_on(recipe("tensorboard")) == []
    shown = EventAccumulator(str(tmp_path / "run/logs"), size_guidance={"tensors": 0}).Reload()
    points = {tag: [(e.step, make_ndarray(e.tensor_proto).flat[0]) for e in shown.Tensors(tag)] for tag in shown.Tags()["tensors"]}
    assert points["train/loss"] == list(LOSSES.items())
    assert points["eval/loss"] == [(3, 2.5)]
    assert points["memory/peak_gib"][0] == (1, 2)
    texts = {tag: [(step, text.decode()) for step, text in points[tag]] for tag in points if tag.endswith("/text_summary")}
    assert texts["samples/text_summary"] == [(3, "**prompt**\n\n    Hello?\n\n**answer**\n\n    # <b>Hi</b>")]
    assert [(step, text.split("    ")[1]) for step, text in texts["notes/text_summary"]] == [
        (0, "rows of train.jsonl"),
        (2, "going on after step 2"),
    ]
    assert "rank = 4" in texts["recipe/text_summary"][0][1]


def test_mlflow_has_each_figure_once(tmp_path, recipe, monkeypatch):
    pytest.importorskip("mlflow", reason="pip install -e '.[mlflow]'")
    pytest.importorskip("sqlalchemy", reason="pip install -e '.[mlflow]'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    assert stopped_and_gone_on(recipe("mlflow")) == []
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    from mlflow import MlflowClient

    client = MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("qlite").experiment_id])
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(each.step, each.value) for each in history] == list(LOSSES.items())
    assert [each.step for each in client.get_metric_history(found.info.run_id, "eval/loss")] == [3]
    assert found.data.params["method.rank"] == "4"
    assert found.data.params["data.train"] == "train.jsonl"
    assert tmp_path.name not in str(found.data)
    kept = Path(found.info.artifact_uri.removeprefix("file://"))
    assert (kept / "samples/step-00000003.md").read_text().endswith("    # <b>Hi</b>")
    assert (kept / "notes.txt").read_text() == "step 0: rows of train.jsonl\nstep 2: going on after step 2\n"


def wandb_records(path: Path) -> Iterator[object]:
    """Yield the records of an offline run. Its file is a LevelDB log: leveldb/doc/log_format.md, behind 7 bytes of wandb's own."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        left_in_block = 2**15 - at % 2**15
        if left_in_block < 7:
            at += left_in_block
            continue
        _, size, kind = struct.unpack("<IHB", content[at : at + 7])
        if kind == 0:
            return
        whole += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def test_wandb_offline_has_each_figure_once_in_one_run_and_changes_nothing_of_the_process(tmp_path, recipe, monkeypatch, request):
    wandb = pytest.importorskip("wandb", reason="pip install -e '.[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    request.addfinalizer(wandb.teardown)  # it reads its settings once in a process
    before = sys.exit, sys.excepthook
    with stopping_at_once():
        assert stopped_and_gone_on(recipe("wandb")) == []
    assert (sys.exit, sys.excepthook) == before
    files = sorted((tmp_path / "run/logs/wandb").glob("offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime)
    found = [record for path in files for record in wandb_records(path)]
    identity = (tmp_path / "run/logs/wandb.txt").read_text().strip()
    assert {record.run.run_id for record in found if record.HasField("run")} == {identity}
    rows = [record.history.item for record in found if record.HasField("history")]
    points = [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in row} for row in rows]
    assert {point["_step"]: point["train/loss"] for point in points if "train/loss" in point} == LOSSES
    assert [point["_step"] for point in points] == [1, 2, 3, 4, 5]
    assert [point["_step"] for point in points if "eval/loss" in point] == [3]
    said = b"".join(path.read_bytes() for path in (tmp_path / "run/logs/wandb").rglob("*") if path.is_file() and "debug" not in path.name)
    assert b"rows of train.jsonl" in said
    config = {item.key: item.value_json for r in found if r.HasField("run") for item in r.run.config.update}
    assert config["data.train"] == '"train.jsonl"'
    assert not [r for r in found if r.HasField("environment") or r.HasField("stats") or r.HasField("output_raw")]


def test_nobody_is_asked_for_a_key_of_wandb(tmp_path, recipe, monkeypatch):
    pytest.importorskip("wandb", reason="pip install -e '.[wandb]'")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    run, faults = RunFolder(tmp_path / "run"), []
    with Loggers(recipe("wandb"), run, faults.append).going_on_after(0):
        pass
    (fault,) = faults
    assert "nobody is logged in; run `wandb login`, or set WANDB_MODE=offline" in fault


@pytest.mark.parametrize("name", LOGGERS)
def test_each_tool_can_all_that_is_asked_of_one(name):
    wanted = {name for name, value in vars(Logger).items() if callable(value) and not name.startswith("_")}
    assert wanted == {"begin", "numbers", "rows", "note", "flush", "end", "leave"}
    assert wanted - {"flush", "leave"} <= vars(LOGGERS[name]).keys()
