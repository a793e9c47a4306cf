"""Which matrices should LoRA adapt, and in what rank? Tables 5 and 6 of its paper (Hu et al. 2021, arXiv:2106.09685) on any recipe.

    python tools/rank_study.py                            # recipes/quickstart.toml, 8 sets of matrices, ranks 1 to 64: hours on a CPU
    python tools/rank_study.py recipes/snips.toml --sets q qv all --ranks 1 8 --seeds 3
    python tools/rank_study.py --quick                    # 4 steps each, in a folder of its own: only that it works

First part, table 6: every set in every rank. Second part, table 5: every set in the rank that gives it as many trained parameters as
queries and values have in rank --budget, as near as a whole rank comes. alpha / rank is the recipe's in all, so that only the rank differs;
all else is the recipe's, too. Each training is a run in the folder: a stopped study goes on, and a larger one trains only what it lacks.
A rank that a set cannot have is refused before the first of them.
It prints and writes table.csv, and rank_study.png where matplotlib is there.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from pictures import open_pyplot

from qlite.analysis.tables import as_csv
from qlite.errors import RecipeError, RunError
from qlite.files import make_folder, write_text
from qlite.methods.base import trainable_count
from qlite.methods.lora import LoRA
from qlite.model.shapes import BaseShapes, base_shapes
from qlite.recipe.read import read_recipe
from qlite.recipe.schema import Recipe
from qlite.train import train
from qlite.training.result import TrainResult
from qlite.verb import run_verb

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
SETS = {
    "q": ("q_proj",),
    "k": ("k_proj",),
    "v": ("v_proj",),
    "o": ("o_proj",),
    "qv": ("q_proj", "v_proj"),
    "qkvo": ATTENTION,
    "mlp": MLP,
    "all": (*ATTENTION, *MLP),
}
RANKS = (1, 2, 4, 8, 64)
QUICK = {"train.steps": 4, "train.epochs": None, "schedule.warmup_steps": 1, "train.exact_match_rows": 0}
QUICKSTART, OUT, QUICK_OUT = Path("recipes/quickstart.toml"), Path("build/rank_study"), Path("build/rank_study_quick")
FLAGS = {"another output.dir": "another --out", "start afresh with --fresh": "delete that folder"}
"""What a training's refusal tells to give or to do, and what that is here."""
QUICK_SETS, QUICK_RANKS = ("q", "qv", "all"), (1, 4)


@dataclass(frozen=True)
class Point:
    """One set of matrices in one rank, with a training for each seed."""

    name: str
    rank: int
    parameters: int
    results: tuple[TrainResult, ...]

    @property
    def losses(self) -> list[float]:
        """Held-out losses, where there are held-out rows."""
        return [each.held_out_loss for each in self.results if each.held_out_loss is not None]

    @property
    def exact(self) -> list[float]:
        """Shares of exact answers in %, where the recipe asks for answers."""
        answers = [each.exact_after for each in self.results if each.exact_after is not None]
        return [100 * each.exact / each.rows for each in answers]


