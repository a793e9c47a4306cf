"""What it costs to train several adapters in one pass over one base, beside one after another: time and memory, in one process.

    python tools/sweep_speed.py recipes/sweeps/ranks.toml --rounds 5

In each round every run's step is made once together with the others' and once alone, over the same base and rows, in turns; the
ratio is that of the same round. The first round does not count. Memory is what is planned for both.
"""

import argparse
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

from qlite.memory.plan import MemoryPlan
from qlite.recipe.sweep import read_sweep
from qlite.training.console import open_console
from qlite.training.parts import Machine, Parts, read_rows
from qlite.training.run_folder import RunFolder
from qlite.training.state import TrainState
from qlite.training.sweep import JointMeter, assemble_together, planned
from qlite.training.together import Member, Together
from qlite.units import format_bytes
from qlite.verb import run_verb


def main(argv: list[str]) -> None:
    """Print both times, their ratio, and both plans."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("overrides", nargs="*", help="table.key=value, put over every run's recipe")
    parser.add_argument("--rounds", type=int, default=5, help="after one that does not count")
    args = parser.parse_intermixed_args(argv)
    with open_console("sweep speed") as console:
        recipes = read_sweep(args.sweep, ["memory.plan=tell", *args.overrides])
        machine = Machine.of(next(iter(recipes.values())))
        rows = {name: read_rows(recipe, console) for name, recipe in recipes.items()}
        rows, joint_plan = planned(rows, machine.where, console)
        plans = [own.planner(machine.where, console).plan_run(own.data, own.batches, lambda _: None) for own in rows.values()]
        parts, together = assemble_together(list(rows.values()), machine, JointMeter(machine.where), console)
    together.stepping = nullcontext  # following every tensor costs time of its own
    members = [
        Member(name, own, RunFolder(Path()), console, TrainState(), i) for i, (name, own) in enumerate(zip(rows, parts, strict=True))
    ]
    seconds = {"together": [], "one after another": []}
    for number in range(args.rounds + 1):
        work = [own.batches.step(number + 1) for own in parts]
        seconds["together"].append(timed(lambda work=work: step_together(together, members, work)))
        seconds["one after another"].append(
            timed(lambda work=work: [step_alone(own, batches) for own, batches in zip(parts, work, strict=True)])
        )
    ratios = [b / a for a, b in zip(*(each[1:] for each in seconds.values()), strict=True)]
    print(f"{len(parts)} runs, {args.rounds} rounds")
    for name, own in seconds.items():
        print(f"{name:18} {statistics.median(own[1:]):8.2f} s for a step of all")
    print(f"one after another takes {statistics.median(ratios):.2f} times as long ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"planned at most: together {peak(joint_plan)}, each alone {', '.join(map(peak, plans))}")


def timed(work) -> float:
    """Return the seconds that ``work()`` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def step_together(together: Together, members: list[Member], work: list) -> None:
    """Make one step of every run, its gradients from joint passes."""
    begun = together.begin(members, work)
    for member, batches in zip(members, work, strict=True):
        member.parts.stepper.step(batches, member.parts.optimizer, 1.0, summed=begun[member].loss)


def step_alone(own: Parts, batches: list) -> None:
    """Make one step of one run."""
    own.stepper.step(batches, own.optimizer, 1.0)


def peak(plan: MemoryPlan) -> str:
    """Return the most that is planned."""
    return format_bytes(plan.peak.bytes)


if __name__ == "__main__":
    run_verb(main)
