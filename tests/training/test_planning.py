"""Plans in use: the verb, a run that does not fit, ways out with their peaks, and a budget that is kept."""

import json
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensor

from qlite import device, plan
from qlite.data.batches import TokenBatches
from qlite.errors import MachineError, OutOfMemory, RecipeError
from qlite.memory.cards import CARDS
from qlite.memory.ledger import Peak
from qlite.memory.plan import CONTEXT_BYTES, SLACK_BYTES, MemoryPlan
from qlite.memory.work import Work
from qlite.model.shapes import base_shapes
from qlite.recipe.write import recipe_toml
from qlite.training import budget, planning, step
from qlite.training import fit as fitting
from qlite.training import ways_out as ways_out_module
from qlite.training.fit import FITTED, Fitted, fit, levels
from qlite.training.forecast import STEP, Forecast, forecast, one_row, worst_workload
from qlite.training.planning import Planner
from qlite.training.run_folder import RunFolder
from qlite.training.step import general_advice
from qlite.training.ways_out import changes, ways_out
from qlite.units import MIB
from tests.tiny_run import Watcher, run, tiny_recipe

LONG = ("train.tokens=2000", "memory.loss_chunk=2000")
CUDA_MIB = (CONTEXT_BYTES + SLACK_BYTES) // MIB


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("planning")
    tiny_recipe(where)
    return where


def recipe_of(folder: Path, **changes):
    return tiny_recipe(folder, **{"memory": {"plan": "tell"}, **changes})


def plan_of(recipe, capacity: int | None = None) -> MemoryPlan:
    found = forecast(recipe, base_shapes(recipe.base, lambda *_: None), worst_workload(recipe))
    return MemoryPlan(found.peaks(), capacity, "a card")


def test_a_plan_says_whether_it_fits_and_by_how_much():
    phases = {"load": Peak({"a": 5 * MIB}), "training": Peak({"a": 5 * MIB, "b": 3 * MIB}, "head and loss", host=MIB)}
    fits = MemoryPlan(phases, 10 * MIB, "a card", beside=MIB)
    assert (fits.phase, fits.peak.bytes, fits.needed, fits.headroom, fits.fits, fits.host) == ("training", 8 * MIB, 9 * MIB, MIB, True, MIB)
    assert str(fits) == "8.00 MiB of tensors at most, in training, and 1.00 MiB beside them: 1.00 MiB to spare on a card"
    fits.require_fits([])
    tight = replace(fits, capacity=7 * MIB)
    assert (tight.headroom, tight.fits) == (-2 * MIB, False)
    with pytest.raises(MachineError, match="2.00 MiB too much on a card\nlower it"):
        tight.require_fits(["lower it"])
    assert replace(fits, capacity=None).fits


@pytest.mark.parametrize(("has_context", "cuda"), [(False, CONTEXT_BYTES), (True, 0)])
def test_a_card_must_have_gaps_workspaces_and_a_context_unless_it_is_there(has_context, cuda):
    plan = MemoryPlan.on_card({"training": Peak({"a": 1000 * MIB})}, 2000 * MIB, "a card", 7 * MIB, has_context)
    assert plan.needed == 1020 * MIB + SLACK_BYTES + 7 * MIB + cuda
    assert plan.outside == plan.needed - 1000 * MIB
    # A smaller peak has smaller gaps.
    room = 2000 * MIB - SLACK_BYTES - 7 * MIB - cuda
    assert plan.room_for(int(room / 1.02) - MIB)
    assert not plan.room_for(int(room / 1.02) + MIB)
    assert replace(plan, capacity=None).room_for(10**15)


@pytest.mark.slow
def test_ways_out_save_what_they_say(folder):
    recipe = recipe_of(folder, memory={"plan": "tell", "checkpointing": "none"}, train={"micro_batch": 2, "tokens": 256}, base={"bits": 8})
    shapes, before = base_shapes(recipe.base, lambda *_: None), plan_of(recipe)
    found = ways_out(recipe, shapes, before.peak.bytes, worst_workload)
    keys = [list(way.keys)[-1] for way in found]
    assert {"train.accumulation", "memory.checkpointing", "base.bits", "train.tokens", "memory.base"} <= set(keys)
    assert found[0].peak == plan_of(recipe.having(found[0].keys)).peak.bytes
    for way in found:
        assert way.peak < before.peak.bytes
        assert all(f"{key} = {json.dumps(value)}" in str(way) for key, value in way.keys.items())
    assert next(way for way in changes(recipe, is_tied=False)).keys == {"train.micro_batch": 1, "train.accumulation": 6}
    assert not any("memory.embedding" in way.keys for way in changes(recipe, is_tied=True))


