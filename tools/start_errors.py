"""How near PiSSA and LoftQ bring a quantised model to its original before training: the table of arXiv:2404.02948, section 4.

For every kind of linear of a base, ||W - (q + s B A)||_F over all blocks, beside ||W - q(W)||_F: how much smaller it is, in percent.

    python tools/start_errors.py recipes/quickstart.toml --ranks 16 64
"""

import argparse
import time
from collections import defaultdict
from pathlib import Path

import torch

from qlite.device import set_threads
from qlite.errors import RecipeError
from qlite.methods.base import adapted_linears
from qlite.methods.lora import LoRA
from qlite.model.originals import original_weights
from qlite.model.shapes import base_shapes
from qlite.quant.linear import dense_weight
from qlite.recipe.read import read_recipe
from qlite.recipe.schema import Recipe
from qlite.verb import run_verb

WAYS = {"PiSSA": {"init": "pissa"}, "LoftQ": {"init": "loftq"}, "LoftQ, 5 rounds": {"init": "loftq", "loftq_rounds": 5}}


def main(argv: list[str]) -> None:
    """Print the table, and how long each way takes to begin."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args(argv)
    set_threads(args.threads)
    recipe = read_recipe(args.recipe)
    require_ranks(recipe, args.ranks)
    plain, _ = errors(recipe, LoRA(rank=1))
    kinds = list(plain)
    print(f"{'smaller by, %':24}" + "".join(f"{kind:>11}" for kind in (*kinds, "all", "seconds")))
    for rank in args.ranks:
        for name, keys in WAYS.items():
            found, seconds = errors(recipe, LoRA(rank=rank, alpha=float(rank), **keys))
            shares = [100 * (1 - (found[kind] / plain[kind]) ** 0.5) for kind in kinds]
            whole = 100 * (1 - (sum(found.values()) / sum(plain.values())) ** 0.5)
            print(f"{f'{name}, rank {rank}':24}" + "".join(f"{share:11.1f}" for share in (*shares, whole, seconds)), flush=True)


def require_ranks(recipe: Recipe, ranks: list[int]) -> None:
    """Raise RecipeError, before a weight is read, where a rank is none that the base's linears can have, or a way is not for its bits."""
    if bad := [f"--ranks {rank}: should be 1 or more" for rank in ranks if rank < 1]:
        raise RecipeError(bad)
    config = base_shapes(recipe.base, lambda *_: None).config
    for rank in ranks:
        for keys in WAYS.values():
            model = recipe.base.empty(config, torch.device("cpu")).requires_grad_(False)
            try:
                LoRA(rank=rank, alpha=float(rank), **keys).attach(model)
            except RecipeError as error:
                bad += [f"--ranks {rank}: {problem}" for problem in error.problems if f"--ranks {rank}: {problem}" not in bad]
    if bad:
        raise RecipeError(bad)


@torch.no_grad()
def errors(recipe: Recipe, method: LoRA) -> tuple[dict[str, float], float]:
    """Return ||W - (q + s B A)||_F^2 by kind of linear, summed over the blocks, as ``method`` begins; and the seconds that took."""
    base = recipe.base.load(torch.device("cpu"), lambda *_: None)
    original = original_weights(base)
    method.attach(base.model)
    began = time.perf_counter()
    method.start(base.model, original)
    seconds = time.perf_counter() - began
    found: dict[str, float] = defaultdict(float)
    for name, layer in adapted_linears(base.model):
        left = original(name) - layer.merged(dense_weight(layer.frozen))
        found[name.rpartition(".")[2]] += float(left.square().sum())
    return dict(found), seconds


if __name__ == "__main__":
    run_verb(main)
