"""Every method of recipes/baselines on the same rows for the same steps: what it trains, holds, costs and reaches, in one table.

    python tools/methods_table.py ../shared/data --out build/methods     # SmolLM2-135M on E2E and snips; about two hours on two cores
    python tools/methods_table.py --recipe recipes/quickstart.toml       # on the rows of one recipe

A row of the table is a file of recipes/baselines: its [method], its [optimizer] and the base's bits; rows, steps and base are the task's.
So a new method is in the table as soon as it has a recipe. Each run is one like any other, under --out, and each is measured in a process
of its own; what is finished is not done again, and what was made with other settings is refused before anything is trained. Without
--only all methods are taken, with it those named. A recipe's relative paths are, as always, of the folder in which this is called.

Time for a token: greedy decoding with a cache after 32 random tokens, the adapter on and off in turns, in one process; 1.00 is the base's.
Of full training and GaLore, whose base is gone, it is not told: their model has the base's shape. The share is of the base's numbers,
in whatever bits they are stored, a tensor that is embedding and head once. Losses are of the questions that are answered, too. Of E2E
and snips these are taken evenly from the whole test file, in which neighbours are alike; E2E's with all their references.
The table is written as methods.md, its figures as methods.json, and methods.png where matplotlib is there.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from latency import answer, random_ids
from parameter_counts import dense_count
from pictures import open_pyplot

from qlite.errors import MachineError, RecipeError, RunError
from qlite.evaluate import evaluate
from qlite.files import write_json, write_text
from qlite.methods.base import adapters_off, is_itself_trained
from qlite.recipe.keys import toml_value
from qlite.recipe.read import parse_toml, read_recipe
from qlite.training.open_run import open_run
from qlite.training.run_folder import RunFolder
from qlite.units import format_bytes, format_count
from qlite.verb import run_verb

ROOT = Path(__file__).parents[1]
BASELINES = ROOT / "recipes" / "baselines"
ROUNDS, PROMPT, NEW = 5, 32, 16
BATCHES = (1, 16)


@dataclass(frozen=True)
class Task:
    """Rows to train on, rows to measure on, and what is measured."""

    name: str
    recipe: Path
    """Of which base, rows and sizes are taken."""
    changes: dict[str, object]
    test: str
    metrics: tuple[str, ...]
    rows: int | None
    """The first held-out rows that are answered; None: all of ``test``."""


@dataclass(frozen=True)
class Planned:
    """One method on one task with one seed, and where it is kept."""

    method: str
    task: Task
    seed: int
    out: Path
    is_timed: bool
    """Its answers are timed: once for each method, for rows and seed are nothing to a token's time."""

    @property
    def run(self) -> Path:
        """Its run folder."""
        return self.out / f"{self.method}-{self.task.name}-{self.seed}"

    @property
    def recipe(self) -> Path:
        """The recipe that it is trained by."""
        return self.out / f"{self.run.name}.toml"

    @property
    def settings(self) -> Path:
        """What its figures are made with."""
        return self.out / f"{self.run.name}.settings.json"

    @property
    def figures(self) -> Path:
        """What was measured."""
        return self.run / "figures.json"