def test_a_run_that_does_not_fit_is_not_begun(folder, monkeypatch):
    monkeypatch.setattr(device, "free_memory", lambda _: 100 * 1024)
    for how, begins in (("require", False), ("tell", True), ("off", True)):
        recipe = recipe_of(folder, memory={"plan": how}, output={"dir": str(folder / how)}, train={"steps": 2, "exact_match_rows": 0})
        if begins:
            notes = run(recipe).notes
            assert any("too much on CPU" in note for note in notes) == (how == "tell")
            continue
        with pytest.raises(MachineError) as caught:
            run(recipe)
        assert caught.value.exit_code == 3
        assert re.search(r"too much on CPU.*\n  .*: [\d.]+ KiB of tensors \(.*\n.*memory.plan = \"tell\"", str(caught.value), re.DOTALL)
        assert not Path(recipe.output.dir).exists()


@pytest.mark.slow
def test_a_full_memory_at_one_row_names_three_ways_out_with_their_peaks(folder, monkeypatch):
    recipe = recipe_of(folder, train={"micro_batch": 1, "exact_match_rows": 0}, output={"dir": str(folder / "full")})

    real = step.hidden_states

    def fails(model, *inputs: object) -> torch.Tensor:
        if isinstance(next(model.parameters()), FakeTensor):  # the plan of the ways out
            return real(model, *inputs)
        raise MemoryError

    monkeypatch.setattr(step, "hidden_states", fails)
    monkeypatch.setattr(planning.Planner, "plan_run", lambda *_: None)
    with pytest.raises(OutOfMemory) as caught:
        run(recipe)
    lines = str(caught.value).splitlines()
    assert re.search(r"a single document of \d+ tokens", lines[0])
    assert len([line for line in lines if re.search(r"= .*: [\d.]+ [KM]iB of tensors \(", line)]) >= 3


def test_the_meter_tells_the_console_what_a_step_took(folder):
    seen = run(recipe_of(folder, output={"dir": str(folder / "told")}, train={"steps": 3, "exact_match_rows": 0}))
    memory = seen.steps[0].memory  # the largest micro-batch comes first
    assert memory.planned == pytest.approx(sum(memory.terms.values()), rel=0.03)
    record = json.loads((folder / "told" / "memory.json").read_text())
    assert record["measured"][STEP]["bytes"] == max(sum(step.memory.terms.values()) for step in seen.steps)
    assert record["process_peak"] > record["measured"][STEP]["bytes"]


@pytest.mark.slow
def test_fit_takes_the_fastest_that_fits_and_says_why(folder):
    recipe = recipe_of(folder, train={"micro_batch": 2, "accumulation": 4, "tokens": 128})
    shapes = base_shapes(recipe.base, lambda *_: None)
    needs = {}
    for capacity in (1 << 40, 3 * MIB, 820 * 1024):
        found = fit(recipe, shapes, lambda forecast, capacity=capacity: MemoryPlan(forecast.peaks(), capacity, "it"))
        assert found.plan.needed <= capacity
        assert found.recipe.train.micro_batch * found.recipe.train.accumulation == 8
        assert found.plan.needed == plan_of(found.recipe).needed
        assert all(recipe.get(key) == found.recipe.get(key) for key in ("train.tokens", "method.rank", "base.bits"))
        needs[capacity] = (found.seconds, found.plan.needed)
    times = [seconds for seconds, _ in needs.values()]
    assert times == sorted(times)
    assert found.reasons
    with pytest.raises(MachineError, match="the least that this recipe needs is"):
        fit(recipe, shapes, lambda forecast: MemoryPlan(forecast.peaks(), 1000, "it"))


def test_all_kinds_of_checkpointing_are_tried_before_the_search_ends(folder, monkeypatch):
    """The second that fits may be no slower than the first by a hair, and the third take larger micro-batches."""
    seconds, asked = {"none": 1.02, "elementwise": 1.04, "attention": 0.93, "block": 1.2}, []

    def largest(recipe, *_: object) -> tuple[Fitted, int]:
        asked.append(recipe.memory.checkpointing)
        return Fitted(recipe, Forecast({}, Work()), MemoryPlan({}, 10**9, "it"), seconds[asked[-1]]), 0

    monkeypatch.setattr(fitting, "_largest_that_fits", largest)
    recipe = recipe_of(folder)
    found = fit(recipe, base_shapes(recipe.base, lambda *_: None), lambda _: pytest.fail("planned"))
    assert asked == list(seconds)
    assert found.recipe.memory.checkpointing == "attention"
    assert found.slower == ("checkpointing none: 1.0s a step",)


