"""An adapter's figures beside its base's: as a table on the terminal, and as a JSON file with every answer."""

import json
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlite import __version__
from qlite.errors import RunError
from qlite.files import write_json
from qlite.serving.metrics import LIBRARIES as METRIC_LIBRARIES
from qlite.serving.metrics import Score
from qlite.serving.questions import ChoiceQuestion, Question, last_said
from qlite.streams import clean
from qlite.training.progress import format_perplexity
from qlite.training.provenance import LIBRARIES
from qlite.training.run_folder import RunFolder
from qlite.training.run_report import leave_report
from qlite.units import format_seconds

KIND = "qlite evaluation"
SAMPLES = 2
# Metric -> the unit of its value; the others are plain numbers.
UNITS = {
    "loss": "nats a token",
    "exact_match": "share of 1",
    "rouge_l": "share of 1",
    "bleu": "of 100",
    "chrf": "of 100",
    "accuracy": "share of 1",
    "accuracy_per_character": "share of 1",
}
AS_PERCENT = ("exact_match", "accuracy", "accuracy_per_character")


@dataclass
class Side:
    """What one of the two models has reached."""

    scores: dict[str, Score] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)
    """One for each question; empty where nothing was asked."""
    likelihoods: list[list[float]] = field(default_factory=list)
    """For each question with choices the log-probability of each, in nats."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By stage: "loss", "answers", "choices"."""


@dataclass(frozen=True)
class Comparison:
    """What was measured, on what, and how."""

    counts: dict[str, int]
    settings: dict[str, object]
    questions: list[Question]
    choices: list[ChoiceQuestion]
    adapter: Side
    base: Side | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    """Metric -> why it was not computed."""

    @property
    def sides(self) -> dict[str, Side]:
        return {"adapter": self.adapter} if self.base is None else {"base": self.base, "adapter": self.adapter}

    def difference(self, metric: str) -> float | None:
        """Return by how much the adapter's value is above the base's; None without a base."""
        return None if self.base is None else self.adapter.scores[metric].value - self.base.scores[metric].value

    def as_record(self) -> dict:
        """Return everything, as it is written to the file; what is not finite is null."""
        return {
            "kind": KIND,
            "settings": self.settings,
            "counts": self.counts,
            "metrics": {name: self._metric(name) for name in self.adapter.scores},
            "left_out": self.left_out,
            "seconds": {name: {stage: round(s, 3) for stage, s in side.seconds.items()} for name, side in self.sides.items()},
            "versions": dict(_versions()),
            "answers": [self._answer(index, question) for index, question in enumerate(self.questions) if self.adapter.answers],
            "choices": [self._choice(index, question) for index, question in enumerate(self.choices) if self.adapter.likelihoods],
        }

    def _metric(self, name: str) -> dict:
        values = {side_name: _finite(side.scores[name].value) for side_name, side in self.sides.items()}
        difference = {} if self.base is None else {"difference": _finite(self.difference(name))}
        warnings = {side_name: side.scores[name].warning for side_name, side in self.sides.items() if side.scores[name].warning}
        how = {"unit": UNITS.get(name, ""), "signature": self.adapter.scores[name].signature}
        return {**values, **difference, **how, **({"warnings": warnings} if warnings else {})}

    def _answer(self, index: int, question: Question) -> dict:
        tools = {"tools": question.tools} if question.tools else {}
        said = {name: side.answers[index] for name, side in self.sides.items()}
        return {"where": question.where, "messages": question.messages, **tools, "references": question.references, **said}

    def _choice(self, index: int, question: ChoiceQuestion) -> dict:
        likelihoods = {name: [_finite(value) for value in side.likelihoods[index]] for name, side in self.sides.items()}
        asked = {"where": question.where, "messages": question.messages, "choices": list(question.choices), "right": question.right}
        return {**asked, "log_likelihoods": likelihoods}


