"""The panel of the live screen: how a run's progress, curve, figures and memory are drawn at the terminal's size.

Colours are the terminal's own sixteen, and no colour carries meaning alone (NO_COLOR, light themes).
"""

import logging
import sys
import time
from itertools import accumulate, groupby, pairwise
from typing import TextIO

from rich.box import ROUNDED
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from qlite.training.gauges import memory_blocks
from qlite.training.progress import Phase, RunView, format_perplexity
from qlite.units import format_seconds

LEAST_CURVE = 4
"""Lines below which a curve says nothing."""
BESIDE_WIDTH, BESIDE_LINES = 96, 8
"""Cells and lines from which on the figures stand beside the curve."""


class Screen(Live):
    """A rich Live that skips a refresh when nothing changed, and refreshes less often where drawing is slow."""

    def __init__(self, run: RunView, console: Console):
        self._run, self._shown, self._due = run, None, 0.0
        self._handlers: list[tuple[logging.StreamHandler, TextIO]] = []
        super().__init__(
            Frame(run),
            console=console,
            refresh_per_second=4,
            # A stderr sent to a file stays there.
            redirect_stderr=sys.stderr is not None and sys.stderr.isatty(),
        )

    def start(self, refresh: bool = False) -> None:
        streams = (sys.stdout, sys.stderr)
        super().start(refresh)
        # Log handlers made earlier (transformers' is) hold the stream itself: unless they too write through us, a
        # warning lands in the middle of the panel.
        for old, new in zip(streams, (sys.stdout, sys.stderr), strict=True):
            for handler in _log_handlers() if new is not old else ():
                if handler.stream is old:
                    self._handlers.append((handler, old))
                    handler.setStream(new)

    def stop(self) -> None:
        while self._handlers:
            handler, stream = self._handlers.pop()
            handler.setStream(stream)
        super().stop()

    def refresh(self) -> None:
        state = (self._run.version, int(self._run.elapsed), self.console.size)
        if self.is_started and (state == self._shown or time.monotonic() < self._due):
            return
        began = time.thread_time()
        super().refresh()
        # Half a percent of one core may go into drawing; a single slow one (the first loads tables) costs a second.
        self._shown, self._due = state, time.monotonic() + min(1.0, 200 * (time.thread_time() - began))

    def print(self, line: Text) -> None:
        """Write ``line`` above the panel."""
        # The lock keeps the refresh thread from moving the cursor between our measuring and our writing.
        with self._lock:
            self.console.print(line, overflow="fold")


def _log_handlers() -> list[logging.StreamHandler]:
    named = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    handlers = [handler for logger in (logging.root, *named) for handler in logger.handlers]
    return [handler for handler in handlers if isinstance(handler, logging.StreamHandler)]


class Frame:
    """The panel as a rich renderable, laid out for the terminal's size at each drawing."""

    def __init__(self, run: RunView):
        self._run = run

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = min(options.max_width, 160), console.size.height
        try:
            # Two lines for the border, one for the cursor or a prompt.
            lines = _body(self._run, max(10, width - 4), max(3, height - 3))
        except Exception as error:  # A flaw in the drawing must not end hours of training.
            lines = [Text(f"cannot draw: {error!r}")]
        for line in lines:
            line.no_wrap, line.overflow = True, "ellipsis"
        is_bad = self._run.outcome not in ("", "finished")
        yield Panel(
            Group(*lines),
            box=ROUNDED,
            width=width,
            title=Text(self._run.title, style="bold", overflow="ellipsis"),
            subtitle=Text(self._run.outcome, style="bold red" if is_bad else "bold green"),
            title_align="left",
            subtitle_align="right",
            border_style="red" if is_bad else "green" if self._run.outcome else "cyan",
        )


def _body(run: RunView, width: int, height: int) -> list[Text]:
    """Return the panel's lines, at most ``height``: what matters least goes first, and the curve takes what is left."""
    phases = _phase_lines(list(run.phases.values())[-4:], width)
    if run.last is None:
        return phases or [Text(f"working, {format_seconds(run.elapsed)}", "dim")]
    head = [*_progress_lines(run, width), *phases]
    memory = _memory_lines(run, width, height - len(head))
    room = height - len(head) - len(memory)
    middle = _middle_lines(run, width, room)
    blanks = [Text()] if len(middle) + 2 <= room else []
    return [*head, *blanks, *middle, *blanks, *memory][:height]


