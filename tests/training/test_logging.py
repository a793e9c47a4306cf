"""What a run tells its loggers: everything once, without waiting for them and whatever becomes of them."""

import json
import threading
import time
from pathlib import Path

import pytest

import qlite.loggers
import qlite.training.logging as handing
from qlite.device import MemoryUse
from qlite.errors import DiskError, RecipeError
from qlite.loggers import LOGGERS
from qlite.loggers.base import EVERYTHING, LoggedRun, Logger, literal
from qlite.recipe.schema import Recipe
from qlite.training.logging import Loggers
from qlite.training.report import SampleReport, StepReport
from qlite.training.run import train
from qlite.training.run_folder import RunFolder
from tests.marks import slow
from tests.tiny_run import Watcher, run, tiny_recipe

SHORT = {"train": {"accumulation": 1, "eval_every": 3, "exact_match_rows": 2, "answer_tokens": 2, "samples": ["abc"]}}


class Memory(Logger):
    """A tool that keeps what it is told in a list, for all runs of a test."""

    told: list
    known = EVERYTHING

    def begin(self, run: LoggedRun) -> int:
        self.told.append(("begin", run.step, run))
        return self.known

    def numbers(self, step, values):
        self.told.append(("numbers", step, values))

    def rows(self, step, name, columns, rows):
        self.told.append((name, step, list(rows)))

    def note(self, step, text):
        self.told.append(("note", step, text))

    def end(self, is_finished):
        self.told.append(("end", is_finished))


@pytest.fixture
def tool(monkeypatch) -> type[Memory]:
    """Return the tool that stands for TensorBoard in this test."""
    kind = type("Tool", (Memory,), {"told": []})
    monkeypatch.setitem(LOGGERS, "tensorboard", kind)
    monkeypatch.setattr(qlite.loggers, "find_spec", lambda name: object())
    return kind


def logged(folder: Path, **changes: dict):
    output = {"loggers": ["tensorboard"], "save_every": 2, **changes.pop("output", {})}
    return tiny_recipe(folder, **{**SHORT, **changes}, output=output)


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def steps_of(told: list, key: str) -> list[int]:
    return [step for kind, step, *rest in told if kind == "numbers" and key in rest[0]]


def test_a_tool_gets_every_figure_text_and_note_of_a_run_in_order(tmp_path, tool):
    run(logged(tmp_path))
    kept = records(tmp_path)
    losses = [values["train/loss"] for kind, _, values in (t for t in tool.told if t[0] == "numbers") if "train/loss" in values]
    assert losses == [record["loss"] for record in kept if record["kind"] == "step"]
    assert steps_of(tool.told, "train/loss") == [1, 2, 3, 4, 5, 6]
    assert steps_of(tool.told, "eval/loss") == [3, 6]
    assert steps_of(tool.told, "answers/exact") == [0, 6]
    assert [(step, rows[0][0]) for kind, step, *rest in tool.told if kind == "samples" for rows in rest] == [(3, "abc"), (6, "abc")]
    assert [step for kind, step, *_ in tool.told if kind == "answers"] == [0, 6]
    assert sum(kind == "note" for kind, *_ in tool.told) == sum(record["kind"] == "note" for record in kept)
    (_, step, begun), last = tool.told[0], tool.told[-1]
    assert (step, begun.name, last) == (0, "run", ("end", True))
    assert begun.config["method.rank"] == 4
    assert begun.config["optimizer.betas"] == "[0.9, 0.999]"
    assert len(begun.config) > 60
    # And nothing tells a folder of this machine.
    said = repr([rest for kind, *rest in tool.told if kind != "begin"]) + repr(begun.config) + begun.recipe
    assert "train.jsonl" in said
    assert tmp_path.name not in said


@pytest.mark.parametrize(("known", "losses"), [(EVERYTHING, [1, 2, 3, 4, 5, 6]), slow(3, [1, 2, 3, 4, 5, 5, 6])])
def test_a_run_that_goes_on_tells_only_what_the_tool_has_not_had(tmp_path, tool, known, losses):
    """The watcher stops it in step 6 before the tool hears of that; the checkpoint is of step 4, and 5 is made again."""
    run(logged(tmp_path, output={"save_every": 4}, train={**SHORT["train"], "eval_every": 2}), stop_after=6)
    assert tool.told[-1] == ("end", False)
    tool.known = known
    run(logged(tmp_path, output={"save_every": 4}, train={**SHORT["train"], "eval_every": 2}))
    begun = [rest[0] for kind, step, *rest in tool.told if kind == "begin"]
    assert [each.step for each in begun] == [0, 4]
    assert "going on after step 4" in [text for kind, _, text in (t for t in tool.told if t[0] == "note")]
    assert any("40 training rows" in text for step, text in begun[1].notes if step == 0)
    assert steps_of(tool.told, "train/loss") == losses
    assert steps_of(tool.told, "eval/loss") == [2, 4, 6]
    assert steps_of(tool.told, "answers/exact") == [0, 6]


def fail(*_: object) -> None:
    raise OSError("no\x1b[2J network")


FAULT = "tensorboard gets nothing more of this run, which goes on without it: no\\x1b[2J network"


