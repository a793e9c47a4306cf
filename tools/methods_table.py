"""Every method of recipes/baselines on the same rows for the same steps: what it trains, holds, costs and reaches, in one table.

    python tools/methods_table.py ../shared/data --out build/methods     # SmolLM2-135M on E2E and snips; about two hours on two cores
    python tools/methods_table.py --recipe recipes/quickstart.toml       # on the rows of one recipe

A row of the table is a file of recipes/baselines: its [method], its [optimizer] and the base's bits; rows, steps and base are the task's.
So a new method is in the table as soon as it has a recipe. Each run is one like any other, under --out, and each is measured in a process
of its own; what is finished is not done again. Without --only all methods are taken, with it those named.

Time for a token: greedy decoding with a cache after 32 random tokens, the adapter on and off in turns, in one process; 1.00 is the base's.
Of full training and GaLore, whose base is gone, it is not told: their model has the base's shape.
"""

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from latency import answer, random_ids

from qlite.errors import MachineError, RecipeError
from qlite.evaluate import evaluate
from qlite.files import write_json, write_text
from qlite.methods.base import adapters_off
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
    rows: int
    """Held-out rows that are answered."""


def main(argv: list[str]) -> None:
    """Train, measure and print; or, with --one, measure a single finished run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path, help="the folder that has e2e_nlg and snips_nlu")
    parser.add_argument("--out", type=Path, default=Path("build/methods"))
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each run")
    parser.add_argument("--rows", type=int, default=50, help="held-out rows that each run answers")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each method and task")
    parser.add_argument("--only", nargs="+", help="names of files in recipes/baselines, without their ending")
    parser.add_argument("--recipe", type=Path, help="take base, rows and sizes of this recipe, in the place of E2E and snips")
    parser.add_argument("--one", nargs=3, metavar=("RUN", "TEST", "METRICS"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        measure_one(Path(args.one[0]), args.one[1], args.one[2].split(","), args.rows)
        return
    if (args.data is None) == (args.recipe is None):
        raise RecipeError("give the folder with e2e_nlg and snips_nlu, or a --recipe")
    names = sorted(path.stem for path in BASELINES.glob("*.toml"))
    if unknown := set(args.only or ()) - set(names):
        raise RecipeError(f"--only {' '.join(sorted(unknown))}: recipes/baselines has {', '.join(names)}")
    own = args.recipe and Task(args.recipe.stem, args.recipe, {}, "", ("exact_match", "rouge_l"), args.rows)
    tasks = [own] if own else real_tasks(args.data, args.out, args.rows)
    found = []
    for name in args.only or names:
        for task in tasks:
            for seed in range(args.seeds):
                print(f"{name}, {task.name}, seed {seed} ...", flush=True)
                found.append({"method": name, "task": task.name, "seed": seed, **one_run(name, task, seed, args.steps, args.out)})
                write_json(args.out / "methods.json", found)
    text = table(found, tasks)
    write_text(args.out / "methods.md", text)
    print(text)


def one_run(name: str, task: Task, seed: int, steps: int, out: Path) -> dict:
    """Train ``name`` on ``task`` and measure it, each in a process of its own; return the figures. What is there is not done again."""
    run = out / f"{name}-{task.name}-{seed}"
    figures = run / "figures.json"
    if figures.exists():
        return json.loads(figures.read_text(encoding="utf-8"))
    recipe = recipe_of(name, task, seed, steps, run, out)
    _run([sys.executable, "-m", "qlite.train", str(recipe)], run)
    _run([sys.executable, __file__, "--one", str(run), task.test, ",".join(task.metrics), "--rows", str(task.rows)], run)
    return json.loads(figures.read_text(encoding="utf-8"))


def _run(command: list[str], run: Path) -> None:
    log = run.with_suffix(".log")
    with log.open("a", encoding="utf-8") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False, cwd=ROOT).returncode
    if code:
        raise MachineError(f"{run.name}: ended with exit code {code}; what it said is in {log}")


def recipe_of(name: str, task: Task, seed: int, steps: int, run: Path, out: Path) -> Path:
    """Write the recipe of ``name`` on ``task`` and return its path: method, optimizer and bits are the baseline's, all else the task's."""
    own, common = parse_toml(BASELINES / f"{name}.toml"), parse_toml(task.recipe)
    tables = {**common, **{key: own[key] for key in ("method", "optimizer") if key in own}}
    bits = {key: value for key, value in own["base"].items() if key.endswith("bits")}
    tables["base"] = {**{key: value for key, value in common["base"].items() if not key.endswith("bits")}, **bits}
    packing = own.get("train", {}).get("packing", False)
    changes = {"train.steps": steps, "train.seed": seed, "schedule.warmup_steps": max(1, steps // 10), "output.dir": str(run.resolve())}
    changes |= {"train.exact_match_rows": 0, "train.eval_every": 0, "train.packing": packing, "output.save_every": 0, **task.changes}
    for key, value in changes.items():
        table, _, leaf = key.partition(".")
        tables.setdefault(table, {})[leaf] = value
    lines = [line for table, keys in tables.items() for line in _toml([table], keys)]
    path = out / f"{run.name}.toml"
    write_text(path, "\n".join(lines) + "\n")
    read_recipe(path)  # what is wrong with it is said now
    return path


def _toml(place: list[str], keys: dict) -> list[str]:
    plain = [f"{key} = {toml_value(value)}" for key, value in keys.items() if not isinstance(value, dict)]
    inner = [line for key, value in keys.items() if isinstance(value, dict) for line in _toml([*place, key], value)]
    return ["", f"[{'.'.join(place)}]", *plain, *inner]


def measure_one(folder: Path, test: str, metrics: list[str], rows: int) -> None:
    """Write the figures of the finished run in ``folder`` into it."""
    run = RunFolder(folder)
    result, overview = run.result, json.loads((folder / "overview.json").read_text(encoding="utf-8"))
    found = evaluate(folder, data=test or None, metrics=metrics, rows=rows, base=False, quiet=True).comparison
    scores = {name: score.value for name, score in found.adapter.scores.items()}
    opened = open_run(run, "cpu", lambda *_: None)
    size = opened.base.model.num_parameters()
    opened.attach()
    steps = [each["seconds"] for each in run.records.read() if each["kind"] == "step"]
    figures = {
        "trained": overview["trained_parameters"],
        "of": size,
        "planned": result["planned_tensor_bytes"],
        "measured": result["peak_tensor_bytes"],
        "process": result["peak_memory_bytes"],
        "step_seconds": statistics.median(steps),
        "held_out_loss": result["eval_loss"],
        "scores": scores,
        "token": {str(batch): token_time(opened.base.model, batch) for batch in BATCHES},
    }
    write_json(folder / "figures.json", figures)


def token_time(model: torch.nn.Module, batch: int) -> dict[str, float] | None:
    """Return the median seconds for a new token, and the ratio to the base's in the same rounds: median, lowest, highest."""
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
    return f"{statistics.median(each['token'][batch]['ratio'] for each in own):.2f}" if own[0]["token"][batch] else "-"


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}" if values else "-"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def real_tasks(data: Path, out: Path, rows: int) -> list[Task]:
    """Return E2E and snips, their rows written where need be."""
    e2e = data / "e2e_nlg"
    for path in (e2e / "lora-paper-valid.txt", e2e / "lora-paper-test.txt", data / "snips_nlu"):
        if not path.exists():
            raise RecipeError(f'there is no "{path}"; README says where the data is from')
    subprocess.run([sys.executable, str(ROOT / "tools" / "snips_rows.py"), str(data / "snips_nlu"), "--out", str(out)], check=True)
    sizes = {"train.micro_batch": 8, "train.accumulation": 1}
    return [
        Task(
            "e2e",
            ROOT / "recipes" / "e2e.toml",
            {"data.train": str((e2e / "lora-paper-valid.txt").resolve()), "train.answer_tokens": 64, **sizes},
            str((e2e / "lora-paper-test.txt").resolve()),
            ("bleu", "rouge_l"),
            rows,
        ),
        Task(
            "snips",
            ROOT / "recipes" / "snips.toml",
            {
                "data.train": str((out / "snips_train.jsonl").resolve()),
                "data.test": str((out / "snips_test.jsonl").resolve()),
                "train.answer_tokens": 64,
                **sizes,
            },
            "",
            ("exact_match",),
            rows,
        ),
    ]


if __name__ == "__main__":
    run_verb(main)