def _memory_lines(run: RunView, width: int, height: int) -> list[Text]:
    """Return as much of the memory as leaves, of ``height`` lines, room for the figures and a curve; without one, for the figures."""
    figures = len(_number_lines(_numbers(run), width))
    blocks = memory_blocks(run.last.memory, width)
    with_curve = max(BESIDE_LINES, len(_numbers(run))) if width >= BESIDE_WIDTH else figures + 2 + LEAST_CURVE
    fitting = (block for needed in (with_curve, figures) for block in blocks if needed + len(block) <= height)
    return next(fitting, blocks[-1])


def _middle_lines(run: RunView, width: int, room: int) -> list[Text]:
    """Return curve and figures: beside each other where there is width, else one above the other."""
    numbers_width = 24
    if width >= BESIDE_WIDTH and room >= BESIDE_LINES:
        numbers = _number_lines(_numbers(run), numbers_width)
        curve = _chart_lines(run, width - numbers_width - 3, min(16, room - 2))
        return _side_by_side(curve, numbers, width - numbers_width) if curve else numbers
    numbers = _number_lines(_numbers(run), width)
    curve_height = min(12, room - len(numbers) - 2)
    return [*_chart_lines(run, width, curve_height), *numbers] if curve_height >= LEAST_CURVE else numbers


def _side_by_side(left: list[Text], right: list[Text], width: int) -> list[Text]:
    lines = []
    for index in range(max(len(left), len(right))):
        line = left[index].copy() if index < len(left) else Text()
        line.append(" " * (width - line.cell_len))
        lines.append(line.append_text(right[index]) if index < len(right) else line)
    return lines


def _bar(fraction: float, width: int, style: str) -> Text:
    full = round(fraction * width)
    return Text.assemble(("━" * full, style), ("─" * (width - full), "dim"))


