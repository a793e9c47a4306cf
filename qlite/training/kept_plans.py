"""What a run takes of memory is kept once it was traced: a run that is begun again, or goes on, reads it instead of tracing it."""

import json
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path

from qlite.data.batches import Batch
from qlite.errors import MachineError
from qlite.files import cache_folder, drop_oldest, mark_used, new_folder, write_json
from qlite.hashes import code_hash, short_hash
from qlite.model import product_attention
from qlite.model.shapes import BaseShapes
from qlite.recipe.schema import Recipe
from qlite.training.forecast import Forecast, Workload, forecast
from qlite.units import MIB

CACHE_BYTES = 64 * MIB
"""All kept plans together; those used longest ago go first."""
PACKAGE = Path(__file__).parents[1]
LIBRARIES = ("torch", "bitsandbytes", "transformers")
FORECAST = "forecast.json"


def kept_forecast(recipe: Recipe, shapes: BaseShapes, work: Workload) -> Forecast:
    """Return what ``forecast`` does, from the cache if all that decides it was traced before.

    Raises:
        ModelError, RecipeError: as ``forecast``.
    """
    folder = cache_folder() / "plans" / short_hash(json.dumps(_facts(recipe, shapes, work), sort_keys=True, default=str))
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        found = Forecast.of_record(json.loads((folder / FORECAST).read_text(encoding="utf-8")))
        mark_used(folder)
        return found
    found = forecast(recipe, shapes, work)
    with suppress(MachineError):  # a full or read-only disk stops no run
        with new_folder(folder) as new:
            write_json(new / FORECAST, found.as_record())
        drop_oldest(folder.parent, CACHE_BYTES, keep=folder)
    return found


def _facts(recipe: Recipe, shapes: BaseShapes, work: Workload) -> dict:
    """Return all that decides what a trace finds, in JSON's types but for what has one text only."""
    tables = {table: asdict(getattr(recipe, table)) for table in ("base", "method", "optimizer", "train", "memory")}
    return {
        "code": _code(),
        "recipe": {**tables, "method_name": recipe.method.words},
        # Its dtype is what it was last built in; that of the tensors is the recipe's.
        "config": {key: value for key, value in shapes.config.to_dict().items() if key != "dtype"},
        "dtypes": shapes.dtypes,
        "products": product_attention.are_traced(),
        "work": [_layout(work.train), work.held_out and _layout(work.held_out), work.answers],
    }


@cache
def _code() -> str:
    """Return the hash of all our code, read once: what a process runs does not change."""
    return code_hash([PACKAGE, *(path for path in sorted(PACKAGE.iterdir()) if path.is_dir())], LIBRARIES)


def _layout(batch: Batch) -> list:
    """Return what of ``batch`` decides its memory: its shape, its lines' ends, its trained tokens and where its documents begin."""
    positions = None if batch.position_ids is None else batch.position_ids.tolist()
    return [list(batch.input_ids.shape), batch.lengths, batch.predicts.tolist(), positions]