def main(argv: list[str]) -> None:
    """Train, measure and print; or, with --one, measure a single finished run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path, help="the folder that has e2e_nlg and snips_nlu")
    parser.add_argument("--out", type=Path, default=Path("build/methods"))
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each run")
    parser.add_argument("--rows", type=int, default=50, help="held-out questions that each run answers")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each method and task")
    parser.add_argument("--tasks", nargs="+", choices=("e2e", "snips"), default=["e2e", "snips"], help="one of the two, or both")
    parser.add_argument("--only", nargs="+", help="names of files in recipes/baselines, without their ending")
    parser.add_argument("--recipe", type=Path, help="take base, rows and sizes of this recipe, in the place of E2E and snips")
    parser.add_argument("--one", nargs=3, metavar=("RUN", "TEST", "METRICS"), help=argparse.SUPPRESS)
    parser.add_argument("--timed", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        measure_one(Path(args.one[0]), args.one[1], args.one[2].split(","), None if args.one[1] else args.rows, args.timed)
        return
    if (args.data is None) == (args.recipe is None):
        raise RecipeError("give the folder with e2e_nlg and snips_nlu, or a --recipe")
    if bad := [f"--{key} {getattr(args, key)}: should be 1 or more" for key in ("steps", "rows", "seeds") if getattr(args, key) < 1]:
        raise RecipeError(bad)
    names = sorted(path.stem for path in BASELINES.glob("*.toml"))
    if unknown := set(args.only or ()) - set(names):
        raise RecipeError(f"--only {' '.join(sorted(unknown))}: recipes/baselines has {', '.join(names)}")
    out = args.out.resolve()
    own = args.recipe and Task(args.recipe.stem, args.recipe.resolve(), {}, "", ("loss", "exact_match", "rouge_l"), args.rows)
    tasks = [own] if own else [task for task in real_tasks(args.data.resolve(), out, args.rows) if task.name in args.tasks]
    planned = [
        Planned(name, task, seed, out, is_timed=task is tasks[0] and seed == 0)
        for name in dict.fromkeys(args.only or names)
        for task in tasks
        for seed in range(args.seeds)
    ]
    prepare(planned, args.steps)
    found = []
    for each in planned:
        print(f"{each.method}, {each.task.name}, seed {each.seed} ...", flush=True)
        figures = one_run(each)
        # A narrower call than the one before: it may have been timed on another task.
        figures["token"] = figures["token"] or (timed_before(out, each.method) if each.is_timed else {})
        found.append({"method": each.method, "task": each.task.name, "seed": each.seed, **figures})
        write_json(out / "methods.json", found)
    text = table(found, tasks)
    write_text(out / "methods.md", text)
    print(text)
    draw(found, tasks, out / "methods.png")


def timed_before(out: Path, method: str) -> dict:
    """Return the time of a token that was measured in another run of ``method``; empty where there is none."""
    others = (json.loads(path.read_text(encoding="utf-8"))["token"] for path in sorted(out.glob(f"{method}-*/figures.json")))
    return next((token for token in others if token), {})


def prepare(planned: list[Planned], steps: int) -> None:
    """Write the recipe of every run, and beside it what its figures are made with.

    Raises:
        RunError: a run is there that was made with something else; all of them at once, and nothing is written.
        RecipeError: one of the recipes is wrong.
    """
    wanted = [{"rows": each.task.rows, "test": each.task.test, "recipe": recipe_text(each, steps)} for each in planned]
    refused = [line for each, settings in zip(planned, wanted, strict=True) if (line := _other_settings(each, settings))]
    if refused:
        more = f" (and {len(refused) - 5} more)" if len(refused) > 5 else ""
        raise RunError("\n".join(refused[:5]) + f"{more}\nchoose another --out, or delete these runs and their settings")
    for each, settings in zip(planned, wanted, strict=True):
        write_text(each.recipe, settings["recipe"])
        read_recipe(each.recipe)  # what is wrong with it is said now
        write_json(each.settings, settings)


def _other_settings(planned: Planned, settings: dict) -> str:
    """Return in words what a run that is there was made with, where that is not ``settings``; empty where it is, or there is none."""
    if not planned.run.exists():
        return ""
    if not planned.settings.is_file():
        return f"{planned.run}: does not say what it was made with"
    before = json.loads(planned.settings.read_text(encoding="utf-8"))
    told = [f"{key} {before[key]}, now {settings[key]}" for key in ("rows", "test") if before[key] != settings[key]]
    old, new = (each["recipe"].splitlines() for each in (before, settings))
    gone, come = [line for line in old if line not in new], [line for line in new if line not in old]
    told += [f"{', '.join(gone) or 'nothing'}, now {', '.join(come) or 'nothing'}"] if old != new else []
    return f"{planned.run}: was made with {'; '.join(told)}" if told else ""


def one_run(planned: Planned) -> dict:
    """Train and measure what is ``planned``, each in a process of its own; return the figures. What is there is not done again."""
    if not planned.figures.exists():
        task, run = planned.task, planned.run
        _run([sys.executable, "-m", "qlite.train", str(planned.recipe)], run)
        timed = ["--timed"] if planned.is_timed else []
        rows = ["--rows", str(task.rows)] if task.rows else []
        _run([sys.executable, __file__, "--one", str(run), task.test, ",".join(task.metrics), *rows, *timed], run)
    return json.loads(planned.figures.read_text(encoding="utf-8"))


def _run(command: list[str], run: Path) -> None:
    log = run.with_suffix(".log")
    # Not cwd=ROOT: a recipe's relative paths are of the folder in which the tool was called.
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    with log.open("a", encoding="utf-8") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False, env=env).returncode
    if code:
        raise MachineError(f"{run.name}: ended with exit code {code}; what it said is in {log}")


def recipe_text(planned: Planned, steps: int) -> str:
    """Return the recipe of what is ``planned``: method, optimizer and bits are the baseline's, all else the task's."""
    own, common = parse_toml(BASELINES / f"{planned.method}.toml"), parse_toml(planned.task.recipe)
    tables = {**common, **{key: own[key] for key in ("method", "optimizer") if key in own}}
    bits = {key: value for key, value in own["base"].items() if key.endswith("bits")}
    tables["base"] = {**{key: value for key, value in common["base"].items() if not key.endswith("bits")}, **bits}
    if planned.task.test:
        tables["data"].pop("test", None)  # measured afterwards, as many rows as are asked for
    packing = own.get("train", {}).get("packing", False)
    changes = {"train.steps": steps, "train.seed": planned.seed, "schedule.warmup_steps": max(1, steps // 10)}
    changes |= {"train.exact_match_rows": 0, "train.eval_every": 0, "train.packing": packing, "output.save_every": 0}
    changes |= {"output.dir": str(planned.run), **planned.task.changes}
    for key, value in changes.items():
        table, _, leaf = key.partition(".")
        tables.setdefault(table, {})[leaf] = value
    lines = [line for table, keys in tables.items() for line in _toml([table], keys)]
    return "\n".join(lines) + "\n"


def _toml(place: list[str], keys: dict) -> list[str]:
    plain = [f"{key} = {toml_value(value)}" for key, value in keys.items() if not isinstance(value, dict)]
    inner = [line for key, value in keys.items() if isinstance(value, dict) for line in _toml([*place, key], value)]
    return ["", f"[{'.'.join(place)}]", *plain, *inner]


def measure_one(folder: Path, test: str, metrics: list[str], rows: int | None, is_timed: bool) -> None:
    """Write the figures of the finished run in ``folder`` into it, a token's time where ``is_timed``."""
    run = RunFolder(folder)
    result, overview = run.result, json.loads((folder / "overview.json").read_text(encoding="utf-8"))
    found = evaluate(folder, data=test or None, metrics=metrics, rows=rows, base=False, quiet=True).comparison
    scores = {name: score.value for name, score in found.adapter.scores.items()}
    opened = open_run(run, "cpu", lambda *_: None)
    size = dense_count(opened.base.model)
    opened.attach()
    steps = [each["seconds"] for each in run.records.read() if each["kind"] == "step"]
    figures = {
        "trained": overview["trained_parameters"],
        "of": size,
        "planned": result["planned_tensor_bytes"],
        "measured": result["peak_tensor_bytes"],
        "process": result["peak_memory_bytes"],
        "step_seconds": statistics.median(steps),
        "scores": scores,
        "token": {str(batch): token_time(opened.base.model, batch) for batch in BATCHES} if is_timed else {},
    }
    write_json(folder / "figures.json", figures)


