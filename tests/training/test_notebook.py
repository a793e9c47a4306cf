"""The screen in a notebook: one output however long the run, that costs little, ends nothing, and stays when the notebook is saved."""

import re
import sys
import types

import pytest
from rich.console import Console

from qlite.stopping import Interrupted
from qlite.training.console import LiveConsole, PlainConsole, open_console
from qlite.training.notebook import MOST_LINES, NotebookConsole, SilentConsole, console_for
from qlite.training.report import AnswerReport, SampleReport
from tests.training.test_console import HOSTILE, Terminal, eval_report, step_report


class Cell:
    """What IPython's ``display`` shows: every state of every output, newest last."""

    def __init__(self) -> None:
        self.outputs: list[list[dict[str, str]]] = []
        self.is_broken = False

    def display(self, bundle: dict[str, str], raw: bool, display_id: bool) -> "Cell":
        assert raw
        assert display_id
        self.outputs.append([bundle])
        return self

    def update(self, bundle: dict[str, str], raw: bool) -> None:
        if self.is_broken:
            raise RuntimeError("the frontend has gone")
        self.outputs[-1].append(bundle)

    @property
    def text(self) -> str:
        return self.outputs[-1][-1]["text/plain"]

    @property
    def html(self) -> str:
        return self.outputs[-1][-1]["text/html"]


@pytest.fixture
def cell(monkeypatch) -> Cell:
    """A notebook's cell: rich takes this process for a kernel."""
    cell, module = Cell(), types.ModuleType("IPython.display")
    module.display = cell.display
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    return cell


def test_a_kernel_gets_the_notebooks_console_and_the_command_line_never(cell, monkeypatch):
    assert isinstance(console_for("a run"), NotebookConsole)
    assert isinstance(console_for("a run", is_quiet=True), SilentConsole)
    assert isinstance(open_console("a run", Terminal()), LiveConsole)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: False)
    assert isinstance(console_for("a run"), PlainConsole)


def test_a_command_typed_in_a_notebook_gets_lines_though_it_has_a_terminal(monkeypatch):
    monkeypatch.setenv("JPY_PARENT_PID", "1")
    assert isinstance(open_console("a run", Terminal()), PlainConsole)


def test_a_run_is_one_output_that_ends_with_all_of_it(cell):
    with console_for("a run") as console:
        console.phase("load", 3, 3)
        console.note("a note")
        console.answered(AnswerReport(0, 64, 3, [("who?", "me", "you")]))
        for step in range(1, 61):
            console.step(step_report(step))
        console.evaluated(eval_report(60))
        console.sampled(SampleReport(60, [("say", "hello")]))
    assert len(cell.outputs) == 1
    for part in ("a run", "✓ load  3 in", "a note", "3/64 exact", "step 60/100", "eval loss", "1.2500", "hello", "finished"):
        assert part in cell.text
    text = re.sub(r"<[^>]+>", "", cell.html)
    assert re.sub(r"\s+", "", text.replace("&lt;", "<").replace("&gt;", ">")) == re.sub(r"\s+", "", cell.text)


def test_ten_thousand_steps_are_drawn_a_few_times_and_kept_in_bounded_memory(cell):
    with console_for("a run") as console:
        for step in range(1, 10_001):
            console.step(step_report(step, 10_000))
            console.note(f"note {step}")
    assert len(cell.outputs[0]) < 30
    assert cell.text.count("note ") == MOST_LINES
    assert len(cell.html) < 60_000


def test_a_call_without_steps_ends_without_an_empty_panel(cell):
    with console_for("qlite export  runs/mine") as console:
        console.phase("merge", 3, 3)
    assert cell.text.splitlines()[1:] == ["qlite export  runs/mine  finished"]


@pytest.mark.parametrize(("error", "words"), [(Interrupted(2), "interrupted at step 1"), (ValueError(), "stopped at step 1 by ValueError")])
def test_how_it_ended_stays(cell, error, words):
    def stop() -> None:
        with console_for("a run") as console:
            console.step(step_report(1))
            raise error

    with pytest.raises(type(error)):
        stop()
    assert words in cell.text


def test_a_notebook_that_has_gone_ends_no_run(cell):
    with console_for("a run") as console:
        cell.is_broken = True
        console._screen._due = 0.0
        console.step(step_report(1))
        console.note("still here")
    assert len(cell.outputs[0]) == 1


def test_strangers_texts_are_no_html_and_no_markup(cell):
    with console_for(f"<b>{HOSTILE}") as console:
        console.note("<script>alert(1)</script>")
        console.note(HOSTILE)
    assert "<script" not in cell.html
    assert "<b>" not in cell.html
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", cell.html + cell.text)
    assert "[red]x[/red] :smile:" in cell.text


def test_what_a_browsers_font_may_lack_takes_one_column(cell):
    with console_for("a run") as console:
        for step in range(1, 61):
            console.step(step_report(step))
    assert set(re.findall(r'<span style="display:inline-block;width:1ch;line-height:1">(.)</span>', cell.html)) >= {"⠒"}
    assert not re.search("[\u2800-\u28ff]{2}", cell.html)


def test_rich_knows_that_the_tests_are_no_notebook():
    assert not Console().is_jupyter
