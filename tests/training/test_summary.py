"""The closing words of a run: its peaks of memory, in tensors and in all, beside the plan."""

import json
import math
from pathlib import Path

import pytest

from qlite.device import MemoryUse
from qlite.training.report import EvalReport
from qlite.training.run_folder import RunFolder
from qlite.training.state import TrainState
from qlite.training.summary import print_summary, summarise
from qlite.units import GIB, MIB
from tests.training.test_console import CPU, GPU, step_report


def result_of(memory: MemoryUse, measured: dict[str, int] | None = None, planned: dict[str, int] | None = None) -> dict:
    """Return the result of a run of one step, whose phases took ``measured`` bytes, and ``planned``."""
    record = json.loads(json.dumps(step_report(1, memory=memory).as_record()))
    told, plan = ({phase: {"bytes": size} for phase, size in (sizes or {}).items()} for sizes in (measured, planned))
    compared = {"planned": {"phases": plan} if planned else None, "measured": told}
    return summarise([record], memory, compared, "", TrainState(step=1))


@pytest.fixture(autouse=True)
def a_recipe(tmp_path):
    """What may be typed next depends on the method."""
    (tmp_path / "recipe.toml").write_text('[base]\nmodel = "x"\n[data]\ntrain = "x"\n[train]\nsteps = 1\n')


def peak_row(result: dict, folder: Path, capsys) -> str:
    (folder / "result.json").write_text(json.dumps(result))
    print_summary(RunFolder(folder))
    return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("peak memory"))[len("peak memory") :].strip()


def test_the_peak_of_tensors_is_that_of_all_phases_and_the_plan_that_of_the_same():
    result = result_of(CPU, {"training": 93, "optimizer": 95}, {"training": 100, "optimizer": 94, "answers": 300})
    assert (result["peak_tensor_bytes"], result["planned_tensor_bytes"]) == (95, 100)
    result = result_of(CPU, {"training": 93})
    assert (result["peak_tensor_bytes"], result["planned_tensor_bytes"]) == (93, None)
    result = result_of(CPU)
    assert (result["peak_tensor_bytes"], result["planned_tensor_bytes"]) == (None, None)


@pytest.mark.parametrize(
    ("memory", "planned", "row"),
    [
        (CPU, GIB + 226 * MIB, "1.22 GiB of tensors (planned 1.22), 2.10 GiB of process memory"),
        (CPU, 900 * MIB, "1.22 GiB of tensors (planned 900 MiB), 2.10 GiB of process memory"),
        (CPU, None, "1.22 GiB of tensors, 2.10 GiB of process memory"),
        (GPU, GIB, "1.22 GiB of tensors (planned 1.00), 12.0 GiB allocated on the GPU"),
    ],
)
def test_the_row_tells_tensors_plan_and_all(memory, planned, row, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("qlite.training.summary.peak_process_bytes", lambda: int(2.1 * GIB))
    result = result_of(memory, {"training": GIB + 225 * MIB}, {"training": planned} if planned else None)
    assert peak_row(result, tmp_path, capsys) == row


@pytest.mark.parametrize(("memory", "row"), [(CPU, "2.10 GiB (process)"), (GPU, "12.0 GiB (allocated on the GPU)")])
def test_a_run_that_was_not_followed_tells_the_device_figure(memory, row, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("qlite.training.summary.peak_process_bytes", lambda: int(2.1 * GIB))
    assert peak_row(result_of(memory), tmp_path, capsys) == row


def test_a_result_of_an_earlier_version_is_still_shown(tmp_path, capsys):
    result = {key: value for key, value in result_of(GPU).items() if not key.endswith("tensor_bytes")}
    assert peak_row(result, tmp_path, capsys) == "12.0 GiB (allocated on the GPU)"


def test_a_run_whose_records_somebody_has_deleted_still_ends_well(tmp_path, capsys):
    result = summarise([], CPU, {"planned": None, "measured": {}}, "", TrainState(step=3))
    (tmp_path / "result.json").write_text(json.dumps(result))
    print_summary(RunFolder(tmp_path))
    out = capsys.readouterr().out
    assert "0 steps, 0 tokens" in out
    assert "loss" not in out


def test_a_held_out_loss_that_is_no_number_is_null_in_the_records_and_ends_no_run(tmp_path, capsys):
    run = RunFolder(tmp_path)
    run.evaluated(EvalReport(3, math.nan, math.nan, 5, 20, 0.1))
    assert '"loss": null, "perplexity": null' in run.records.newest.read_text()
    result = summarise(run.records.read(), CPU, {"planned": None, "measured": {}}, "", TrainState(step=3))
    assert (result["eval_loss"], result["perplexity"]) == (None, None)
    run.finish(result)
    print_summary(run)
    assert "held out" not in capsys.readouterr().out


def test_records_in_which_an_earlier_version_wrote_nan_can_be_gone_on_with(tmp_path):
    run = RunFolder(tmp_path)
    run.records.newest.write_text('{"kind": "eval", "step": 1, "loss": NaN}\n{"kind": "eval", "step": 9, "loss": Infinity}\n')
    run.records.rewind(TrainState(step=3, measured=3))
    assert run.records.newest.read_text() == '{"kind": "eval", "step": 1, "loss": null}\n'