def token_time(model: torch.nn.Module, batch: int) -> dict[str, float] | None:
    """Return the median seconds for a new token, and the ratio to the base's in the same rounds: median, lowest, highest.

    None where the base is gone.
    """
    if is_itself_trained(model):
        return None
    ids = random_ids(model, batch, PROMPT, torch.device("cpu"))
    own, base = [], []
    for _ in range(ROUNDS + 1):
        own.append(answer(model, ids, NEW).token_seconds)
        with adapters_off(model):
            base.append(answer(model, ids, NEW).token_seconds)
    ratios = [a / b for a, b in zip(own[1:], base[1:], strict=True)]
    return {"seconds": statistics.median(own[1:]), "ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def table(found: list[dict], tasks: list[Task]) -> str:
    """Return the table, a method a line; of several seeds the mean and, behind it, the standard deviation."""
    metrics = [(task.name, metric) for task in tasks for metric in task.metrics]
    head = ["method", "trained", "share", "planned", "measured", "step, s", *(f"token x, batch {batch}" for batch in BATCHES)]
    head += [f"{task} {metric}" for task, metric in metrics]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name in dict.fromkeys(each["method"] for each in found):
        own = [each for each in found if each["method"] == name]
        first = own[0]
        cells = [name, format_count(first["trained"]), f"{first['trained'] / first['of']:.3%}"]
        cells += [format_bytes(max(each[key] for each in own)) if first[key] else "-" for key in ("planned", "measured")]
        cells.append(f"{statistics.median(each['step_seconds'] for each in own):.2f}")
        cells += [_ratio(own, str(batch)) for batch in BATCHES]
        cells += [_spread([each["scores"][metric] for each in own if each["task"] == task]) for task, metric in metrics]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _ratio(own: list[dict], batch: str) -> str:
    timed = [time["ratio"] for each in own if (time := each["token"].get(batch))]
    return f"{timed[0]:.2f}" if timed else "-"


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}" if values else "-"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def draw(found: list[dict], tasks: list[Task], path: Path) -> None:
    """Write the table as a picture: above what the methods reach, below what they cost, those of the lowest loss first.

    Raises:
        MachineError: there is no matplotlib.
    """
    pyplot = open_pyplot()
    own = {name: [each for each in found if each["method"] == name] for name in dict.fromkeys(each["method"] for each in found)}
    names = sorted(own, key=lambda name: statistics.mean(each["scores"]["loss"] for each in own[name]), reverse=True)
    quality = {
        f"{task.name}: {metric}": {name: [each["scores"][metric] for each in own[name] if each["task"] == task.name] for name in names}
        for task in tasks
        for metric in task.metrics
    }
    cost = {
        "trained, share of the base": {name: [each["trained"] / each["of"] for each in own[name]] for name in names},
        "tensors at most, GiB": {name: [each["measured"] / 2**30 for each in own[name] if each["measured"]] for name in names},
        "seconds a step": {name: [each["step_seconds"] for each in own[name]] for name in names},
    }
    for batch in map(str, BATCHES):
        ratios = {name: [time["ratio"] for each in own[name] if (time := each["token"].get(batch))] for name in names}
        cost[f"time for a token to the base's, batch of {batch}"] = ratios
    cost = {title: values for title, values in cost.items() if any(values.values())}
    columns = max(len(quality), len(cost))
    size = (3.4 * columns, 0.56 * len(names) + 2)
    figure, axes = pyplot.subplots(2, columns, figsize=size, layout="constrained", sharey=True, squeeze=False)
    for row, panels in zip(axes, (quality, cost), strict=True):
        for axis in row[len(panels) :]:
            axis.set_visible(False)
        for axis, (title, values) in zip(row, panels.items(), strict=False):
            for place, each in enumerate(values.values()):
                axis.plot(each, [place] * len(each), "o", color="tab:blue", markersize=5, alpha=0.7)
            axis.set(title=title, yticks=range(len(names)), yticklabels=names)
            axis.title.set_fontsize(9)
            axis.grid(alpha=0.3)
    axes[1][0].set_xscale("log")
    figure.savefig(path, dpi=120)
    print(path)


