"""Measure a run beside its base: loss, its own answers, multiple choice; as a table, and as JSON with every answer.

python -m qlite.evaluate                                  newest finished run, its own held-out rows
python -m qlite.evaluate runs/mine --data test.jsonl --metrics loss,bleu --rows 200

Rows with the same prompt are one question with several references, and it is asked once. Both columns come from one loaded
model, its adapter off and on. The same command gives the same figures. Another split into batches (another train.micro_batch,
other rows) moves them by rounding: in float32 by less than 0.00001 of them; in bfloat16 (SmolLM2-135M, 8 rows at once or one by
one) a loss of 0.149 by 0.0004, and 2 of 8 greedy answers took another turn where two tokens were as good as equally likely.
"""

import argparse
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from qlite import device
from qlite.calls import called
from qlite.data.dataset import Data
from qlite.data.encode import Encoded
from qlite.data.formats import FORMATS
from qlite.errors import DataError, MachineError, RecipeError
from qlite.formats.peft import WEIGHTS
from qlite.hashes import sha256
from qlite.methods.base import adapters_off, longest_input
from qlite.serving.answer import Sampling, answer_all
from qlite.serving.likelihood import accuracy, log_likelihoods
from qlite.serving.metrics import INSTALL, METRICS, Score, missing_library, require
from qlite.serving.questions import ChoiceQuestion, Placed, Question, ask, ask_choices, encode_rows, read_conversations
from qlite.training.comparison import Comparison, Side, choose_file, comparison_words, print_comparison, run_name, write_comparison
from qlite.training.evaluate import mean_loss, perplexity
from qlite.training.notebook import console_for
from qlite.training.open_run import OpenRun, open_run
from qlite.training.report import Observer
from qlite.training.run_folder import find_run
from qlite.training.shown import Shown
from qlite.training.step import Stepper
from qlite.verb import let_call, run_verb

LOSS, ACCURACY = "loss", "accuracy"
CHOOSABLE = (LOSS, *METRICS, ACCURACY)
HELD_OUT = "held-out"
"""Name of the run's own held-out rows, where a file's would stand."""


def main(argv: list[str]) -> None:
    """Run the command line."""
    args = _parser().parse_args(argv)
    asked = Asked(args.data, args.format, args.metrics, args.rows, args.max_tokens, not args.no_base, args.out)
    with called():
        found = _evaluate(args.run, asked, args.device, is_quiet=False)
        print_comparison(found.comparison)
        write_comparison(found.file, found.comparison)
    print(f"\nwritten to {found.file}")


def evaluate(
    run: str | os.PathLike[str] | None = None,
    *,
    data: str | os.PathLike[str] | None = None,
    metrics: str | Sequence[str] | None = None,
    rows: int | None = None,
    max_tokens: int | None = None,
    base: bool = True,
    device: str = "auto",
    quiet: bool = False,
) -> "Evaluation":
    """Return what ``run`` reaches beside its base, and write it, with every answer, into the run's folder.

    run: what ``train`` has returned, or a run folder; by default the newest finished one under runs/.
    data: rows to measure with, all that data.test of a recipe takes; by default the run's held-out rows. ``rows``: the first so many.
    metrics: some of loss, exact_match, rouge_l, bleu, chrf, accuracy; by default all that the rows have something for.
    max_tokens: of an answer, by default the recipe's train.answer_tokens.
    base: measure the untuned model, too.

    Raises:
        QliteError: there is no such run or metric, or the rows cannot be used.
    """
    named = metrics if metrics is None or isinstance(metrics, str) else ",".join(metrics)
    asked = Asked(None if data is None else os.fspath(data), None, named, rows, max_tokens, base)
    with called():
        found = _evaluate(run, asked, device, quiet)
        try:
            write_comparison(found.file, found.comparison)
        except MachineError as error:
            error.add_note(str(found))  # minutes of work, which are not lost with the file
            raise
        return found


@dataclass(frozen=True)
class Asked:
    """What an evaluation is asked for; None: what the run or its rows suggest."""

    data: str | None
    format: str | None
    metrics: str | None
    rows: int | None
    max_tokens: int | None
    base: bool
    out: Path | None = None


