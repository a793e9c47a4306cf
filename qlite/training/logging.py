"""Hands what happens in a run to the tools that the recipe names, each in a thread of its own: training waits for none of them.

A tool that fails, hangs or falls behind is told of once and gets nothing more; the run goes on as if it had not been named.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from threading import Event, Thread

from qlite.errors import QliteError, shown
from qlite.loggers import LOGGERS
from qlite.loggers.base import PATIENCE_SECONDS, LoggedRun, Logger
from qlite.recipe.keys import toml_value
from qlite.recipe.schema import Recipe
from qlite.recipe.share import shareable, without_folders
from qlite.recipe.write import recipe_tables, recipe_toml
from qlite.training.report import AnswerReport, EvalReport, SampleReport, StepReport
from qlite.training.run_folder import RunFolder
from qlite.units import GIB

MOST_WAITING = 10_000
"""Reports that wait for a tool, about 1 KB each, before it is given up: hours of steps."""
STOPPED_PATIENCE_SECONDS = 5
"""Longest that a run that was asked to stop waits for a tool."""
Report = StepReport | EvalReport | AnswerReport | SampleReport


class Loggers:
    """An Observer that tells the tools of a run. ``tell`` hears of those that fail."""

    def __init__(self, recipe: Recipe, run: RunFolder, tell: Callable[[str], None]):
        self._recipe, self._run, self._told = recipe, run, tell
        names = dict.fromkeys(recipe.output.loggers)
        # Before the run is resumed: what it is put back by, the tools have seen.
        records = run.records.read() if names else []
        self._logged, self._notes = last_steps(records), _notes(records)
        self._outlets = [outlet for name in names if (outlet := self._opened(name))]

    def _opened(self, name: str) -> "Outlet | None":
        try:
            return Outlet(name, LOGGERS[name](), self._logged)
        except Exception as error:  # a damaged installation, or one that this Python cannot load
            self._tell(_fault(name, error))
            return None

    def _tell(self, message: str) -> None:
        with suppress(QliteError):  # a full disk: it is told by what matters, if anything does, and a finished run is finished
            self._told(message)

    @contextmanager
    def going_on_after(self, step: int) -> Iterator[None]:
        """Keep the tools informed of what happens inside; on leaving, give them some time to take the rest."""
        if self._outlets:
            shared = shareable(self._recipe)
            config = {f"{table}.{key}": _plain(value) for table, keys in recipe_tables(shared).items() for key, value in keys.items()}
            notes = tuple((at, without_folders(text, self._recipe)) for at, text in self._notes)
            name = self._run.path.resolve().name
            logged = LoggedRun(name, self._run.logs, config, recipe_toml(shared), step, notes)
            for outlet in self._outlets:
                outlet.begin(logged)
        try:
            yield
        except BaseException:
            self._close(is_finished=False)
            raise
        self._close(is_finished=True)

    def _close(self, is_finished: bool) -> None:
        for outlet in self._outlets:
            outlet.end(is_finished)
        try:
            self._wait(PATIENCE_SECONDS if is_finished else STOPPED_PATIENCE_SECONDS)
        except KeyboardInterrupt:  # to leave them behind was what it was for, unless the run itself is what is being stopped
            if not is_finished:
                raise
        for outlet in self._outlets:
            outlet.give_up_if_late()
        self._tell_faults()

    def _wait(self, seconds: float) -> None:
        """Wait at most so long for all tools to take what they were told; who waits longer than a second hears of it."""
        until = time.monotonic() + seconds
        for outlet in self._outlets:
            if not outlet.join(min(1, seconds)):
                self._tell(f"waiting for {outlet.name} to take the last figures, {seconds:g} s at most (Ctrl-C: leave it)")
                outlet.join(until - time.monotonic())

    def _tell_faults(self) -> None:
        for outlet in self._outlets:
            if outlet.fault is not None:
                self._tell(outlet.fault)
        self._outlets = [outlet for outlet in self._outlets if outlet.fault is None]

    def _hand(self, report: Report | str) -> None:
        for outlet in self._outlets:
            outlet.hand(report)
            if outlet.fault is not None:
                self._tell_faults()

    def note(self, message: str) -> None:
        self._hand(without_folders(message, self._recipe) if self._outlets else message)

    def phase(self, name: str, done: int, total: int) -> None:
        """Progress is for the screen alone."""

    def step(self, report: StepReport) -> None:
        self._hand(report)

    def evaluated(self, report: EvalReport) -> None:
        self._hand(report)

    def answered(self, report: AnswerReport) -> None:
        self._hand(report)

    def sampled(self, report: SampleReport) -> None:
        self._hand(report)


class Outlet:
    """One tool, the reports that wait for it, and the thread that hands them over."""

    def __init__(self, name: str, logger: Logger, logged: dict[str, int]):
        self.name = name
        self.fault: str | None = None
        """Why it gets nothing more."""
        self._logger, self._logged = logger, logged
        self._waiting: SimpleQueue[Report | str | bool] = SimpleQueue()
        self._step = 0
        self._has_ended = Event()

    def begin(self, run: LoggedRun) -> None:
        """Start the thread. It keeps no process from ending."""
        self._step = run.step
        Thread(target=self._work, args=(run,), name=f"qlite-{self.name}", daemon=True).start()

    def hand(self, report: Report | str) -> None:
        """Let ``report`` wait for the thread."""
        if self._waiting.qsize() < MOST_WAITING:
            self._waiting.put(report)
        else:
            self.fault = self.fault or f"{self.name} is {MOST_WAITING:,} reports behind and gets no more; the run goes on without it"

    def end(self, is_finished: bool) -> None:
        """Say that nothing more will come."""
        self._waiting.put(is_finished)

    def join(self, seconds: float) -> bool:
        """Wait at most so long for the tool to have all; return whether it has."""
        return self._has_ended.wait(max(0.0, seconds))

    def give_up_if_late(self) -> None:
        """Leave the tool behind if it has not ended."""
        if not self._has_ended.is_set():
            self._logger.leave()
            self.fault = self.fault or f"{self.name} did not take the last {self._waiting.qsize() or 1} reports in time and is left behind"

    def _work(self, run: LoggedRun) -> None:
        try:
            known = self._logger.begin(run)
            while not isinstance(report := self._waiting.get(), bool):
                self._take(report, known)
                if self._waiting.empty():
                    self._logger.flush()
            self._logger.end(report)
        except BaseException as error:  # sys.exit of a foreign library's, too, would end the thread alone
            self.fault = _fault(self.name, error)
            self._logger.leave()
        finally:
            self._has_ended.set()

    def _take(self, report: Report | str, known: int) -> None:
        """Give the tool one report, unless it has had it before the run was put back."""
        if isinstance(report, str):
            self._logger.note(self._step, report)
            return
        self._step = max(self._step, report.step)
        if report.step <= min(self._logged.get(report.as_record()["kind"], -1), known):
            return
        if numbers := _numbers(report):
            self._logger.numbers(report.step, numbers)
        if texts := _texts(report):
            self._logger.rows(report.step, *texts)


def last_steps(records: list[dict]) -> dict[str, int]:
    """Return the last step of each kind of record."""
    found: dict[str, int] = {}
    for record in records:
        if "step" in record:
            found[record["kind"]] = max(record["step"], found.get(record["kind"], -1))
    return found


def _notes(records: list[dict]) -> list[tuple[int, str]]:
    """Return what the user was told, each with the step before it."""
    step, found = 0, []
    for record in records:
        step = record.get("step", step)
        if record.get("kind") == "note":
            found.append((step, record["text"]))
    return found


def _numbers(report: Report) -> dict[str, float]:
    """Return the points that a report adds to curves, by the curve's name."""
    if isinstance(report, StepReport):
        own = ("loss", "lr", "grad_norm", "tokens_per_second", "seconds", "epoch", "oom_retries")
        memory = {key: getattr(report.memory, key) for key in ("used", "peak", "reserved", "driver", "spilled")}
        sizes = {f"memory/{key}_gib": size / GIB for key, size in memory.items() if size is not None}
        return {f"train/{key}": float(getattr(report, key)) for key in own} | sizes
    if isinstance(report, EvalReport):
        return {"eval/loss": report.loss, "eval/perplexity": report.perplexity}
    if isinstance(report, AnswerReport):
        return {"answers/exact": report.exact / report.rows} if report.rows else {}
    return {}


def _texts(report: Report) -> tuple[str, list[str], list[tuple[str, ...]]] | None:
    """Return the table of texts in a report: its name, columns and rows."""
    if isinstance(report, AnswerReport) and report.samples:
        return "answers", ["prompt", "expected", "answer"], report.samples
    if isinstance(report, SampleReport) and report.samples:
        return "samples", ["prompt", "answer"], report.samples
    return None


def _plain(value: object) -> str | int | float | bool:
    """Return a recipe's value as every tool takes one."""
    return value if isinstance(value, str | int | float | bool) else toml_value(value)


def _fault(name: str, error: BaseException) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{name} gets nothing more of this run, which goes on without it: {shown(reason, 300)}"