def test_levels_never_undo_what_the_recipe_has_lowered(folder):
    recipe = recipe_of(folder, memory={"saved_inputs": "8bit", "loss_chunk": 64}, base={"embedding_bits": 8, "head_bits": 8})
    for keys in levels(recipe, is_tied=False):
        changed = recipe.having(keys)
        assert changed.problems() == []
        assert (changed.memory.saved_inputs, changed.memory.loss_chunk) == ("8bit", 64)
        assert changed.base.head_bits <= 8


def test_a_budget_chooses_once_and_a_run_that_goes_on_keeps_the_choice(folder, monkeypatch):
    recipe = recipe_of(folder, memory={"plan": "tell", "budget": "1200KiB"}, train={"micro_batch": 6, "accumulation": 1, "tokens": 96})
    watcher, place = Watcher(), RunFolder(folder / "budget")
    chosen = budget.within_budget(recipe, place, False, watcher)
    assert plan_of(chosen).needed <= 1200 * 1024
    assert any(note.startswith("chosen ") for note in watcher.notes)
    place.path.mkdir()
    (place.path / "recipe.toml").write_text(recipe_toml(chosen))
    (place.path / "run.json").write_text("{}")
    monkeypatch.setattr(budget, "fit", None)  # nothing is tried again
    assert budget.within_budget(recipe, place, False, watcher) == chosen
    assert watcher.notes[-1].startswith("memory.budget = 1200KiB: going on with what 1200KiB chose when the run began (train.")
    # Another budget chooses nothing anew either: rows a micro-batch would change with it.
    other = recipe.having({"memory.budget": "1GiB"})
    assert budget.within_budget(other, place, False, watcher) == chosen.having({"memory.budget": "1GiB"})
    assert watcher.notes[-1].startswith("memory.budget = 1GiB: going on with what 1200KiB chose when the run began (train.")
    assert {key for key in FITTED if recipe.get(key) != chosen.get(key)}


@pytest.mark.slow
def test_a_budget_that_is_not_free_is_fitted_to_what_is(folder, monkeypatch):
    recipe = recipe_of(folder, memory={"plan": "tell", "budget": "1GiB"}, train={"micro_batch": 6, "accumulation": 1, "tokens": 96})
    monkeypatch.setattr(budget.device, "free_memory", lambda _: 1200 * 1024)
    watcher = Watcher()
    chosen = budget.within_budget(recipe, RunFolder(folder / "not begun"), False, watcher)
    assert plan_of(chosen).needed <= 1200 * 1024
    assert watcher.notes[0] == "memory.budget = 1GiB, and only 1.17 MiB are free: fitted to that"


# The verb


def planned(folder: Path, capsys, *arguments: str) -> str:
    path = folder / "recipe.toml"
    path.write_text(recipe_toml(recipe_of(folder)))
    plan.main([str(path), *arguments])
    return capsys.readouterr().out


def test_the_verb_prints_terms_phases_verdict_and_time(folder, capsys):
    out = planned(folder, capsys, "--vram", "2GiB")
    for word in ("base weights", "adapter", "optimizer", "all tensors", "load", "training", "evaluation", "answers", "verdict    fits"):
        assert word in out
    assert "estimated from peak rates, not measured" in out
    assert "shapes from its files" in out


def test_the_verb_knows_cards_by_name_and_says_what_a_wrong_one_could_be(folder, capsys):
    assert "fits RTX 4060 (7.84 GiB of its 8.00 GiB for programs)" in planned(folder, capsys, "--gpu", "rtx 4060")
    with pytest.raises(RecipeError, match="did you mean"):
        planned(folder, capsys, "--gpu", "RTX 4065")
    assert CARDS["RTX 4060"].vram_bytes == 8 << 30