@dataclass(frozen=True, repr=False)
class Evaluation(Shown):
    """What a run has reached, beside its base."""

    comparison: Comparison
    file: Path
    """All of it as JSON."""

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """The values by model, "base" and "adapter", and metric."""
        return {name: {metric: score.value for metric, score in side.scores.items()} for name, side in self.comparison.sides.items()}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from comparison_words(self.comparison)
        if self.file.is_file():
            yield Text(f"\nwritten to {self.file}")


def _evaluate(named: str | os.PathLike[str] | None, asked: Asked, where: str, is_quiet: bool) -> Evaluation:
    if asked.rows is not None and asked.rows < 1:
        raise RecipeError(f"--rows {asked.rows}: should be 1 or more")
    wanted = read_metrics(asked.metrics)
    run = find_run(named)
    recipe = run.recipe()
    if asked.data is None and not (recipe.data.test or recipe.data.held_out_rows):
        raise DataError("this run has held out no rows (data.test, data.held_out_rows); name some to measure with: --data FILE")
    sampling = Sampling(recipe.train.answer_tokens if asked.max_tokens is None else asked.max_tokens)
    data = HELD_OUT if asked.data is None else _absolute(asked.data)
    file = choose_file(run, data, asked.out)
    with console_for(f"qlite evaluate  {run.path}", is_quiet) as console:
        # What is wrong with a file shows before minutes of loading.
        talks = None if asked.data is None else read_given(recipe.data, asked.data, asked.format, asked.rows, console)
        opened = open_run(run, where, console.phase, console.note)
        material = held_out(opened, asked.rows, console) if talks is None else Material.of(talks, opened)
        metrics, left_out = applicable(wanted, material)
        require_room(opened, material, metrics, sampling)
        examination = Examination(opened, material, metrics, sampling, console)
        # Where the base's own weights were trained, they are gone as soon as the trained ones are put into their places.
        base = examination.measure("base") if asked.base and opened.method.trains_base else None
        opened.attach()
        base = examination.of_base() if asked.base and base is None else base
        adapter = examination.measure("adapter")
    settings = {
        "run": run_name(run),
        "adapter_sha256": sha256(run.adapter / WEIGHTS),
        "data": data,
        "first_rows": asked.rows,
        "loss_on": recipe.data.loss_on,
        "decoding": f"greedy, at most {sampling.max_tokens} tokens",
        "base": f"{recipe.base.model}, {recipe.base.bits} bit, {str(opened.base.model.dtype)[6:]}",
        "device": device.describe(opened.device),
    }
    comparison = Comparison(material.counts, settings, material.questions, material.choices, adapter, base, left_out)
    return Evaluation(comparison, file)


def read_metrics(text: str | None) -> list[str] | None:
    """Return the metrics named in ``text``, or None if it is None.

    Raises:
        RecipeError: there is no such metric.
        MachineError: the library that computes it is not installed.
    """
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in CHOOSABLE:
            close = get_close_matches(name, CHOOSABLE, n=1)
            hint = f'did you mean "{close[0]}"?' if close else f"there are: {', '.join(CHOOSABLE)}"
            raise RecipeError(f'--metrics: there is no metric "{name}"; {hint}')
        require(name)
    if not names:
        raise RecipeError(f'--metrics "{text}": names none; there are: {", ".join(CHOOSABLE)}')
    return [name for name in CHOOSABLE if name in names]


# What is measured on


@dataclass(frozen=True)
class Material:
    """What a model is measured on."""

    rows: list[tuple[Encoded, str]]
    """What carries the loss, and where each row stands in the data."""
    questions: list[Question]
    choices: list[ChoiceQuestion]

    @classmethod
    def of(cls, talks: list[Placed], opened: OpenRun, rows: list[tuple[Encoded, str]] | None = None) -> "Material":
        """Return what ``talks`` give to measure; ``rows`` carry the loss, where those are known already."""
        rows = encode_rows(talks, opened.encoder, opened.recipe.train.tokens) if rows is None else rows
        return cls(rows, ask(talks, opened.encoder), ask_choices(talks, opened.encoder))

    @property
    def counts(self) -> dict[str, int]:
        """How much there is of what."""
        return {
            "rows": len(self.rows),
            # A row's first token has nothing before it that could predict it.
            "trained_tokens": sum(int(np.count_nonzero(row.trained[1:])) for row, _ in self.rows),
            "questions": len(self.questions),
            "references": sum(len(question.references) for question in self.questions),
            "questions_with_choices": len(self.choices),
        }


