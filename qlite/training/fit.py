"""Fit a recipe to a budget: of the combinations of micro-batch and memory keys that fit, the one that should be fastest.

Rows a step stay as the recipe says: a larger micro-batch takes fewer of them. The levels are tried from the fastest to the
slowest, and of a level's micro-batches the largest that fits; the time is the roofline estimate of ``memory.work`` and, where
something lies on the host, of the bus. The model's precision is touched last.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from qlite.errors import MachineError, QliteError
from qlite.memory.cards import USUAL_CARD, Card
from qlite.memory.plan import MemoryPlan
from qlite.model.shapes import BaseShapes
from qlite.recipe.schema import Recipe
from qlite.training.automatic import choices
from qlite.training.forecast import STEP, Forecast, worst_workload
from qlite.training.kept_plans import kept_forecast
from qlite.training.step import rank_keys
from qlite.training.ways_out import Keys, coarser_vocabulary
from qlite.units import format_bytes, format_step_seconds

BUS_BYTES_PER_SECOND = 10e9
"""Between host and card: assumed; PCIe 3 x16 carries 12 GB/s, 4 x8 as much."""
MOST_TOKENS = 16384
"""Padded tokens of the largest micro-batch that is tried: beyond, nothing gets faster."""
FITTED = (
    "train.micro_batch", "train.accumulation", "memory.checkpointing", "memory.loss_chunk", "memory.saved_inputs", "memory.mlp_chunk",
    "memory.embedding", "memory.base", "base.embedding_bits", "base.head_bits",
)  # fmt: skip
"""The keys that a budget decides."""


@dataclass(frozen=True)
class Fitted:
    """What a budget has chosen."""

    recipe: Recipe
    found: Forecast
    plan: MemoryPlan
    seconds: float
    """Estimated time of one optimizer step on ``card``."""
    card: str = ""
    reasons: tuple[str, ...] = ()
    """What would be faster, and does not fit."""
    slower: tuple[str, ...] = ()
    """What fits, too, and should be slower."""


def levels(recipe: Recipe, is_tied: bool) -> Iterator[Keys]:
    """Yield keys that need less and less memory, each with those before.

    What ``recipe`` has lowered itself stays so; checkpointing is the budget's to choose.
    """
    memory = recipe.memory
    keys: Keys = {}
    for checkpointing in choices(recipe):
        keys = keys | {"memory.checkpointing": checkpointing}
        yield keys
    steps: list[Keys] = [{"memory.loss_chunk": 64}] if memory.loss_chunk > 64 else []
    steps += [{"memory.embedding": "host"}] if memory.embedding == "device" and not is_tied else []
    steps += [{"memory.saved_inputs": "host"}] if memory.saved_inputs == "device" else []
    steps += [{"memory.mlp_chunk": 512}] if not memory.mlp_chunk and recipe.train.tokens > 512 else []
    for bits in (8, 4):
        coarser = coarser_vocabulary(recipe, bits)
        steps += [coarser] if coarser else []
    steps += [{"memory.base": "host"}] if memory.base == "device" else []
    for step in steps:
        keys = keys | step
        yield keys


def fit(
    recipe: Recipe,
    shapes: BaseShapes,
    plan_of: Callable[[Forecast], MemoryPlan],
    card: Card | None = None,
    told: Callable[[int, int], None] = lambda *_: None,
) -> Fitted:
    """Return the fastest recipe whose plan, by ``plan_of``, fits.

    Raises:
        MachineError: none does; the message says what the smallest needs.
    """
    card = card or USUAL_CARD
    tried = list(levels(recipe, shapes.is_tied))
    fitting, reasons, slower, least, problem = [], [], [], None, None
    for number, keys in enumerate(tried):
        told(number, len(tried))
        changed = recipe.having(keys)
        try:
            found, smallest = _largest_that_fits(changed, shapes, plan_of, card)
        except QliteError as error:  # a key that this family cannot have; or, with every level alike, the recipe's own mistake
            problem = error
            continue
        least = smallest if least is None else min(least, smallest)
        if found is None:
            reasons.append(f"{_words(keys)}: {format_bytes(smallest)} at train.micro_batch = 1")
            continue
        fitting.append(found)
        if len(fitting) > 1 and number + 1 >= len(choices(recipe)):
            break  # what comes after is slower: all kinds of checkpointing were tried, each with its largest micro-batch
    told(len(tried), len(tried))
    if least is None:
        raise problem
    if not fitting:
        lower = ", ".join(["train.tokens", *rank_keys(recipe.method)])
        raise MachineError(
            f"nothing fits; the least that this recipe needs is {format_bytes(least)}, with everything lowered. "
            f"Lower {lower} or train.exact_match_rows, or take a smaller base.model"
        )
    best, *others = sorted(fitting, key=lambda each: each.seconds)
    if others and format_step_seconds(others[0].seconds) != format_step_seconds(best.seconds):
        slower = [f"{_words(_differing(others[0].recipe, best.recipe))}: {format_step_seconds(others[0].seconds)} a step"]
    return replace(best, card=card.name, reasons=tuple(reasons), slower=tuple(slower))


def _largest_that_fits(
    recipe: Recipe, shapes: BaseShapes, plan_of: Callable[[Forecast], MemoryPlan], card: Card
) -> tuple[Fitted | None, int]:
    """Return the largest micro-batch of ``recipe`` that fits, or None, and the bytes that one row needs."""
    rows = recipe.train.micro_batch * recipe.train.accumulation
    first = plan_of(_of_rows(recipe, shapes, 1, rows))
    if not first.fits:
        return None, first.needed
    second = plan_of(_of_rows(recipe, shapes, 2, rows))
    slope = second.needed - first.needed
    counts = [count for count in range(rows, 0, -1) if rows % count == 0 and (count == 1 or count * recipe.train.tokens <= MOST_TOKENS)]
    for count in counts:
        if first.needed + slope * (count - 1) <= first.capacity:
            exact = _of_rows(recipe, shapes, count, rows)
            plan = plan_of(exact)
            if plan.fits:
                changed = _with_rows(recipe, count, rows)
                return Fitted(changed, exact, plan, _step_seconds(exact, changed, shapes, card)), first.needed
    return None, first.needed


def _of_rows(recipe: Recipe, shapes: BaseShapes, count: int, rows: int) -> Forecast:
    changed = _with_rows(recipe, count, rows)
    return kept_forecast(changed, shapes, worst_workload(changed))


def _with_rows(recipe: Recipe, count: int, rows: int) -> Recipe:
    return recipe.having({"train.micro_batch": count, "train.accumulation": max(1, rows // count)})


def _step_seconds(found: Forecast, recipe: Recipe, shapes: BaseShapes, card: Card) -> float:
    """Return the estimated time of an optimizer step: of its micro-batches, computed or carried, whichever takes longer."""
    # Twice: weights for either pass (the recomputation is a part of the backward pass), inputs away and back.
    carried = 2 * max(peak.host for (phase, _), peak in found.moments.items() if phase == STEP)
    if recipe.memory.embedding == "host":  # of which only a few rows are carried
        config = shapes.config.get_text_config()
        carried -= 2 * config.vocab_size * config.hidden_size * recipe.base.embedding_bits // 8
    return recipe.train.accumulation * max(found.work.seconds(card), max(0, carried) / BUS_BYTES_PER_SECOND)


def _differing(recipe: Recipe, other: Recipe) -> Keys:
    return {key: recipe.get(key) for key in FITTED if recipe.get(key) != other.get(key)}


def _words(keys: Keys) -> str:
    return ", ".join(f"{name.partition('.')[2]} {value}" for name, value in keys.items())
