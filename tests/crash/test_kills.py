"""Killed at any call of the file system, or at any time, a run goes on and ends with the same bytes."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from qlite.files import is_whole
from qlite.hashes import sha256
from qlite.reporting.document import is_ours
from qlite.training.run_folder import RunFolder
from tests.crash.faults import KILLED

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.crash

SHORT = {
    "train": {"steps": 3, "accumulation": 2, "eval_every": 2, "exact_match_rows": 0},
    "output": {"save_every": 1, "keep": 1, "adapter": "best"},
}
"""Three steps, a checkpoint after each, of which one is kept; two evaluations; the best adapter."""


def sums(folder: Path) -> dict[str, str]:
    """Return the hashes of all that a run computes: its adapter, its last checkpoint, its losses."""
    run = folder / "run"
    named = {path.relative_to(run).as_posix(): sha256(path) for path in run.rglob("*.safetensors") if "damaged" not in str(path)}
    kinds = {kind: [repr(r["loss"]) for r in RunFolder(run).records.read() if r["kind"] == kind] for kind in ("step", "eval")}
    state = json.loads(next((run / "checkpoints").glob("step-*/state.json")).read_text())
    return {**named, **{kind: str(losses) for kind, losses in kinds.items()}, "state": json.dumps(state)}


def fresh(base: Path, folder: Path) -> Path:
    """Return ``folder`` with base and rows of ``base`` in it, and no run."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for part in ("base", "train.jsonl", "test.jsonl"):
        os.symlink(base / part, folder / part)
    return folder


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory) -> Path:
    """A run that nothing has happened to, with the log of its calls."""
    folder = tmp_path_factory.mktemp("whole")
    assert server(folder, SHORT, log=str(folder / "log"))["code"] == 0
    return folder


def test_killed_before_and_after_every_call_of_a_save_the_run_ends_with_the_same_bytes(server, whole, tmp_path, tell):
    log = json.loads((whole / "log").read_text())
    renamed = [number for number, call in enumerate(log) if call[0] == "replace" and call[-1].endswith("step-00000002")]
    later = [number for number, call in enumerate(log) if call[0] == "replace" and call[-1].endswith("step-00000003")]
    calls = range(renamed[0] + 1, later[0] + 1)  # the rest of the second save, and the third up to its rename
    expected, lost = sums(whole), []
    for number in calls:
        for when in ("die_before", "die_after"):
            folder = fresh(whole, tmp_path / "victim")
            assert server(folder, SHORT, faults={when: number})["code"] == KILLED, (number, when)
            whole_ones = [path for path in (folder / "run" / "checkpoints").glob("step-*") if is_whole(path)]
            assert whole_ones, f"no checkpoint is left after {when} {log[number]}"
            assert server(folder, SHORT)["code"] == 0
            lost += [f"{when} {log[number]}"] if sums(folder) != expected else []
            left = [path.name for path in folder.rglob(".*") if "tmp" in path.name or "old" in path.name]
            assert not left, f"{left} after {when} {log[number]}"
    tried = 2 * len(calls)
    tell(f"killed before and after every file operation of a save: {tried - len(lost)}/{tried} runs ended with the same bytes")
    assert lost == []


def test_killed_while_its_report_is_written_a_run_is_finished_with_the_same_bytes(server, whole, tmp_path, tell):
    folder = fresh(whole, tmp_path / "logged")
    assert server(folder, SHORT, log=str(folder / "log"))["code"] == 0
    log, good = json.loads((folder / "log").read_text()), 0
    calls = [number for number, call in enumerate(log) if any("report.html" in part for part in call[1:])]
    assert [log[number][0] for number in calls][-1] == "replace"
    for number in calls:
        for when in ("die_before", "die_after"):
            folder = fresh(whole, tmp_path / "victim")
            assert server(folder, SHORT, faults={when: number})["code"] == KILLED
            finished = RunFolder(folder / "run")
            good += finished.is_finished and sums(folder) == sums(whole) and (not finished.report.exists() or is_ours(finished.report))
    tell(f"killed before and after every file operation of the report: {good}/{2 * len(calls)} runs are finished with the same bytes")
    assert good == 2 * len(calls)


@pytest.mark.parametrize("kills", [25, pytest.param(200, marks=pytest.mark.nightly)])
def test_killed_at_random_times_the_run_ends_with_the_same_bytes(server, whole, tmp_path, tell, kills):
    chance, survived = random.Random(kills), 0
    seconds = server(fresh(whole, tmp_path / "timed"), SHORT)["seconds"]
    for _ in range(kills):
        folder = fresh(whole, tmp_path / "victim")
        ended = server(folder, SHORT, signals=[[signal.SIGKILL, chance.uniform(0, seconds)]])
        assert ended.get("signal") == signal.SIGKILL or ended.get("code") == 0, ended
        assert server(folder, SHORT)["code"] == 0
        survived += sums(folder) == sums(whole)
    tell(f"killed (SIGKILL) at random times: {survived}/{kills} runs ended with the same bytes")
    assert survived == kills


def test_killed_ten_times_in_one_run_and_while_going_on(server, whole, tmp_path, tell):
    many = {"train": {"steps": 30, "accumulation": 2, "eval_every": 9, "exact_match_rows": 0}, "output": {"save_every": 2, "keep": 2}}
    expected = tmp_path / "expected"
    expected.mkdir()
    assert server(fresh(whole, expected), many)["code"] == 0
    folder, chance = fresh(whole, tmp_path / "victim"), random.Random(2)
    seconds = server(fresh(whole, tmp_path / "timed"), SHORT)["seconds"]
    killed = sum("signal" in server(folder, many, signals=[[signal.SIGKILL, chance.uniform(0.4, 1.0) * seconds]]) for _ in range(10))
    assert server(folder, many)["code"] == 0
    assert sums(folder) == sums(expected)
    tell(f"killed {killed} times in one run, by chance also while it went on: the same bytes")
    assert killed >= 5


def test_killed_while_an_old_run_is_discarded_the_same_command_discards_the_rest(server, whole, tmp_path, tell):
    """``--fresh``: at no time is what is left taken for somebody else's folder, or for a finished run."""
    folder = fresh(whole, tmp_path / "victim")
    assert server(folder, SHORT)["code"] == 0
    shutil.copytree(folder / "run", tmp_path / "kept")
    assert server(folder, SHORT, fresh=True, log=str(folder / "log"))["code"] == 0
    log = json.loads((folder / "log").read_text())
    calls, good = next(number for number, call in enumerate(log) if "run.json" in call[1] and call[0] == "unlink") + 1, 0
    for number in range(calls):
        shutil.rmtree(folder / "run")
        shutil.copytree(tmp_path / "kept", folder / "run")
        assert server(folder, SHORT, fresh=True, faults={"die_after": number})["code"] == KILLED
        assert server(folder, SHORT, fresh=True)["code"] == 0
        good += sums(folder) == sums(whole)
    tell(f"killed while --fresh discards a run: {good}/{calls} runs then ended with the same bytes")
    assert good == calls
