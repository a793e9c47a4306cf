"""The model card of what a run exports: the run's own facts, and nothing that names a folder of this machine."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from qlite.formats.card import Kind, model_card
from qlite.recipe.share import shareable
from qlite.recipe.write import recipe_toml
from qlite.training.run_folder import RunFolder


def run_card(run: RunFolder, kind: Kind, facts: Mapping[str, str], sections: Mapping[str, Sequence[str]]) -> str:
    """Return the card of an export of the finished ``run``; ``facts`` stand behind the run's own."""
    recipe = shareable(run.recipe())
    method = f"{recipe.method.words}, rank {recipe.method.rank}" if hasattr(recipe.method, "rank") else recipe.method.words
    own = {"base": recipe.base.model, "method": method, "trained over": f"{recipe.base.bits}-bit weights", **facts, **_reached(run.result)}
    kind = replace(kind, tags=(*(part.name for part in recipe.method.each), *kind.tags))
    return model_card(kind, run.path.resolve().name, recipe.base.model, own, sections, recipe_toml(recipe))


def _reached(result: dict) -> dict[str, str]:
    """Return what the run has measured on its held-out rows."""
    found = {}
    if result.get("eval_loss") is not None:
        found["held-out loss"] = f"{result['eval_loss']:.4f}"
    answers = [each for each in result.get("answers") or () if each["rows"]]
    if answers:
        last = answers[-1]
        before = f", before training {answers[0]['exact']}" if answers[0]["step"] < last["step"] else ""
        found["held-out answers equal letter by letter"] = f"{last['exact']} of {last['rows']}{before}"
    return found