def read_given(data: Data, path: str, format: str | None, count: int | None, console: Observer) -> list[Placed]:
    """Return the first ``count`` conversations of ``path``, read as a test source of the recipe's; ``format``: in that one instead.

    Raises:
        DataError: the source or a row cannot be used; with file and line.
    """
    data = replace(data, test=path, format=format or data.format)
    (source,) = data.sources("test")
    each = islice(read_conversations(source, "--data", data.bad_rows == "skip", console.phase, console.note), count)
    talks = [talk.with_system(data.system) for talk in each]
    if not talks:
        raise DataError(f"--data: {path} has no row that fits its format; see data.format and data.columns")
    return talks


def held_out(opened: OpenRun, count: int | None, console: Observer) -> Material:
    """Return the run's own held-out rows, or the first ``count`` of them.

    Raises:
        DataError: it has none, or what it was trained on cannot be read any more.
    """
    data, tokens = opened.recipe.data, opened.recipe.train.tokens
    part = "test" if data.test else "train"
    loaded = data.load(opened.base.tokenizer, tokens, lambda _: None, console.phase, opened.encoder)
    opened.note_other_rows(loaded, console.note)
    test = loaded.test.take(np.arange(min(count or len(loaded.test), len(loaded.test))))
    rows = [(test[index], test.where(index)) for index in range(len(test))]
    # The text behind them is read again: what is kept of them are ids alone. In the order of the rows, which is not the file's.
    places = dict.fromkeys(zip(test.store.source[test.row].tolist(), (where for _, where in rows), strict=True))
    for number, source in enumerate(data.sources(part)):
        for talk in read_conversations(source, f"data.{part}", data.bad_rows == "skip", console.phase):
            if (number, talk.where) in places:
                places[number, talk.where] = talk.with_system(data.system)
    return Material.of([talk for talk in places.values() if talk is not None], opened, rows)


def applicable(asked: list[str] | None, material: Material) -> tuple[list[str], dict[str, str]]:
    """Return the metrics to compute, in order, and why the others of those that were meant are left out.

    Raises:
        DataError: a metric is asked for by name that the rows have nothing for.
    """
    lacking = {ACCURACY: None if material.choices else 'no row has choices (format "choice": question, choices, answer)'}
    lacking |= dict.fromkeys(METRICS, None if material.questions else "the rows are raw text, which asks nothing")
    lacking[LOSS] = None if material.counts["trained_tokens"] else "no row has a token that carries a loss (data.loss_on)"
    for name in asked or ():
        if lacking[name]:
            raise DataError(f"--metrics {name}: {lacking[name]}; leave it out, or give other rows with --data")
    chosen = [name for name in asked or CHOOSABLE if not lacking[name]]
    missing = {name: f"needs {library}, which is not installed: {INSTALL}" for name in chosen if (library := missing_library(name))}
    chosen = [name for name in chosen if name not in missing]
    if not chosen:
        raise DataError(f"there is nothing to measure: {lacking[LOSS]}; give other rows with --data")
    return chosen, missing


def require_room(opened: OpenRun, material: Material, metrics: list[str], sampling: Sampling) -> None:
    """Raise DataError, naming the row, if one is longer than the model was made to read."""
    limit = longest_input(opened.base.model, opened.method.positions) or math.inf
    for row, where in material.rows if LOSS in metrics else ():
        if len(row) > limit:
            raise DataError(f"{where}: has {len(row)} tokens, and the model reads {limit} at most; shorten the row, or remove it")
    for question in material.questions if any(name in METRICS for name in metrics) else ():
        if len(question.prompt) + sampling.max_tokens > limit:
            raise DataError(
                f"{question.where}: its prompt has {len(question.prompt)} tokens, and with an answer of --max-tokens {sampling.max_tokens} "
                f"that is more than the {limit} the model reads; lower --max-tokens, or shorten or remove the row"
            )
    for question in material.choices if ACCURACY in metrics else ():
        longest = max(len(continuation.read) for continuation in question.continuations)
        if longest > limit:
            raise DataError(f"{question.where}: has {longest} tokens, and the model reads {limit} at most; shorten the row, or remove it")


# Measuring