def real_tasks(data: Path, out: Path, rows: int) -> list[Task]:
    """Return E2E and snips with ``rows`` questions each, their rows written where need be."""
    e2e = data / "e2e_nlg"
    for path in (e2e / "lora-paper-valid.txt", e2e / "lora-paper-test.txt", data / "snips_nlu"):
        if not path.exists():
            raise RecipeError(f'there is no "{path}"; README says where the data is from')
    subprocess.run([sys.executable, str(ROOT / "tools" / "snips_rows.py"), str(data / "snips_nlu"), "--out", str(out)], check=True)
    sizes = {"train.micro_batch": 8, "train.accumulation": 1}
    tests = {"e2e": out / f"e2e_test_{rows}.txt", "snips": out / f"snips_test_{rows}.jsonl"}
    write_text(tests["e2e"], spread_lines(e2e / "lora-paper-test.txt", rows, lambda line: line.split("||")[0]))
    write_text(tests["snips"], spread_lines(out / "snips_test.jsonl", rows, lambda line: line))
    return [
        Task(
            "e2e",
            ROOT / "recipes" / "e2e.toml",
            {"data.train": str((e2e / "lora-paper-valid.txt").resolve()), "train.answer_tokens": 64, **sizes},
            str(tests["e2e"]),
            ("loss", "bleu", "rouge_l"),
            None,
        ),
        Task(
            "snips",
            ROOT / "recipes" / "snips.toml",
            {
                "data.train": str((out / "snips_train.jsonl").resolve()),
                "train.answer_tokens": 64,
                **sizes,
            },
            str(tests["snips"]),
            ("loss", "exact_match"),
            None,
        ),
    ]


def spread_lines(path: Path, count: int, question: Callable[[str], str]) -> str:
    """Return the lines of ``count`` questions of ``path``, or of all, evenly from its beginning to its end."""
    groups: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        groups.setdefault(question(line), []).append(line)
    names, few = list(groups), min(count, len(groups))
    return "".join(line for i in range(few) for line in groups[names[i * len(names) // few]])


if __name__ == "__main__":
    run_verb(main)
