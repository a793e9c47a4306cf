"""memory.checkpointing = "auto": of what computes less again in the backward pass, the first that leaves room."""

from collections.abc import Callable
from contextlib import suppress

from qlite.errors import QliteError
from qlite.memory.plan import MemoryPlan
from qlite.recipe.schema import WHOLE, Recipe

ROOM = 0.1
"""Share of the memory that must be left by what nobody has asked for: a plan knows nothing of fragmentation."""


def choices(recipe: Recipe) -> tuple[str, ...]:
    """Return what memory.checkpointing can be beside the other keys of ``recipe``, the fastest first."""
    memory = recipe.memory
    # Only blocks that are computed again read their weights one at a time and keep nothing but their inputs.
    whole = WHOLE if memory.saved_inputs == memory.base == "device" else ()
    return (*whole, "attention", "block")


def settled(recipe: Recipe, plan_of: Callable[[Recipe], MemoryPlan]) -> Recipe:
    """Return ``recipe`` with memory.checkpointing chosen where that is "auto": by ``plan_of``, which plans a recipe against its device.

    Where no plan shall be made, it is what needs least.
    """
    if recipe.memory.checkpointing != "auto":
        return recipe
    *faster, least = choices(recipe)
    for choice in faster if recipe.memory.plan != "off" else ():
        changed = recipe.having({"memory.checkpointing": choice})
        with suppress(QliteError):  # a family that cannot have it
            plan = plan_of(changed)
            if plan.headroom >= ROOM * plan.capacity:
                return changed
    return recipe.having({"memory.checkpointing": least})
