"""What is told of a step: its record, and once, that the card's memory has spilled."""

import json
from dataclasses import replace

from qlite.memory import terms
from qlite.training.report import Broadcast, SpillWatch, StepReport
from qlite.units import GIB
from tests.tiny_run import Watcher
from tests.training.test_console import CPU, GPU, step_report


def test_terms_and_plan_are_in_a_steps_record_and_survive_the_file():
    memory = replace(CPU, terms={terms.BASE: 5, terms.SAVED: 7}, planned=13)
    record = json.loads(json.dumps(step_report(1, memory=memory).as_record()))
    assert record["memory_terms"] == {"base weights": 5, "saved for backward": 7}
    assert record["memory_planned"] == 13
    assert record["memory_spilled"] == 0
    record = step_report(1, memory=CPU).as_record()
    assert "memory_terms" not in record
    assert "memory_planned" not in record


def spilling(step: int, size: int) -> StepReport:
    return step_report(step, memory=replace(GPU, spilled=size))


def test_a_spill_is_noted_once_for_all_who_listen():
    one, other = Watcher(), Watcher()
    observer = Broadcast(one, other, SpillWatch(one, other))
    observer.phase("load", 1, 1)
    observer.note("a note")
    observer.step(spilling(1, 0))
    assert one.notes == ["a note"]
    for step, size in enumerate([int(1.2 * GIB), 0, 2 * GIB], start=2):
        observer.step(spilling(step, size))
    assert len(one.steps) == 4
    assert one.notes == other.notes
    assert len(one.notes) == 2
    assert one.notes[1].startswith("step 2: spilled 1.20 GiB to host memory: slow; lower train.micro_batch or train.tokens.")
    assert "Prefer No Sysmem Fallback" in one.notes[1]