def _phase_lines(phases: list[Phase], width: int) -> list[Text]:
    names = [Text(phase.name) for phase in phases]
    name_width = min(width // 3, max((name.cell_len for name in names), default=0))
    for name in names:
        name.truncate(name_width, overflow="ellipsis", pad=True)
    return [_phase_line(name, phase, width) for name, phase in zip(names, phases, strict=True)]


def _phase_line(name: Text, phase: Phase, width: int) -> Text:
    if phase.total <= 0:
        return Text.assemble(name, "  ", (f"{phase.amount}, {phase.time}", "dim"))
    # The fullest description that leaves a bar worth the name.
    room = width - name.cell_len - 7
    tails = (f"  {phase.amount}, {phase.time}", f"  {phase.rate}" if phase.is_bytes else f"  {phase.time}", "")
    tail = next(tail for tail in tails if room - len(tail) >= 8 or not tail)
    bar = _bar(phase.fraction, max(4, room - len(tail)), "magenta")
    return Text.assemble(name, " ", bar, f" {phase.fraction:4.0%}", (tail, "dim"))


def _progress_lines(run: RunView, width: int) -> list[Text]:
    report = run.last
    fraction = min(1.0, report.step / max(1, report.steps))
    count, percent = f"step {report.step:,}/{report.steps:,}", f"{fraction:4.0%}"
    bar = _bar(fraction, max(4, width - len(count) - len(percent) - 2), "green")
    times = f"epoch {report.epoch:.2f}   elapsed {format_seconds(run.elapsed)}"
    if not run.outcome and run.seconds_left is not None:
        times += f"   left {format_seconds(run.seconds_left)}"
    return [Text.assemble((count, "bold"), " ", bar, " ", percent), Text(times, "dim")]


def _numbers(run: RunView) -> list[tuple[str, str]]:
    """Return (label, value) of each figure; those that belong together follow each other."""
    report = run.last
    numbers = [("loss", f"{report.loss:.4f}")]
    if run.last_eval:
        numbers += [("eval loss", f"{run.last_eval.loss:.4f}"), ("perplexity", format_perplexity(run.last_eval.perplexity))]
    if run.first_eval is not run.last_eval:
        numbers.append(("first eval", f"{run.first_eval.loss:.4f}"))
    numbers += [("lr", f"{report.lr:.2e}"), ("grad", f"{report.grad_norm:.3g}")]
    numbers.append(("tokens/s", f"{run.tokens_per_second:,.0f}"))
    if run.last_answers:
        was = f"{run.first_answers.exact}→" if run.first_answers is not run.last_answers else ""
        numbers.append(("exact", f"{was}{run.last_answers.exact}/{run.last_answers.rows}"))
    return numbers


def _number_lines(numbers: list[tuple[str, str]], width: int) -> list[Text]:
    """Lay the figures out in as many columns as ``width`` has room for, at most four, read from top to bottom."""
    for count in (4, 3, 2, 1):
        rows = -(-len(numbers) // count)
        columns = [numbers[start : start + rows] for start in range(0, len(numbers), rows)]
        label_widths = [max(len(label) for label, _ in column) for column in columns]
        pairs = zip(label_widths, columns, strict=True)
        widths = [label + 1 + max(len(value) for _, value in column) for label, column in pairs]
        if sum(widths) + count - 1 <= width:
            break
    gap = min(6, (width - sum(widths)) // max(1, len(columns) - 1))
    lines, left = [Text() for _ in range(rows)], 0
    for column, label_width, column_width in zip(columns, label_widths, widths, strict=True):
        for line, (label, value) in zip(lines, column, strict=False):
            line.append(" " * (left - line.cell_len))
            line.append(f"{label:<{label_width}} ", "dim").append(value, "bold")
        left += column_width + gap
    return lines


def _chart_lines(run: RunView, width: int, height: int) -> list[Text]:
    """Return the smoothed loss as a braille curve, evaluations as diamonds, the last line being the axis of steps."""
    curve, evals = _smooth(run.losses.points), run.evals
    if len(curve) < 2:
        return []
    values = [*curve, *(loss for _, loss in evals)]
    low, high = min(values), max(values)
    labels = [f"{high:.4g}", *[""] * (height - 3), f"{low:.4g}"]
    margin = max(map(len, labels))
    cells = max(4, width - margin - 1)
    scale = (4 * len(labels) - 1) / max(high - low, 1e-12)
    grid = _braille([round((high - value) * scale) for value in _resample(curve, 2 * cells)], cells, len(labels))
    for step, loss in evals:
        grid[round((high - loss) * scale) // 4][_cell(run, step, cells)] = "◆"
    lines = [_chart_line(f"{label:>{margin}}│", row) for label, row in zip(labels, grid, strict=True)]
    return [*lines, _step_axis(run, margin, cells)]


def _chart_line(axis: str, row: list[str]) -> Text:
    line = Text.assemble((axis, "dim"))
    for is_mark, characters in groupby(row, key="◆".__eq__):
        line.append("".join(characters), "bold magenta" if is_mark else "cyan")
    return line


def _cell(run: RunView, step: int, cells: int) -> int:
    """Return the column of ``step``; one before the first trained step (an evaluation at step 0) is in the first."""
    return max(0, min(cells - 1, round((step - run.first.step) / max(1, run.last.step - run.first.step) * (cells - 1))))


def _step_axis(run: RunView, margin: int, cells: int) -> Text:
    first, last = f"{run.first.step:,}", f"{run.last.step:,}"
    legend = " loss  ◆ eval " if run.evals else " loss "
    gap = max(0, cells - len(first) - len(last))
    return Text(f"{'':>{margin}}└{first}{(legend if gap >= len(legend) else '').center(gap, '─')}{last}", "dim")


def _smooth(points: list[float]) -> list[float]:
    """Return the centred moving average over a twentieth of the points; unlike a running one it does not lag."""
    reach = max(len(points) // 40, min(3, len(points) // 10))
    sums = [0.0, *accumulate(points)]
    spans = ((max(0, i - reach), min(len(points), i + reach + 1)) for i in range(len(points)))
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]


def _resample(points: list[float], count: int) -> list[float]:
    """Return ``count`` values along ``points``, interpolated linearly."""
    values = []
    for index in range(count):
        whole, part = divmod(index * (len(points) - 1) / (count - 1), 1)
        here = points[int(whole)]
        values.append(here + part * (points[min(int(whole) + 1, len(points) - 1)] - here))
    return values


def _braille(dots: list[int], cells: int, rows: int) -> list[list[str]]:
    """Return characters [rows, cells]: a line through ``dots``, one for each half cell, counted from the top."""
    grid = [[0x2800] * cells for _ in range(rows)]
    bits = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
    for column, (before, here) in enumerate(pairwise([dots[0], *dots])):
        # Down or up to the last dot, which the column before has drawn.
        for dot in range(here, before, 1 if before > here else -1) if before != here else (here,):
            grid[dot // 4][column // 2] |= bits[column % 2][dot % 4]
    return [[chr(code) if code > 0x2800 else " " for code in row] for row in grid]
