"""memory.budget: what it has chosen for a run, once, when the run begins; a run that goes on keeps its choice."""

from functools import partial

from qlite import device
from qlite.errors import RecipeError
from qlite.memory.cards import USUAL_CARD, Card, find_card
from qlite.memory.plan import CONTEXT_BYTES, MemoryPlan
from qlite.model.product_attention import traced_for
from qlite.model.shapes import base_shapes
from qlite.recipe.keys import toml_value
from qlite.recipe.schema import Recipe
from qlite.recipe.write import recipe_differences
from qlite.training.automatic import choices
from qlite.training.fit import FITTED, Fitted, fit
from qlite.training.forecast import Forecast
from qlite.training.report import Observer
from qlite.training.run_folder import RunFolder
from qlite.units import format_bytes, format_step_seconds, parse_bytes


def within_budget(recipe: Recipe, run: RunFolder, fresh: bool, console: Observer) -> Recipe:
    """Return ``recipe`` with the keys that memory.budget decides, or as it is if it has none.

    Raises:
        MachineError: nothing fits.
    """
    budget = recipe.memory.budget
    if budget is None:
        return recipe
    if run.is_begun and not fresh:
        begun = run.recipe()
        if begun.memory.budget is None:
            return recipe
        chosen = recipe.having({key: begun.get(key) for key in FITTED})
        if differences := recipe_differences(recipe, chosen):
            began = begun.memory.budget
            console.note(f"memory.budget = {budget}: going on with what {began} chose when the run began ({'; '.join(differences)})")
        return chosen
    where = device.pick_device(recipe.parallel.device)
    is_card = where.type == "cuda"
    free = device.free_memory(where) + (CONTEXT_BYTES if is_card else 0)  # the context of a card is there by now
    if free < parse_bytes(budget):
        console.note(f"memory.budget = {budget}, and only {format_bytes(free)} are free: fitted to that")
    plan_of = partial(_plan, min(parse_bytes(budget), free), is_card)
    told = partial(console.phase, "try what fits memory.budget")
    with traced_for(where):
        found = fit(recipe, base_shapes(recipe.base, console.phase), plan_of, _card(device.describe(where)), told)
    for line in fit_words(recipe, found):
        console.note(line)
    return found.recipe


def as_begun(recipe: Recipe, run: RunFolder, fresh: bool) -> Recipe:
    """Return ``recipe`` with what memory.checkpointing = "auto" chose when the run began, if that goes on and may still have it."""
    if recipe.memory.checkpointing != "auto" or not run.is_begun or fresh:
        return recipe
    begun = run.recipe().memory.checkpointing
    return recipe.having({"memory.checkpointing": begun}) if begun in choices(recipe) else recipe


def fit_words(recipe: Recipe, found: Fitted) -> list[str]:
    """Return what was chosen, and why nothing faster, a line each."""
    changed = "; ".join(recipe_differences(recipe, found.recipe)) or "the recipe as it is"
    needs = f"{format_bytes(found.plan.needed)} of {format_bytes(found.plan.capacity)}"
    chosen = f"chosen     {changed}: {needs}; estimated {format_step_seconds(found.seconds)} a step on {found.card}"
    keys = [f"{key}={toml_value(found.recipe.get(key))}" for key in FITTED if found.recipe.get(key) != recipe.get(key)]
    typed = [f"to type    {' '.join(keys)}"] if keys else []
    return [chosen, *typed, *(f"too large  {reason}" for reason in found.reasons), *(f"slower     {reason}" for reason in found.slower)]


def _plan(capacity: int, is_card: bool, found: Forecast) -> MemoryPlan:
    whole = (found.peaks(), capacity, "the budget")
    return MemoryPlan.on_card(*whole, found.int8_bytes) if is_card else MemoryPlan(*whole)


def _card(described: str) -> Card:
    try:
        return find_card(described.partition(" (")[0])
    except RecipeError:  # a CPU, or a card that is not in the table
        return USUAL_CARD