def test_a_tool_that_fails_is_told_of_once_and_the_run_ends_with_the_same_bytes(tmp_path, tool, monkeypatch):
    monkeypatch.setattr(tool, "numbers", fail)
    seen = run(logged(tmp_path))
    run(tiny_recipe(tmp_path, **SHORT, output={"dir": str(tmp_path / "without")}))
    assert [note for note in seen.notes if "tensorboard" in note] == [FAULT]
    both = [(tmp_path / name / "adapter/adapter_model.safetensors").read_bytes() for name in ("run", "without")]
    assert both[0] == both[1]


@pytest.mark.parametrize("method", ["__init__", "begin", "rows", "note", "end"])
def test_wherever_a_tool_fails_it_is_left_and_told_of_once(files, tool, monkeypatch, method):
    left, notes = [], []
    monkeypatch.setattr(tool, method, fail, raising=False)
    monkeypatch.setattr(tool, "leave", lambda _: left.append(1))
    loggers = Loggers(files, RunFolder(Path(files.output.dir)), notes.append)
    with loggers.going_on_after(0):
        loggers.note("a note")
        loggers.sampled(SampleReport(1, [("a", "b")]))
    assert notes == [FAULT]
    assert len(left) == (method != "__init__")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Recipe:
    """A recipe over files that no run of these tests changes."""
    return logged(tmp_path_factory.mktemp("files"))


def test_a_full_disk_does_not_end_a_finished_run_that_tells_of_a_tool(files, tool, monkeypatch):
    def full(_: str) -> None:
        raise DiskError("no space left")

    monkeypatch.setattr(tool, "end", fail)
    with Loggers(files, RunFolder(Path(files.output.dir)), full).going_on_after(0):
        pass
    assert tool.told[0][0] == "begin"


def report(step: int) -> StepReport:
    return StepReport(step, 10**6, 0.1, 2.0, 1e-4, 0.5, 100, 50, 0.1, MemoryUse(2**30, 2**30, 2**33))


def test_a_tool_that_hangs_holds_nothing_up(files, tool, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(tool, "numbers", lambda *_: release.wait())
    monkeypatch.setattr(handing, "PATIENCE_SECONDS", 0.1)
    notes = []
    loggers = Loggers(files, RunFolder(Path(files.output.dir)), notes.append)
    started = time.perf_counter()
    with loggers.going_on_after(0):
        for step in range(1, 9):
            loggers.step(report(step))
    assert time.perf_counter() - started < 2
    release.set()
    assert notes == [
        "waiting for tensorboard to take the last figures, 0.1 s at most (Ctrl-C: leave it)",
        "tensorboard did not take the last 8 reports in time and is left behind",
    ]


def test_a_tool_that_falls_behind_gets_no_more(files, tool, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(tool, "begin", lambda *_: release.wait() and 0)
    monkeypatch.setattr(handing, "MOST_WAITING", 100)
    notes = []
    loggers = Loggers(files, RunFolder(Path(files.output.dir)), notes.append)
    with loggers.going_on_after(0):
        for step in range(1, 500):
            loggers.step(report(step))
        assert notes == ["tensorboard is 100 reports behind and gets no more; the run goes on without it"]
        release.set()
    assert len(notes) == 1


def test_ctrl_c_leaves_a_tool_behind_and_not_the_finished_run(files, tool, monkeypatch):
    def interrupted(outlet, seconds: float) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(handing.Outlet, "join", interrupted)
    release = threading.Event()
    monkeypatch.setattr(tool, "begin", lambda *_: release.wait() and 0)
    notes = []
    with Loggers(files, RunFolder(Path(files.output.dir)), notes.append).going_on_after(0):
        pass
    release.set()
    assert notes == ["tensorboard did not take the last 1 reports in time and is left behind"]


def test_a_step_hands_over_in_microseconds(files, tool):
    """The bound is wide, for other processes take this one's time: about 1 microsecond is usual."""
    loggers = Loggers(files, RunFolder(Path(files.output.dir)), lambda _: None)
    reports = [report(step) for step in range(1, 2001)]
    best = min(_seconds(loggers, reports[start : start + 200]) for start in range(0, 2000, 200))
    assert best / 200 < 20e-6


def _seconds(loggers: Loggers, reports: list[StepReport]) -> float:
    started = time.perf_counter()
    for each in reports:
        loggers.step(each)
    return time.perf_counter() - started


def test_a_missing_package_is_an_error_before_anything_is_loaded_or_written(tmp_path, monkeypatch):
    monkeypatch.setattr(qlite.loggers, "find_spec", lambda name: None if name != "mlflow" else object())
    recipe = tiny_recipe(tmp_path, base={"model": str(tmp_path / "not there")}, output={"loggers": ["wandb", "mlflow", "tensorboard"]})
    with pytest.raises(RecipeError) as error:
        train(recipe, RunFolder(tmp_path / "run"), Watcher())
    assert str(error.value) == (
        "output.loggers: the packages are not installed (wandb, tensorboard): pip install -e '.[wandb,tensorboard]'"
    )
    assert not (tmp_path / "run").exists()


def test_discarding_a_run_discards_what_the_tools_kept_in_its_folder(tmp_path):
    folder = RunFolder(tmp_path)
    (tmp_path / "logs/wandb").mkdir(parents=True)
    for name in ("recipe.toml", "run.json", "logs/wandb/x", "mine"):
        (tmp_path / name).write_text("{}")
    folder.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_text_of_a_model_is_shown_letter_by_letter():
    text = "# no heading\n```\n<b>"
    assert literal(["prompt", "answer"], [[text, ""]]) == "**prompt**\n\n    # no heading\n    ```\n    <b>\n\n**answer**\n\n    "
