"""A whole run small enough for a test: a tiny Llama folder, rows of text, and the recipe over both."""

import json
import random
from pathlib import Path

from qlite.recipe.read import build_recipe
from qlite.recipe.schema import Recipe
from qlite.training.open_run import OpenRun, open_run
from qlite.training.report import EvalReport, StepReport
from qlite.training.run import train
from qlite.training.run_folder import RunFolder
from tests.tiny import tiny_llama
from tests.tiny_tokenizer import VOCAB_SIZE, tiny_tokenizer

STEPS = 6
ANSWERS = {"exact_match_rows": 3, "answer_tokens": 4}


def save_tiny_base(folder: Path) -> Path:
    """Write a tiny Llama with its tokenizer as a Hugging Face folder."""
    tiny_llama(vocab_size=VOCAB_SIZE).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_rows(path: Path, count: int, seed: int) -> Path:
    """Write ``count`` rows: a word, and the word backwards."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("abcdef", k=chance.randint(2, 6))) for _ in range(count)]
    path.write_text("".join(json.dumps({"prompt": word, "completion": word[::-1]}) + "\n" for word in words))
    return path


def tiny_tables(folder: Path, **changes: dict) -> dict:
    """Return the tables of a recipe over files in ``folder``, made if missing; ``changes`` go over single keys of tables."""
    if not (folder / "base").exists():
        save_tiny_base(folder / "base")
        save_rows(folder / "train.jsonl", 40, seed=0)
        save_rows(folder / "test.jsonl", 7, seed=1)
    tables = {
        "base": {"model": str(folder / "base"), "bits": 4},
        "method": {"rank": 4, "dropout": 0.1},
        "optimizer": {"name": "adamw8bit", "lr": 1e-2},
        "schedule": {"name": "cosine", "warmup_steps": 1},
        "data": {"train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl")},
        "train": {"steps": STEPS, "micro_batch": 2, "accumulation": 3, "tokens": 64, "eval_every": 3, **ANSWERS},
        "memory": {"plan": "off"},  # a second or more a run; tests/training/test_forecast.py and test_planning.py are about it
        "parallel": {"device": "cpu", "threads": 1},
        "output": {"dir": str(folder / "run"), "save_every": 2},
    }
    for table, keys in changes.items():
        is_another_method = table == "method" and "name" in keys  # LoRA's keys are none of its
        tables[table] = {**({} if is_another_method else tables.get(table, {})), **keys}
    return tables


def tiny_recipe(folder: Path, **changes: dict) -> Recipe:
    """Return ``tiny_tables`` as a recipe."""
    return build_recipe(tiny_tables(folder, **changes), "tiny.toml")


class Watcher:
    """An observer that remembers, and stops the run after step ``stop_after`` as Ctrl-C would."""

    def __init__(self, stop_after: int | None = None):
        self.stop_after = stop_after
        self.notes: list[str] = []
        self.steps: list[StepReport] = []
        self.evaluations: list[EvalReport] = []
        self.answers: list = []
        self.samples: list = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def phase(self, name: str, done: int, total: int) -> None: ...

    def step(self, report: StepReport) -> None:
        self.steps.append(report)
        if report.step == self.stop_after:
            raise KeyboardInterrupt

    def evaluated(self, report: EvalReport) -> None:
        self.evaluations.append(report)

    def answered(self, report) -> None:
        self.answers.append(report)

    def sampled(self, report) -> None:
        self.samples.append(report)


def run(recipe: Recipe, stop_after: int | None = None) -> Watcher:
    """Train ``recipe`` in this process; return what was seen. An asked-for stop is not raised further."""
    watcher = Watcher(stop_after)
    try:
        train(recipe, RunFolder(Path(recipe.output.dir)), watcher)
    except KeyboardInterrupt:
        assert stop_after is not None
    return watcher


def opened_run(folder: Path) -> OpenRun:
    """Open the finished run of ``tiny_recipe(folder)`` on the CPU, its adapter on."""
    opened = open_run(RunFolder(folder / "run"), "cpu", lambda *_: None)
    opened.attach()
    return opened
