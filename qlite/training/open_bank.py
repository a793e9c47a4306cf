"""Open several adapters over one base: runs of qlite's and PEFT's folders, once all of them are known to belong to it."""

from dataclasses import dataclass, replace

import torch

from qlite.errors import AdapterError, QliteError, shown
from qlite.formats.foreign_fit import put_foreign_adapter, writes_over_the_base
from qlite.model.lowering import lower_memory
from qlite.model.shapes import base_shapes
from qlite.model.wheel import Progress
from qlite.serving.alone import Alone
from qlite.serving.bank import BASE, AdapterBank, linear_shapes, misfits
from qlite.serving.dialogue import Voices
from qlite.training.adapter_folders import BASE_KEYS, TEMPLATE_KEYS, Given, contradictions, parse_adapters, read_updates
from qlite.training.open_run import OpenRun, open_run
from qlite.training.run_folder import RunFolder, find_run


@dataclass(frozen=True)
class OpenBank:
    """The run whose base it is, with all adapters beside it."""

    opened: OpenRun
    voices: Voices
    notes: list[str]
    """What is as the user may not expect it, and no mistake."""


def open_bank(run: str | None, texts: list[str], device: str, progress: Progress) -> OpenBank:
    """Load the base of ``run``, or else of the first adapter that is a run, with the adapters ``texts``, each NAME=FOLDER, beside it.

    One of PEFT's that does more than low-rank updates of linears is taken where it is the only one.

    Raises:
        QliteError: they cannot be read or do not belong together; all that is wrong is said at once, and no weight is loaded before, but
            where an adapter that stands alone does not fit.
    """
    given, problems = parse_adapters(texts)
    first = _base_run(run, given, problems)
    alone, is_read = _alone(given, problems)
    updates = {each.name: read_updates(each, problems) for each in given} if is_read and not alone else {}
    if first is not None:
        known = [Given(BASE, first.path, first), *given]
        problems += [problem for keys in (BASE_KEYS, TEMPLATE_KEYS) for problem in contradictions(known, keys)]
    if first is not None and any(updates.values()):
        base = first.recipe().base
        shapes = linear_shapes(base.empty(base_shapes(base, progress).config, torch.device("cpu")))
        problems += [f"{each.name}: {problem}" for each in given for problem in misfits(updates[each.name], shapes)]
    if problems:
        raise AdapterError("\n".join(problems))
    opened = open_run(first, device, progress)
    bank = _put_alone(alone, opened) if alone else AdapterBank(opened.base.model, opened.device)
    for each in () if alone else given:
        bank.add(each.name, updates.pop(each.name))
    # In tiles the rows of a batch are cut apart, and no tile knows whose they are.
    lower_memory(bank.model, replace(opened.recipe.memory, mlp_chunk=0), opened.device)
    bank.model.requires_grad_(False).eval()
    systems = {each.name: (each.run or first).result["system"] for each in given}
    return OpenBank(opened, Voices(bank, {BASE: first.result["system"], **systems}), _notes(given, opened))


def _alone(given: list[Given], problems: list[str]) -> tuple[Given | None, bool]:
    """Return the one adapter that no other can stand beside, if it is that, and whether all could be looked into."""
    if len(given) != 1:
        return None, True
    try:
        return (given[0] if given[0].stands_alone else None), True
    except AdapterError as error:
        problems.append(str(error))
        return None, False


def _put_alone(given: Given, opened: OpenRun) -> Alone:
    """Put ``given`` on the base of ``opened``.

    Raises:
        AdapterError: it does not fit, or has a vocabulary of its own, which the run's tokenizer does not know.
    """
    model = opened.base.model
    if given.prompts:
        given.prompts.put_on(model, given.folder)
        return Alone(model, given.name, can_be_off=True)
    rows, can_be_off = model.get_input_embeddings().num_embeddings, not writes_over_the_base(given.adapter, model)
    put_foreign_adapter(given.adapter, model, given.folder)
    if (now := model.get_input_embeddings().num_embeddings) != rows:
        raise AdapterError(
            f"{given.folder}: has {now} rows for tokens, and the run's base {rows}: its tokenizer is another; merge it, with that: "
            f"python tools/merge.py {given.folder} --base {shown(given.base_name)} --out FOLDER"
        )
    return Alone(model, given.name, can_be_off)


def _base_run(run: str | None, given: list[Given], problems: list[str]) -> RunFolder | None:
    """Return the run whose base is meant; where that cannot be said, None, and ``problems`` has one more."""
    try:
        if run is not None:
            return find_run(run)
    except QliteError as error:
        problems.append(str(error))
        return None
    found = next((each.run for each in given if each.run), None)
    if found is None and not problems:  # else the run may be one of those that could not be read
        problems.append("none of the adapters is a run of qlite's, so the base is not known; name a run over it before them")
    return found


def _notes(given: list[Given], opened: OpenRun) -> list[str]:
    bits, model, recipes = opened.recipe.base.bits, opened.recipe.base.model, {each.name: each.run.recipe() for each in given if each.run}
    told = [
        f"{name}: was trained over {recipe.base.bits}-bit weights, and answers over {bits}-bit ones"
        for name, recipe in recipes.items()
        if recipe.base.bits != bits
    ]
    # Its update counts from the original weights; the bank's are those, quantised.
    begun = {name: recipe.method.init for name, recipe in recipes.items() if getattr(recipe.method, "init", "zero") != "zero"}
    told += [
        f'{each.name}: says that it is of "{shown(each.base_name)}" and does not say of which weights; here it answers over "{model}"'
        for each in given
        if each.run is None and "base.model" not in each.identity and each.base_name not in ("unknown", model)
    ]
    return told + [
        f'{name}: was trained over what method.init = "{init}" leaves of the weights, and answers here over the base, not quite as in '
        "its run"
        for name, init in begun.items()
    ]
