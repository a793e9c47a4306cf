"""What to change where a run does not fit: each change with its price, and with the peak that it would leave."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qlite.errors import QliteError
from qlite.model.shapes import BaseShapes
from qlite.recipe.schema import WHOLE, Recipe
from qlite.training.forecast import PHASES, Workload
from qlite.training.kept_plans import kept_forecast
from qlite.units import format_bytes

Keys = dict[str, object]
"""Values by full key name."""


@dataclass(frozen=True)
class WayOut:
    """A change of a recipe that saves memory."""

    keys: Keys
    price: str
    """What it costs, in words."""
    peak: int = 0
    """The largest sum of tensor bytes with it."""

    def __str__(self) -> str:
        """Return "memory.loss_chunk = 128: 6.21 GiB of tensors (the head runs on fewer tokens at a time)"."""
        keys = ", ".join(f"{name} = {json.dumps(value)}" for name, value in self.keys.items())
        return f"{keys}: {format_bytes(self.peak)} of tensors ({self.price})"


def changes(recipe: Recipe, is_tied: bool) -> Iterator[WayOut]:
    """Yield what ``recipe`` could change to need less, the cheapest first: time, then the model's precision, then what is learned."""
    train, memory, base = recipe.train, recipe.memory, recipe.base
    if train.micro_batch > 1:
        half = {"train.micro_batch": train.micro_batch // 2, "train.accumulation": train.accumulation * 2}
        yield WayOut(half, "the same step, in more and smaller passes")
    if memory.checkpointing == "none":
        yield WayOut({"memory.checkpointing": "elementwise"}, "norms and gated MLPs' activations are computed twice, where LoRA keeps them")
    if memory.checkpointing in WHOLE:
        yield WayOut({"memory.checkpointing": "attention"}, "each block but its attention is computed twice")
    if memory.checkpointing not in ("block", "auto"):
        yield WayOut({"memory.checkpointing": "block"}, "each block is computed twice")
    if memory.loss_chunk > 64:
        yield WayOut({"memory.loss_chunk": 64}, "the head runs on fewer tokens at a time")
    if "8bit" not in recipe.optimizer.name:
        yield WayOut({"optimizer.name": "paged_adamw8bit"}, "the optimizer's state in 8 bit")
    if memory.embedding == "device" and not is_tied:
        yield WayOut({"memory.embedding": "host"}, "the rows looked up cross the bus")
    blocks = {"memory.checkpointing": "block"} if memory.checkpointing in WHOLE else {}
    if memory.saved_inputs == "device":
        yield WayOut({**blocks, "memory.saved_inputs": "host"}, "blocks' inputs cross the bus twice")
    if not memory.mlp_chunk and train.tokens * train.micro_batch > 1024:
        yield WayOut({**blocks, "memory.mlp_chunk": 512}, "the MLPs are computed once more, in parts")
    if base.bits > 4:
        yield WayOut({"base.bits": 4}, "a coarser base")
    for bits in (8, 4):
        if coarser := coarser_vocabulary(recipe, bits):
            yield WayOut(coarser, f"embedding and head in {bits} bit: see README for the loss")
    if train.tokens >= 256:
        yield WayOut({"train.tokens": train.tokens // 2}, "longer rows are left out or cut")
    if train.exact_match_rows:
        yield WayOut({"train.exact_match_rows": 0}, "no held-out prompts are answered")
    if memory.base == "device":
        yield WayOut({**blocks, "memory.base": "host"}, "every weight crosses the bus twice a micro-batch")


def coarser_vocabulary(recipe: Recipe, bits: int) -> Keys:
    """Return the keys that bring embedding and head down to ``bits``, those that are not there yet."""
    return {name: bits for name in ("base.embedding_bits", "base.head_bits") if recipe.get(name) > bits}


def ways_out(
    recipe: Recipe,
    shapes: BaseShapes,
    before: int,
    work_of: Callable[[Recipe], Workload],
    phases: tuple[str, ...] = PHASES,
    told: Callable[[int, int], None] = lambda *_: None,
) -> list[WayOut]:
    """Return the changes of ``recipe`` after which none of ``phases`` takes ``before`` bytes of tensors, each traced, the cheapest first.

    ``work_of(recipe)`` is the work whose peak is asked for; ``told`` hears how many are traced, of how many.
    """
    found = []
    candidates = list(changes(recipe, shapes.is_tied))
    for number, change in enumerate(candidates):
        told(number, len(candidates))
        changed = recipe.having(change.keys)
        try:
            peaks = kept_forecast(changed, shapes, work_of(changed)).peaks()
        except QliteError:  # a key that this family cannot have
            continue
        peak = max(peaks[phase].bytes for phase in phases if phase in peaks)
        if peak < before:
            found.append(WayOut(change.keys, change.price, peak))
    told(len(candidates), len(candidates))
    return found
