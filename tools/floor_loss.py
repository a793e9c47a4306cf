"""What each way of using less memory costs in loss: one short run of SmolLM2-135M each, side by side with the plain one.

    python tools/floor_loss.py                    # every variant, about 6 minutes each on one CPU core
    python tools/floor_loss.py plain "vocabulary 4 bit" --steps 3 --out build/floor_try

Recipe and rows are those of recipes/quickstart.toml, with fewer rows a step and more steps. Every run is a
``python -m qlite.train`` of its own into OUT/NAME; one that is finished is kept, one that was stopped goes on. OUT.json gets the
figures, the terminal a Markdown table. "another seed" is the yardstick: a difference below its own is no effect.
"""

import argparse
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from qlite.errors import RunError
from qlite.files import write_json
from qlite.training.run_folder import RunFolder
from qlite.units import format_bytes
from qlite.verb import run_verb

ROOT = Path(__file__).parents[1]
RECIPE = "recipes/quickstart.toml"
# 2 rows of 128 tokens a step: 200 steps then take one core about 6 minutes.
COMMON = (
    "train.micro_batch=2", "train.accumulation=1", "train.exact_match_rows=0", "memory.checkpointing=block", "memory.plan=tell",
    "parallel.device=cpu", "parallel.threads=1",
)  # fmt: skip
PLAIN = "plain"
VARIANTS: dict[str, tuple[str, ...]] = {
    PLAIN: (),
    "another seed": ("train.seed=1",),
    "vocabulary 8 bit": ("base.embedding_bits=8", "base.head_bits=8"),
    "vocabulary 4 bit": ("base.embedding_bits=4", "base.head_bits=4"),
    "saved inputs 8 bit": ("memory.saved_inputs=8bit",),
    "MLP of 64 tokens": ("memory.mlp_chunk=64",),
    "optimizer 32 bit": ("optimizer.name=adamw",),
    "saved inputs host": ("memory.saved_inputs=host",),
    "base host": ("memory.base=host",),
    "loss of 64 tokens": ("memory.loss_chunk=64",),
}
# Training losses at the end of a run that are averaged.
LAST = 20


@dataclass(frozen=True)
class Figures:
    """What is told of one run. Losses in nats a token."""

    overrides: tuple[str, ...]
    first_loss: float
    last_losses: float
    """Mean of the last ``LAST`` steps' training losses."""
    held_out_loss: float
    peak_tensor_bytes: int | None
    """None: this qlite does not measure it."""
    seconds: float


def main(argv: list[str]) -> None:
    """Run the variants that are not finished and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", help=f"some of: {', '.join(VARIANTS)}; none: all")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("build/floor"), help="folder of the runs; the figures go into its name + .json")
    args = parser.parse_args(argv)
    unknown = [name for name in args.variants if name not in VARIANTS]
    if unknown:
        raise RunError(f'no variant is called "{unknown[0]}"; there are: {", ".join(VARIANTS)}')
    out = args.out.absolute()
    figures: dict[str, Figures] = {}
    for name in args.variants or VARIANTS:
        figures[name] = run_variant(name, out / name.replace(" ", "_"), args.steps)
        write_json(out.with_name(f"{out.name}.json"), {key: asdict(each) for key, each in figures.items()})
    print(markdown(figures))


def run_variant(name: str, folder: Path, steps: int) -> Figures:
    """Train ``name`` for ``steps`` into ``folder`` if it is not finished there, and return its figures.

    Raises:
        RunError: the run failed; what it said is above.
    """
    print(f"{name}: {folder}", file=sys.stderr)
    overrides = (*COMMON, f"train.steps={steps}", f"schedule.warmup_steps={min(5, steps - 1)}", f"output.dir={folder}", *VARIANTS[name])
    if subprocess.run([sys.executable, "-m", "qlite.train", RECIPE, *overrides], cwd=ROOT, stdout=sys.stderr).returncode:
        raise RunError(f'the run "{name}" failed; after a change of its recipe delete {folder}')
    run = RunFolder(folder)
    losses = [record["loss"] for record in run.records.read() if record["kind"] == "step"]
    result = run.result
    return Figures(
        VARIANTS[name], losses[0], mean(losses[-LAST:]), result["eval_loss"], result.get("peak_tensor_bytes"), result["train_seconds"]
    )


def markdown(figures: dict[str, Figures]) -> str:
    """Return the table; without the plain run there are no differences."""
    plain = figures.get(PLAIN)
    head = ("variant", "first loss", f"mean of last {LAST}", "held-out loss", "to plain", "peak tensors", "seconds")
    rows = [head, ("---", *["---:"] * (len(head) - 1))]
    for name, each in figures.items():
        difference = f"{each.held_out_loss - plain.held_out_loss:+.4f}" if plain else ""
        peak = format_bytes(each.peak_tensor_bytes) if each.peak_tensor_bytes else ""
        losses = (f"{loss:.4f}" for loss in (each.first_loss, each.last_losses, each.held_out_loss))
        rows.append((name, *losses, difference, peak, f"{each.seconds:.0f}"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    run_verb(main)