@pytest.mark.slow
def test_the_verb_plans_for_the_recipes_budget_where_nothing_else_is_named(folder, capsys):
    with pytest.raises(MachineError, match="does not fit"):
        planned(folder, capsys, f"memory.budget={CUDA_MIB + 4}MiB", *LONG, "train.micro_batch=4", "train.exact_match_rows=0")
    assert f"does not fit memory.budget = {CUDA_MIB + 4}MiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("card", "chosen"),
    [(("--vram", "2GiB"), "none"), (("--vram", f"{CUDA_MIB + 1}MiB"), "block"), ((), "auto (no card is named: as block)")],
)
def test_the_verb_plans_what_auto_would_choose(card, chosen, folder, capsys):
    out = ""
    with suppress(MachineError):  # what does not fit is printed all the same
        out = planned(folder, capsys, *card, "train.exact_match_rows=0")
    assert f"checkpointing {chosen}" in " ".join((out + capsys.readouterr().out).split())


@pytest.mark.parametrize(("flag", "problem"), [("--vram", '--vram: "" is no amount'), ("--gpu", 'no card is known as ""')])
def test_an_empty_name_or_amount_is_no_leave_to_plan_for_anything(flag, problem, folder, capsys):
    with pytest.raises(RecipeError, match=problem):
        planned(folder, capsys, flag, "")


@pytest.mark.slow
def test_the_verb_ends_with_3_where_it_does_not_fit_and_says_what_to_change(folder, capsys):
    with pytest.raises(MachineError, match="does not fit") as caught:
        planned(folder, capsys, "--vram", f"{CUDA_MIB + 15}MiB", *LONG, "train.micro_batch=4", "train.exact_match_rows=0")
    assert caught.value.exit_code == 3
    out = capsys.readouterr().out
    assert "verdict    does not fit" in out
    assert re.search(r"  fits  train.micro_batch = 2, train.accumulation = 6: ", out)


@pytest.mark.slow
def test_what_to_change_is_about_the_phase_that_has_the_peak(folder, capsys):
    with pytest.raises(MachineError, match="in answers"):
        planned(folder, capsys, "--vram", f"{CUDA_MIB + 25}MiB", *LONG, "train.micro_batch=2")
    out = capsys.readouterr().out
    assert "train.micro_batch = 1" not in out
    assert re.search(r"  fits  train.exact_match_rows = 0: ", out)


def test_a_mistake_of_the_recipe_is_not_taken_for_a_level_that_cannot_be_had(folder, capsys):
    with pytest.raises(RecipeError, match="q_proj"):
        planned(folder, capsys, "--vram", f"{CUDA_MIB + 25}MiB", "--fit", 'method.targets=["q_prj"]')


@pytest.mark.slow
def test_advice_after_a_pass_without_gradients_is_about_that_pass(folder):
    recipe, where = recipe_of(folder), torch.device("cpu")
    planner = Planner(recipe, where, lambda *_: None)
    with torch.no_grad():
        lines = planner.advice(2, 64, False)
    training = planner.advice(2, 64)
    assert "by plan such a pass takes" in lines[0]
    assert lines[0] != training[0]
    assert len(lines) > 1


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_advice_that_finds_no_room_itself_is_general(folder, monkeypatch, error):
    def forecast(*_):
        raise error

    for module in (planning, ways_out_module):
        monkeypatch.setattr(module, "kept_forecast", forecast)
        planner = Planner(recipe_of(folder), torch.device("cpu"), lambda *_: None)
        assert planner.advice(1, 64) == general_advice(planner.recipe.method, 1, 64)


def test_a_begun_run_may_be_told_to_go_on_all_the_same(folder):
    recipe = recipe_of(folder, memory={"plan": "require"}, output={"dir": str(folder / "begun")}, train={"steps": 2, "exact_match_rows": 0})
    run(recipe, stop_after=1)
    RunFolder(folder / "begun").check(recipe.having({"memory.plan": "tell"}))


def test_a_later_epochs_largest_micro_batch_is_planned_for():
    rows = [one_row(length) for length in [3] * 7 + [9]]
    batches = TokenBatches(rows, micro_batch=3, accumulation=1, seed=0, pad_id=0)
    sizes = {batch.input_ids.shape for step in range(1, 200) for batch in batches.step(step)}
    assert planning._largest_batch(batches).size == 27 == max(rows * width for rows, width in sizes)


@pytest.mark.slow
def test_the_verb_fits_and_prints_the_keys(folder, capsys):
    out = planned(folder, capsys, "--vram", f"{CUDA_MIB + 4}MiB", "--fit", "train.tokens=400", "train.micro_batch=4")
    assert "chosen     " in out
    assert "verdict    fits" in out
    with pytest.raises(RecipeError, match="for how much memory"):
        planned(folder, capsys, "--fit")