@dataclass(frozen=True)
class Examination:
    """What is measured, on what, with which model."""

    opened: OpenRun
    material: Material
    metrics: list[str]
    sampling: Sampling
    console: Observer

    def of_base(self) -> Side:
        """Return what the base reaches: the same model with its adapter off."""
        with adapters_off(self.opened.base.model):
            return self.measure("base")

    def measure(self, name: str) -> Side:
        """Return what the model reaches as it stands; ``name`` is for the console."""
        side = Side()
        stages = {"loss": self._loss, "answers": self._answers, "choices": self._choices}
        wanted = {LOSS: "loss", ACCURACY: "choices"}
        for stage in dict.fromkeys(wanted.get(metric, "answers") for metric in self.metrics):
            start = time.perf_counter()
            stages[stage](side, partial(self.console.phase, f"{name}: {stage}"))
            side.seconds[stage] = time.perf_counter() - start
        return side

    def _loss(self, side: Side, phase: Callable[[int, int], None]) -> None:
        recipe, model = self.opened.recipe, self.opened.base.model
        # Made here: the head that it calls is the one that stands in the model now, the base's own or an adapted one.
        stepper = Stepper(model, recipe.method, recipe.memory.loss_chunk, self.opened.device)
        stepper.tell = self.console.note
        rows = [row for row, _ in self.material.rows]
        loss, tokens = mean_loss(stepper, rows, recipe.train.micro_batch, self.opened.encoder.pad_id, phase)
        signature = f"mean over {tokens} tokens, loss_on:{recipe.data.loss_on}"
        side.scores |= {"loss": Score(loss, signature), "perplexity": Score(perplexity(loss), f"exp(loss), {signature}")}

    def _answers(self, side: Side, phase: Callable[[int, int], None]) -> None:
        questions = self.material.questions
        phase(0, len(questions))
        prompts = [question.prompt for question in questions]
        told = partial(_turned, phase, len(prompts))
        side.answers = [
            text.strip()
            for text in answer_all(self.opened.base.model, self.opened.encoder, prompts, self.sampling, told, self.console.note)
        ]
        references = [question.references for question in questions]
        side.scores |= {name: METRICS[name](side.answers, references) for name in self.metrics if name in METRICS}

    def _choices(self, side: Side, phase: Callable[[int, int], None]) -> None:
        questions = self.material.choices
        each = [continuation for question in questions for continuation in question.continuations]
        phase(0, len(each))
        told = partial(_turned, phase, len(each))
        sums = iter(log_likelihoods(self.opened.base.model, each, self.opened.encoder.pad_id, self.opened.recipe.memory.loss_chunk, told))
        side.likelihoods = [[next(sums) for _ in question.continuations] for question in questions]
        found = accuracy(side.likelihoods, [question.choices for question in questions], [question.right for question in questions])
        signature = f"likeliest of the choices over {len(questions)} questions, end token left off"
        side.scores["accuracy"] = Score(found.by_sum, f"{signature}, sum of log-probabilities")
        side.scores["accuracy_per_character"] = Score(found.by_character, f"{signature}, sum divided by characters")


def _turned(phase: Callable[[int, int], None], total: int, done: int) -> None:
    phase(done, total)


def _absolute(path: str) -> str:
    try:
        return str(Path(path).expanduser().resolve(strict=True))
    except (OSError, RuntimeError):  # a pattern, a hub data set, or a file that is missing, which is said when it is read
        return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qlite.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", help="run folder; without it the newest finished one under runs/")
    parser.add_argument("--data", help="rows to measure with: all that data.test of a recipe takes; by default the run's held-out rows")
    parser.add_argument("--format", choices=("auto", *FORMATS), help="schema of those rows; by default the recipe's")
    parser.add_argument("--metrics", help=f"some of {','.join(CHOOSABLE)}; by default all that the rows have something for")
    parser.add_argument("--rows", type=int, help="take only the first so many rows")
    parser.add_argument("--max-tokens", type=int, help="longest answer in tokens; by default the recipe's train.answer_tokens")
    parser.add_argument("--no-base", action="store_true", help="measure the adapter alone")
    parser.add_argument("--out", type=Path, help="JSON file to write; by default evaluations/NAME.json inside the run's folder")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    return parser


let_call(__name__, evaluate)

if __name__ == "__main__":
    run_verb(main)