def choose_file(run: RunFolder, data: str, out: Path | None) -> Path:
    """Return where an evaluation of ``run`` on ``data`` is written: ``out``, or evaluations/NAME.json in the run's folder.

    Raises:
        RunError: something else is there; an earlier evaluation on the same data gives way.
    """
    name = re.sub(r"[^\w.-]+", "-", Path(data).stem).strip("-.") or "data"
    path = out or run.path / "evaluations" / f"{name}.json"
    if path.suffix != ".json":
        raise RunError(f'--out "{path}": an evaluation is a .json file')
    if out is not None and not out.absolute().parent.is_dir():
        raise RunError(f'--out "{out}": there is no folder "{out.absolute().parent}"')
    if out is not None and not os.access(out.absolute().parent, os.W_OK):
        raise RunError(f'--out "{out}": the folder "{out.absolute().parent}" cannot be written')
    # In the run's own folder every evaluation is one of this run, wherever the folder has been moved to.
    if path.exists() and not _is_evaluation(path, {"data": data} if out is None else {"data": data, "run": run_name(run)}):
        raise RunError(f'"{path}" exists and is no evaluation of this run on {data}; choose another --out')
    return path


def run_name(run: RunFolder) -> str:
    """Return what a file calls ``run``."""
    return str(run.path.absolute())


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write all of ``comparison`` as JSON; where that is among a run's own evaluations, the run's report tells of it, too."""
    write_json(path, comparison.as_record())
    run = RunFolder(Path(str(comparison.settings["run"])))
    if path.absolute().parent == run.path / "evaluations":
        leave_report(run, lambda text: print(text, file=sys.stderr))


def print_comparison(comparison: Comparison) -> None:
    """Print the figures as a table, what there is to know about them, and some answers to be read."""
    console = Console(highlight=False, markup=False)
    for part in comparison_words(comparison):
        console.print(part, soft_wrap=isinstance(part, Text) and bool(part.no_wrap))


def comparison_words(comparison: Comparison) -> Iterator[Table | Text]:
    """Yield what ``print_comparison`` prints."""
    table = Table("metric", *comparison.sides, *(["difference"] if comparison.base else []), box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns:
        column.overflow = "fold"  # on a narrow terminal a figure goes on in the next line; cut, it would be another figure
        column.justify = "left" if column is table.columns[0] else "right"
    for name in comparison.adapter.scores:
        cells = [shown(name, side.scores[name].value) for side in comparison.sides.values()]
        difference = comparison.difference(name)
        table.add_row(name, *cells, *([] if difference is None else [shown(name, difference, signed=True)]))
    yield table
    for line in _lines(comparison):
        yield Text(line)
    for metric, why in comparison.left_out.items():
        # Not wrapped: it ends with a line to be copied.
        yield Text(f"{metric}: left out; {why}", no_wrap=True, overflow="ignore")
    for index, question in enumerate(comparison.questions[:SAMPLES] if comparison.adapter.answers else []):
        yield Text(f"\n> {clean(last_said(question.messages))}")
        yield Text(f"  expected  {clean(question.references[0])}")
        for name, side in comparison.sides.items():
            yield Text(f"  {name:<9} {clean(side.answers[index])}")


def shown(metric: str, value: float, signed: bool = False) -> str:
    """Return a metric's value, or a difference between two, as the table shows it."""
    sign = "+" if signed and value > 0 else ""
    if not math.isfinite(value):
        return str(value)
    if metric in AS_PERCENT:
        return f"{sign}{100 * value:.1f}{'' if signed else ' %'}"
    if metric == "perplexity":
        return sign + format_perplexity(value)
    return f"{sign}{value:.{2 if UNITS[metric] == 'of 100' else 4}f}"


def _lines(comparison: Comparison) -> Iterator[str]:
    """Yield what is said below the table."""
    counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in comparison.counts.items() if count)
    seconds = sum(s for side in comparison.sides.values() for s in side.seconds.values())
    yield f"{clean(str(comparison.settings['data']))}: {counts}; {format_seconds(seconds)}"
    warnings: dict[tuple[str, str], list[str]] = {}
    for side_name, side in comparison.sides.items():
        for metric, score in side.scores.items():
            if score.warning:
                warnings.setdefault((metric, score.warning), []).append(side_name)
    for (metric, warning), sides in warnings.items():
        yield f"{metric} ({', '.join(sides)}): {warning}"


def _versions() -> Iterator[tuple[str, str]]:
    yield "qlite", __version__
    for name in (*LIBRARIES, *dict.fromkeys(package for _, package in METRIC_LIBRARIES.values())):
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def _is_evaluation(path: Path, settings: dict[str, str]) -> bool:
    """Return whether ``path`` was written by ``write_comparison`` with these settings among its own."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record["kind"] == KIND and settings.items() <= record["settings"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
