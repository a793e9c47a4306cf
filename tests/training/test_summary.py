"""The closing words of a run: its peaks of memory, in tensors and in all, beside the plan."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qlite.device import MemoryUse
from qlite.memory import terms
from qlite.training.run_folder import RunFolder, TrainState
from qlite.training.summary import print_summary, summarise
from qlite.units import GIB, MIB
from tests.training.test_console import CPU, GPU, step_report

TOLD = {terms.BASE: GIB, terms.SAVED: 225 * MIB}


def result_of(*memories: MemoryUse) -> dict:
    records = [json.loads(json.dumps(step_report(step, memory=memory).as_record())) for step, memory in enumerate(memories, start=1)]
    return summarise(records, memories[-1], "", TrainState(step=len(memories)))


def peak_row(result: dict, folder: Path, capsys) -> str:
    (folder / "result.json").write_text(json.dumps(result))
    print_summary(RunFolder(folder))
    return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("peak memory"))[len("peak memory") :].strip()


def test_the_peak_of_tensors_is_that_of_all_steps_that_were_followed():
    low, high = (replace(CPU, terms={terms.BASE: size, terms.SAVED: 3}, planned=100) for size in (50, 90))
    result = result_of(low, high, CPU, low)
    assert result["peak_tensor_bytes"] == 93
    assert result["planned_tensor_bytes"] == 100
    result = result_of(CPU, CPU)
    assert result["peak_tensor_bytes"] is None
    assert result["planned_tensor_bytes"] is None


@pytest.mark.parametrize(
    ("memory", "row"),
    [
        (replace(CPU, terms=TOLD, planned=GIB + 226 * MIB), "1.22 GiB of tensors (planned 1.22), 2.10 GiB of process memory"),
        (replace(CPU, terms=TOLD, planned=900 * MIB), "1.22 GiB of tensors (planned 900 MiB), 2.10 GiB of process memory"),
        (replace(CPU, terms=TOLD), "1.22 GiB of tensors, 2.10 GiB of process memory"),
        (CPU, "2.10 GiB (process)"),
        (replace(GPU, terms=TOLD, planned=GIB), "1.22 GiB of tensors (planned 1.00), 12.0 GiB allocated on the GPU"),
        (GPU, "12.0 GiB (allocated on the GPU)"),
    ],
)
def test_the_row_tells_tensors_plan_and_all(memory, row, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("qlite.training.summary.peak_process_bytes", lambda: int(2.1 * GIB))
    assert peak_row(result_of(memory), tmp_path, capsys) == row


def test_a_result_of_an_earlier_version_is_still_shown(tmp_path, capsys):
    result = {key: value for key, value in result_of(GPU).items() if not key.endswith("tensor_bytes")}
    assert peak_row(result, tmp_path, capsys) == "12.0 GiB (allocated on the GPU)"