def main(argv: list[str]) -> None:
    """Train what the folder lacks, print both tables, write them and the picture."""
    args = arguments(argv)
    sets, ranks = args.sets, args.ranks
    if problems := [f"--{key} {value}: should be 1 or more" for key, value in [*(("ranks", rank) for rank in ranks),
                    ("seeds", args.seeds), ("budget", args.budget)] if value < 1]:  # fmt: skip
        raise RecipeError(problems)
    recipe = read_recipe(args.recipe, args.overrides)
    if not isinstance(recipe.method, LoRA):
        raise RecipeError(f'method.name = "{recipe.method.words}": this study is of LoRA; choose a recipe of it')
    recipe = recipe.having(QUICK) if args.quick else recipe
    shapes = base_shapes(recipe.base, lambda *_: None)
    grid = [(name, rank) for name in sets for rank in ranks]
    asked = {f"--budget {args.budget}": ("qv", args.budget), **{f"--sets {name} --ranks {rank}": (name, rank) for name, rank in grid}}
    sizes = sizes_of(recipe, asked, shapes)
    budget = sizes["qv", args.budget]
    equal = [(name, equal_rank(recipe, name, budget, shapes)) for name in sets]
    sizes |= sizes_of(recipe, {f"--sets {name} at --budget {args.budget}": (name, rank) for name, rank in equal}, shapes)
    points = {}
    for number, (name, rank) in enumerate(wanted := list(dict.fromkeys([*grid, *equal])), start=1):
        points[name, rank] = train_point(recipe, (name, rank), sizes[name, rank], args.seeds, args.out)
        print(f"{number}/{len(wanted)}  {name} rank {rank}: {_cell(points[name, rank])}", flush=True)
    rows = [point_row(points[each], "rank") for each in grid] + [point_row(points[each], "budget") for each in equal]
    print(f"\nheld-out loss{', exact answers' if any(point.exact for point in points.values()) else ''}, by rank:\n")
    print(by_rank(points, sets, ranks))
    print(f"\nat an equal number of trained parameters, {budget:,} or as near as a whole rank comes:\n")
    print(at_budget([points[each] for each in equal]))
    make_folder(args.out)
    write_text(args.out / "table.csv", as_csv(rows))
    print(f"\n{args.out / 'table.csv'}")
    draw(points, sets, ranks, [points[each] for each in equal], args.out / "rank_study.png")


