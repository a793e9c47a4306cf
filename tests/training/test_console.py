"""The training console: what it shows at each width, that nothing from outside steers it, and what it costs."""

import io
import logging
import re
import sys
import threading
import time
import tracemalloc
from contextlib import nullcontext

import pytest
from rich.cells import cell_len
from rich.console import Console

from qlite.device import MemoryUse
from qlite.streams import clean
from qlite.training.console import LiveConsole, PlainConsole, open_console
from qlite.training.report import AnswerReport, EvalReport, SampleReport, StepReport
from qlite.units import GIB

GPU = MemoryUse(used=6 * GIB, peak=12 * GIB, total=24 * GIB, reserved=13 * GIB, driver=14 * GIB)
CPU = MemoryUse(used=3 * GIB, peak=4 * GIB, total=16 * GIB)
HOSTILE = "a[/b] [red]x[/red] :smile: \x1b[31m\x1b]0;title\x07\x07\x9b2J\u202egnp.exe\r\t\x00 " + "y" * 10_000
SIZES = [(40, 20), (80, 24), (120, 40), (200, 60)]


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class BrokenTerminal(Terminal):
    """A terminal whose other side has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    flush = write


def step_report(step: int, steps: int = 100, memory: MemoryUse = GPU, loss: float | None = None) -> StepReport:
    loss = 3 - 2 * step / steps if loss is None else loss
    return StepReport(step, steps, step / steps, loss, 2e-4, 0.512, 4000, 2000, 2.0, memory)


def eval_report(step: int, loss: float = 1.25) -> EvalReport:
    return EvalReport(step, loss, 3.49, 64, 1000, 1.5)


def live_console(width: int = 80, height: int = 24, title: str = "a run") -> LiveConsole:
    file = Terminal()
    return LiveConsole(title, Console(file=file, force_terminal=True, width=width, height=height, markup=False))


def panel(console: LiveConsole) -> list[str]:
    """Return the lines of the panel as it would be drawn now."""
    screen = console._screen.console
    with screen.capture() as capture:
        screen.print(console._screen.renderable)
    return strip_styles(capture.get()).splitlines()


def strip_styles(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def written(console: LiveConsole | PlainConsole) -> str:
    """Return everything a console has written to its stream."""
    stream = console._screen.console.file if isinstance(console, LiveConsole) else console._out
    return stream.getvalue()


def trained(console: LiveConsole, memory: MemoryUse = GPU, steps: int = 60) -> LiveConsole:
    console.evaluated(eval_report(0, 2.9))
    for step in range(1, steps + 1):
        console.step(step_report(step, memory=memory))
    console.evaluated(eval_report(steps))
    return console


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("memory", [GPU, CPU], ids=["gpu", "cpu"])
def test_the_panel_fits_every_terminal_and_shows_every_figure(width, height, memory):
    console = trained(live_console(width, height), memory)
    console.phase("evaluate", 3, 64)
    console.answered(AnswerReport(0, 64, 3))
    lines = panel(console)
    text = "\n".join(lines)
    assert len(lines) < height
    assert {cell_len(line) for line in lines} == {min(width, 160)}
    assert "…" not in text
    for figure in (
        "step 60/100",
        "60%",
        "epoch 0.60",
        "elapsed",
        "1.8000",
        "1.2500",
        "3.49",
        "2.00e-04",
        "0.512",
        "2,000",
        "3/64",
    ):
        assert figure in text, figure


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (10, 5), (24, 8), (30, 10), (80, 8), (300, 100)])
def test_no_size_of_terminal_is_too_odd_to_draw_on(size):
    console = trained(live_console(*size))
    console.phase("evaluate", 3, 64)
    lines = panel(console)
    assert "cannot draw" not in "".join(lines)
    assert len(lines) <= max(6, size[1] - 1)


def test_a_flaw_in_the_drawing_is_shown_and_not_raised(monkeypatch):
    monkeypatch.setattr("qlite.training.panel._progress_lines", lambda *_: 1 / 0)
    assert "cannot draw: ZeroDivisionError" in "".join(panel(trained(live_console())))


def test_the_gauge_of_a_card_tells_allocated_reserved_and_driver_apart():
    lines = panel(trained(live_console(80)))
    gauge = next(line for line in lines if "VRAM" in line)
    cells = sum(gauge.count(mark) for mark in "█▓░·")
    assert gauge.count("█") == round(cells * 6 / 24)
    assert gauge.count("█▓") == gauge.count("▓░") == 1
    assert gauge.count("▓") == round(cells * 13 / 24) - round(cells * 6 / 24)
    assert gauge.count("░") == round(cells * 14 / 24) - round(cells * 13 / 24)
    assert "14.0 of 24.0 GiB" in gauge
    assert "█ allocated 6.00  ▓ reserved 13.00  ░ driver 14.00  peak 12.00" in "\n".join(lines)


def test_the_gauge_of_a_cpu_shows_process_memory_and_its_peak():
    text = "\n".join(panel(trained(live_console(80), CPU)))
    assert "VRAM" not in text
    assert "3.0 of 16.0 GiB" in text
    assert "█ process 3.00  ▒ peak 4.00" in text


def test_a_card_without_a_drivers_figure_still_has_a_gauge():
    memory = MemoryUse(used=6 * GIB, peak=7 * GIB, total=24 * GIB, reserved=8 * GIB)
    text = "\n".join(panel(trained(live_console(80), memory)))
    assert "8.0 of 24.0 GiB" in text
    assert "driver" not in text


def test_a_figure_above_the_total_fills_the_gauge_and_no_more():
    memory = MemoryUse(used=30 * GIB, peak=30 * GIB, total=24 * GIB, reserved=31 * GIB, driver=5 * GIB)
    assert {cell_len(line) for line in panel(trained(live_console(80), memory))} == {80}


def test_the_curve_falls_from_the_highest_to_the_lowest_loss_and_marks_evaluations():
    lines = panel(trained(live_console(80, 24), steps=100))
    curve = [line.split("│", 2)[2][:-1] for line in lines if line.count("│") == 3]
    assert len(curve) >= 5
    assert sum(row.count("◆") for row in curve) == 2
    first_column = next(i for i, row in enumerate(curve) if row[0] != " ")
    last_column = next(i for i, row in enumerate(curve) if row.rstrip()[-1:] and len(row.rstrip()) >= len(row) - 2)
    assert first_column < last_column
    assert "◆ eval" in "\n".join(lines)


@pytest.mark.parametrize("losses", [[2.0], [2.0] * 50, [float("nan")] * 50, [1.0, float("inf"), 2.0, 1.5], [-1e30, 1e30, 0]])
def test_any_losses_can_be_drawn(losses):
    console = live_console(80)
    for step, loss in enumerate(losses, start=1):
        console.step(step_report(step, loss=loss))
        console.evaluated(eval_report(step, loss))
    assert "cannot draw" not in "".join(panel(console))
    assert {cell_len(line) for line in panel(console)} == {80}


def test_a_step_without_duration_is_no_division_by_zero():
    console = live_console()
    console.step(StepReport(1, 1, 1.0, 1.0, 1e-4, 0.5, 10, 10, 0.0, CPU))
    assert "cannot draw" not in "".join(panel(console))


def test_speed_is_the_median_of_the_last_steps():
    console = live_console()
    for step, seconds in enumerate([2.0] * 30 + [500.0], start=1):
        console.step(StepReport(step, 100, 1.0, 1.0, 1e-4, 0.5, 4000, 10, seconds, CPU))
    assert "2,000" in "\n".join(panel(console))


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_phase_shows_a_bar_while_it_runs(width):
    console = live_console(width)
    console.phase("download", 0, 10 * GIB)
    console.phase("download", 4 * GIB, 10 * GIB)
    console.phase("encode", 300, 1200)
    text = "\n".join(panel(console))
    assert "40%" in text
    assert "25%" in text
    assert "GiB/s" in text
    if width >= 80:
        assert "4.00 GiB of 10.0 GiB" in text
        assert "300 of 1,200" in text


def test_a_phase_of_unknown_length_ends_when_another_begins():
    console = live_console()
    console.phase("read", 17, 0)
    assert "17" in "\n".join(panel(console))
    console.phase("load", 1, 4)
    assert "read" not in "\n".join(panel(console))
    assert "✓ read  17 in" in strip_styles(written(console))


def test_a_finished_phase_becomes_one_line_the_first_time_only():
    console = live_console()
    for _ in range(3):
        for row in range(65):
            console.phase("evaluate", row, 64)
    assert strip_styles(written(console)).count("✓ evaluate  64 in") == 1
    assert "evaluate" not in "\n".join(panel(console))


def test_two_hundred_open_phases_do_not_fill_the_screen():
    console = live_console(80, 24)
    for index in range(200):
        console.phase(f"download shard {index}", 1, 2)
    assert len(panel(console)) < 24


@pytest.mark.parametrize("kind", [live_console, lambda: PlainConsole("t", Terminal())], ids=["live", "plain"])
def test_nothing_from_outside_steers_the_terminal(kind):
    console = kind()
    console.note(HOSTILE)
    console.phase(HOSTILE, 1, 2)
    console.phase(HOSTILE, 2, 2)
    console.answered(AnswerReport(0, 2, 1, [(HOSTILE, HOSTILE, HOSTILE)] * 5))
    console.sampled(SampleReport(3, [(HOSTILE, HOSTILE)]))
    text = strip_styles(written(console))
    assert "[/b] [red]x[/red] :smile:" in text
    assert "gnp.exe" in text
    assert not set(text) & set("\x1b\x07\x9b\u202e\x00\r\t")
    assert len(text) < 10_000


def test_a_hostile_title_and_phase_stay_inside_the_panel():
    console = live_console(80, title=HOSTILE)
    console.phase(HOSTILE + "模型" * 100, 1, 2)
    lines = panel(console)
    assert {cell_len(line) for line in lines} == {80}
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("a\nb\r\nc", "a\\nb\\nc"),
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b]8;;http://x\x07link\x1b]8;;\x07", "link"),
        ("\x1bc\x9b31m", "c31m"),
        ("\u202eabc\u2066d\u200f", "abcd"),
        ("a\ud800b", "ab"),
        ("a\tb", "a b"),
        ("日本語 é 👍", "日本語 é 👍"),
    ],
)
def test_clean_keeps_text_and_drops_control(text, shown):
    assert clean(text) == shown


def test_clean_crops_what_is_too_long_at_little_cost():
    began = time.perf_counter()
    assert clean("x" * 50_000_000, 100) == "x" * 99 + "…"
    assert time.perf_counter() - began < 0.5


def test_a_note_of_many_lines_is_cut():
    console = PlainConsole("t", io.StringIO())
    console.note("\n".join(f"line {index}" for index in range(500)))
    assert "line 19" in written(console)
    assert "line 20" not in written(console)


def test_answers_are_listed_before_and_after_with_two_samples():
    console = live_console(80)
    console.answered(AnswerReport(0, 64, 3, [("q1", "right1", "wrong1"), ("q2", "right2", "wrong2"), ("q3", "r", "w")]))
    console.answered(AnswerReport(100, 64, 51, [("q1", "right1", "now1"), ("q2", "right2", "now2"), ("q3", "r", "w")]))
    text = strip_styles(written(console))
    assert "answers at step 0: 3/64 exact\n" in text
    assert "answers at step 100: 51/64 exact, before 3/64\n" in text
    assert "before    wrong2\n  now       now2\n" in text
    assert "q3" not in text
    console.step(step_report(1))
    assert "3→51/64" in "\n".join(panel(console))


def test_samples_are_listed_in_full_by_both_consoles():
    live, out = live_console(80), io.StringIO()
    live.sampled(SampleReport(20, [("q1", "a1"), ("q2", "a2")]))
    with PlainConsole("t", out) as plain:
        plain.sampled(SampleReport(20, [("q1", "a1"), ("q2", "a2")]))
    lines = "samples at step 20\n  prompt    q1\n  answer    a1\n  prompt    q2\n  answer    a2\n"
    assert lines in strip_styles(written(live))
    assert lines in out.getvalue()


@pytest.mark.parametrize("steps", [1, 7, 40, 41, 79, 81, 600, 1999, 100_000])
def test_plain_lines_are_about_forty_steps_and_the_first_and_last(steps):
    console = PlainConsole("t", io.StringIO())
    with console:
        for step in range(1, steps + 1):
            console.step(step_report(step, steps))
    numbers = [int(number) for number in re.findall(r"^step (\d+)/", written(console), re.MULTILINE)]
    assert len(numbers) <= 42
    assert len(numbers) == len(set(numbers))
    assert numbers[0] == 1
    assert numbers[-1] == steps


def test_plain_mode_prints_the_last_step_of_a_run_that_stops_early():
    console = PlainConsole("t", io.StringIO())
    for step in range(1, 1000):
        console.step(step_report(step, 100_000))
    console.__exit__(KeyboardInterrupt)
    assert "\nstep 999/100000 " in written(console)
    assert "interrupted at step 999 after" in written(console)


def test_plain_mode_prints_phases_notes_and_every_evaluation():
    console = PlainConsole("a run", io.StringIO())
    with console:
        console.note("hello")
        for done in range(0, 292):
            console.phase("load", done, 291)
        console.step(step_report(1))
        for step in range(10):
            console.evaluated(eval_report(step))
        console.phase("merge", 1, 3)
    lines = written(console).splitlines()
    assert lines[:3] == ["a run", "hello", "load ..."]
    assert re.fullmatch(r"load: 291 in \d\.\ds", lines[3])
    assert sum("eval loss 1.2500  perplexity 3.49" in line for line in lines) == 10
    assert "merge: stopped at 1 of 3" in lines
    assert "\x1b" not in written(console)


def test_a_pipe_or_a_dumb_terminal_gets_lines_and_a_terminal_the_live_screen(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    assert isinstance(open_console("t", io.StringIO()), PlainConsole)
    assert isinstance(open_console("t", Terminal()), LiveConsole)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_console("t", Terminal()), PlainConsole)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(Terminal, "encoding", "latin-1")
    assert isinstance(open_console("t", Terminal()), PlainConsole)


def test_a_program_without_stdout_still_trains(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    with open_console("t") as console:
        console.note("nobody hears this")
        console.step(step_report(1))


@pytest.mark.parametrize("stream", [BrokenTerminal, lambda: closed(Terminal()), lambda: closed(io.StringIO())])
def test_a_stream_that_broke_or_closed_never_reaches_training(stream, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    raised = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    for console in (open_console("t", stream()), LiveConsole("t", Console(file=stream(), force_terminal=True))):
        with console:
            console.note("a note")
            console.phase("load", 1, 1)
            console.step(step_report(1))
            console.evaluated(eval_report(1))
            console.answered(AnswerReport(1, 1, 1, [("a", "b", "c")]))
            time.sleep(0.3)
    assert not raised


def closed(stream: io.StringIO) -> io.StringIO:
    stream.close()
    return stream


def test_a_stream_of_a_narrow_encoding_gets_question_marks():
    file = io.BytesIO()
    console = PlainConsole("t", io.TextIOWrapper(file, encoding="ascii"))
    console.note("naïve 日本")
    assert b"na?ve ??" in file.getvalue()


def run_until(console: LiveConsole, error: type[BaseException] | None) -> None:
    trained(console)
    if error:
        raise error("x")


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError, SystemExit, GeneratorExit])
def test_the_terminal_is_left_clean_and_the_last_state_stays(error):
    console = live_console(80)
    stdout = sys.stdout
    with pytest.raises(error) if error else nullcontext(), console:
        run_until(console, error)
    text = written(console)
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert "step 60/100" in strip_styles(text).rsplit("╭", 1)[1]
    assert ("finished" if error is None else "at step 60") in strip_styles(text).rsplit("╭", 1)[1]
    assert text.endswith("\x1b[?25h")
    assert sys.stdout is stdout


def test_without_colour_the_panel_says_the_same(monkeypatch):
    coloured = panel(trained(live_console(80)))
    monkeypatch.setenv("NO_COLOR", "1")
    console = trained(live_console(80))
    screen = console._screen.console
    with screen.capture() as capture:
        screen.print(console._screen.renderable)
    assert not re.search(r"\x1b\[[0-9;]*\b3[0-9]", capture.get())
    assert strip_styles(capture.get()).splitlines() == coloured


def test_a_log_handler_made_before_writes_above_the_panel_and_is_given_back(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    logger = logging.getLogger("test_console")
    handler = logging.StreamHandler()
    logger.addHandler(handler)
    try:
        console = live_console(80)
        with console:
            logger.warning("weights [/b] not initialised")
        assert "weights [/b] not initialised\n" in strip_styles(written(console))
        assert handler.stream is terminal
        assert terminal.getvalue() == ""
    finally:
        logger.removeHandler(handler)


def test_other_peoples_prints_are_not_read_as_markup(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    with open_console("t", terminal):
        print("half a line [/x]", end="", flush=True)
        print("[bold]whole[/bold] :smile:")
    assert "half a line [/x]" in terminal.getvalue()
    assert "[bold]whole[/bold] :smile:" in terminal.getvalue()


def test_nothing_is_redrawn_when_nothing_changed(monkeypatch):
    console = live_console(80)
    monkeypatch.setattr(type(console._run), "elapsed", property(lambda run: 3.0))
    with console:
        trained(console)
        time.sleep(1.6)
        before = len(written(console))
        time.sleep(0.8)
        assert len(written(console)) == before


def test_a_step_costs_microseconds_and_no_memory_however_many_there_are():
    reports = [step_report(step, 2000) for step in range(1, 2001)]
    console = live_console(120, 40)
    with console:
        began = time.perf_counter()
        for report in reports:
            console.step(report)
        seconds = time.perf_counter() - began
        assert seconds / len(reports) < 50e-6
        tracemalloc.start()
        for report in reports * 5:
            console.step(report)
        early = tracemalloc.get_traced_memory()[0]
        for report in reports * 10:
            console.step(report)
        growth = tracemalloc.get_traced_memory()[0] - early
        tracemalloc.stop()
    assert growth < 100_000
    assert len(console._run.losses.points) < 1024


def test_a_thousand_evaluations_keep_a_bounded_history():
    console = live_console()
    for step in range(1, 2000):
        console.step(step_report(step, 2000))
        console.evaluated(eval_report(step))
    assert len(console._run.evals) <= 256
    assert console._run.evals[0][0] == 1
    assert console._run.evals[-1][0] == 1999


def test_the_curve_of_a_million_steps_keeps_its_shape():
    console = live_console()
    report = [step_report(1, 1_000_000, loss=4.0), step_report(1_000_000, 1_000_000, loss=1.0)]
    for half in report:
        for _ in range(100_000):
            console.step(half)
    points = console._run.losses.points
    assert 512 <= len(points) <= 1024
    assert points[0] == 4.0
    assert points[-1] == 1.0
    assert points.count(4.0) == pytest.approx(len(points) / 2, abs=2)