def arguments(argv: list[str]) -> argparse.Namespace:
    """Return what the command line says, with what it leaves open; of several equal sets or ranks one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", type=Path, default=QUICKSTART, help=f"a TOML file of LoRA; by default {QUICKSTART}")
    parser.add_argument("overrides", nargs="*", help="table.key=value, put over the recipe")
    parser.add_argument("--out", type=Path, help=f"by default {OUT}, with --quick {QUICK_OUT}")
    parser.add_argument("--sets", nargs="+", choices=SETS, help=f"by default all: {', '.join(SETS)}")
    parser.add_argument("--ranks", nargs="+", type=int, help=f"by default {', '.join(map(str, RANKS))}")
    parser.add_argument("--budget", type=int, default=16, help="rank of queries and values; the second part gives all sets its parameters")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="4 steps of few sets and ranks")
    args = parser.parse_intermixed_args(argv)
    args.sets = tuple(dict.fromkeys(args.sets or (QUICK_SETS if args.quick else SETS)))
    args.ranks = tuple(dict.fromkeys(args.ranks or (QUICK_RANKS if args.quick else RANKS)))
    args.out = args.out or (QUICK_OUT if args.quick else OUT)
    return args


def of(recipe: Recipe, name: str, rank: int) -> Recipe:
    """Return ``recipe`` with the matrices of ``name`` in ``rank``, and alpha / rank as it has it."""
    alpha = recipe.method.alpha / recipe.method.rank * rank
    same = {"method.rank_per_target": {}, "method.alpha_per_target": {}}
    return recipe.having({"method.targets": SETS[name], "method.rank": rank, "method.alpha": alpha, **same})


def parameters(recipe: Recipe, shapes: BaseShapes) -> int:
    """Return how many numbers ``recipe`` trains; no weight is read."""
    model = recipe.base.empty(shapes.config, torch.device("cpu")).requires_grad_(False)
    recipe.method.resolved(None).attach(model)
    return trainable_count(model)


def sizes_of(recipe: Recipe, asked: dict[str, tuple[str, int]], shapes: BaseShapes) -> dict[tuple[str, int], int]:
    """Return how many numbers each point (set, rank) trains; the keys of ``asked`` say which flags ask for it.

    Raises:
        RecipeError: some are larger than a matrix of theirs can be; all of them at once.
    """
    found, problems = {}, []
    for flags, (name, rank) in asked.items():
        try:
            found[name, rank] = parameters(of(recipe, name, rank), shapes)
        except RecipeError as error:
            problems += [f"{flags}: {problem}" for problem in error.problems]
    if problems:
        raise RecipeError(problems)
    return found


def equal_rank(recipe: Recipe, name: str, budget: int, shapes: BaseShapes) -> int:
    """Return the rank in which the matrices of ``name`` have as near to ``budget`` trained parameters as a whole rank comes."""
    return max(1, round(budget / parameters(of(recipe, name, 1), shapes)))


def train_point(recipe: Recipe, point: tuple[str, int], size: int, seeds: int, out: Path) -> Point:
    """Return the trainings of one set and rank, of ``size`` trained numbers, from ``out`` or made now.

    Raises:
        RunError: a run is there that was made otherwise.
    """
    name, rank = point
    own = of(recipe, name, rank)
    runs = [own.having({"train.seed": seed, "output.dir": str(out / "runs" / f"{name}-r{rank}-s{seed}")}) for seed in range(seeds)]
    try:
        return Point(name, rank, size, tuple(train(run, quiet=True) for run in runs))
    except RunError as error:
        told = str(error)
        for trains, here in FLAGS.items():
            told = told.replace(trains, here)
        raise RunError(told) from error


def point_row(point: Point, part: str) -> dict[str, object]:
    """Return one row of the CSV file."""
    row = {"part": part, "matrices": point.name, "rank": point.rank, "parameters": point.parameters, "seeds": len(point.results)}
    row |= {"held_out_loss": mean(point.losses) if point.losses else "", "exact_percent": mean(point.exact) if point.exact else ""}
    return row | {"last_training_loss": mean(list(each.losses.values())[-1] for each in point.results)}


def by_rank(points: dict[tuple[str, int], Point], sets: tuple[str, ...], ranks: tuple[int, ...]) -> str:
    """Return table 6: a row for each set, a column for each rank."""
    rows = [[", ".join(SETS[name]), *(_cell(points[name, rank]) for rank in ranks)] for name in sets]
    return _markdown(["matrices", *(f"rank {rank}" for rank in ranks)], rows)


def at_budget(points: list[Point]) -> str:
    """Return table 5: each set in its own rank."""
    rows = [[", ".join(SETS[point.name]), str(point.rank), f"{point.parameters:,}", _cell(point)] for point in points]
    return _markdown(["matrices", "rank", "trained parameters", "held out"], rows)


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _cell(point: Point) -> str:
    """Return the held-out loss, or the last training loss where no rows are held out, and the exact answers; deviations over seeds."""
    losses, told = point.losses, ""
    if not losses:
        losses, told = [list(each.losses.values())[-1] for each in point.results], " in training"
    spread = f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""
    exact = f", {mean(point.exact):.1f} %" if point.exact else ""
    return f"{mean(losses):.4f}{spread}{told}{exact}"


def draw(points: dict[tuple[str, int], Point], sets: tuple[str, ...], ranks: tuple[int, ...], equal: list[Point], path: Path) -> None:
    """Write the losses over the rank, a line a set, and beside it the sets at an equal number of parameters.

    Raises:
        MachineError: there is no matplotlib.
    """
    pyplot = open_pyplot()

    def loss(point: Point) -> float:
        return mean(point.losses or [list(each.losses.values())[-1] for each in point.results])

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained", sharey=True)
    for name in sets:
        axes[0].plot(ranks, [loss(points[name, rank]) for rank in ranks], "o-", label=name)
    axes[0].set(xlabel="rank", ylabel="loss, nats a token", xscale="log", title="by rank")
    axes[0].set_xticks(ranks, [str(rank) for rank in ranks])
    axes[0].legend(fontsize=8)
    axes[1].bar([f"{point.name}\nr {point.rank}" for point in equal], [loss(point) for point in equal])
    axes[1].set(title="at about an equal number of trained parameters")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    print(path)


if __name__ == "__main__":
    run_verb(main)
