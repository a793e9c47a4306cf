"""Runs that are trained together are what each is alone: losses, adapters, folders; stopped, they go on; one that fails ends alone."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlite.errors import Diverged, MachineError, RecipeError
from qlite.recipe.read import build_recipe
from qlite.recipe.schema import Recipe
from qlite.recipe.sweep import read_sweep
from qlite.training import steps, sweep, together
from qlite.training.run_folder import RunFolder
from qlite.training.sweep import begin_sweep
from tests.marks import slow
from tests.tiny_run import STEPS, Watcher, run, save_rows, tiny_tables

KINDS = {
    "r4": {},
    "r2": {"method": {"rank": 2, "alpha": 8.0}, "optimizer": {"lr": 3e-2}, "train": {"seed": 5}},
    "other": {"method": {"rank": 3, "targets": ["q_proj", "up_proj"]}, "train": {"micro_batch": 3, "steps": 4, "eval_every": 2}},
}
# So that only rounding differs: without dropout, whose masks are drawn for all rows of a pass, and in float32.
EXACT = {"base": {"dtype": "float32"}, "method": {"dropout": 0.0}, "optimizer": {"name": "torch_adamw", "eps": 1e-4}}


class Console(Watcher):
    def __init__(self, stop_after: int | None = None):
        super().__init__()
        self.runs: dict[str, Watcher] = {}
        self._stop_after = stop_after

    def of(self, name: str) -> Watcher:
        return self.runs.setdefault(name, Watcher(self._stop_after))


def recipe_of(folder: Path, where: str, name: str, kind: dict, **more: dict) -> Recipe:
    parts = (EXACT, kind, more)
    tables = {*EXACT, *kind, *more, "output"}
    changes = {table: {key: value for part in parts for key, value in part.get(table, {}).items()} for table in tables}
    changes["output"] = {"dir": str(folder / where / name), **changes["output"]}
    return build_recipe(tiny_tables(folder, **changes), name)


def together_in(folder: Path, where: str = "all", kinds: dict = KINDS, stop_after: int | None = None, **more: dict) -> Console:
    console = Console(stop_after)
    begin_sweep({name: recipe_of(folder, where, name, kind, **more) for name, kind in kinds.items()}, False, console)
    return console


def adapter_of(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter" / "adapter_model.safetensors")


def assert_alike(one: Path, other: Path) -> None:
    a, b = adapter_of(one), adapter_of(other)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert (tensor.float() - b[name].float()).norm() <= 1e-3 * max(1e-3, b[name].float().norm()), name


WAYS = {"rows": {}, "packed": {"train": {"packing": True}}, "attention": {"memory": {"checkpointing": "attention"}}}


@pytest.mark.parametrize("way", ["rows", slow("packed"), slow("attention")])
def test_each_is_what_it_is_alone(tmp_path, way):
    more = WAYS[way]
    console = together_in(tmp_path, **more)
    for name, kind in KINDS.items():
        alone = run(recipe_of(tmp_path, "alone", name, kind, **more))
        found = console.runs[name]
        assert [step.step for step in found.steps] == [step.step for step in alone.steps]
        assert len(found.steps) == (4 if name == "other" else STEPS)
        for own, single in zip(found.steps, alone.steps, strict=True):
            assert own.loss == pytest.approx(single.loss, rel=1e-4)
            assert own.grad_norm == pytest.approx(single.grad_norm, rel=1e-3)
            assert (own.lr, own.tokens, own.trained_tokens) == (single.lr, single.tokens, single.trained_tokens)
        assert [each.step for each in found.evaluations] == [each.step for each in alone.evaluations]
        assert found.evaluations[-1].loss == pytest.approx(alone.evaluations[-1].loss, rel=1e-4)
        assert_alike(tmp_path / "all" / name, tmp_path / "alone" / name)
        folder = RunFolder(tmp_path / "all" / name)
        assert folder.is_finished
        assert folder.report.is_file()
        assert folder.result["steps"] == len(found.steps)


def test_their_rows_go_through_the_base_in_one_pass(tmp_path, monkeypatch):
    seen = []
    joint = together.hidden_states
    monkeypatch.setattr(together, "hidden_states", lambda model, ids, *others: seen.append(len(ids)) or joint(model, ids, *others))
    together_in(tmp_path)
    assert seen == 4 * 3 * [7] + 2 * 3 * [4]  # micro-batches of 2, 2 and 3 rows, until the shorter run is done


@pytest.mark.parametrize("stop_after", [slow(1), 4])
def test_stopped_they_go_on_to_the_same_end(tmp_path, stop_after):
    together_in(tmp_path, "straight")
    with pytest.raises(KeyboardInterrupt):
        together_in(tmp_path, "stopped", stop_after=stop_after)
    console = together_in(tmp_path, "stopped")
    assert any("going on after step" in note for note in console.runs["r4"].notes) == (stop_after > 2)
    for name in KINDS:
        assert_alike(tmp_path / "straight" / name, tmp_path / "stopped" / name)


class StopIn(Watcher):
    """Stops the process, as Ctrl-C does, while ``name`` is evaluated after ``step``."""

    def __init__(self, step: int):
        super().__init__()
        self._stop_in = step

    def phase(self, name: str, done: int, total: int) -> None:
        if name == "evaluate" and self.steps and self.steps[-1].step == self._stop_in and self._stop_in:
            self._stop_in = 0
            signal.raise_signal(signal.SIGINT)


def test_a_signal_in_an_evaluation_loses_no_step_of_any_run(tmp_path):
    together_in(tmp_path, "straight", output={"save_every": 0})
    console = Console()
    console.runs["r2"] = StopIn(3)
    recipes = {name: recipe_of(tmp_path, "stopped", name, kind, output={"save_every": 0}) for name, kind in KINDS.items()}
    with pytest.raises(KeyboardInterrupt):
        begin_sweep(recipes, False, console)
    assert "r4 after step 3, r2 after step 3, other after step 3" in console.notes[-1]
    console = together_in(tmp_path, "stopped", output={"save_every": 0})
    assert [step.step for step in console.runs["r4"].steps] == [4, 5, 6]
    for name in KINDS:
        assert_alike(tmp_path / "straight" / name, tmp_path / "stopped" / name)


@pytest.mark.slow
def test_all_make_their_step_before_any_is_evaluated(tmp_path, monkeypatch):
    """So no step's time holds another run's evaluation."""
    seen = []
    for name in ("advance", "conclude"):
        real = getattr(together, name)
        monkeypatch.setattr(together, name, lambda *given, real=real, name=name: seen.append(name) or real(*given))
    together_in(tmp_path)
    assert seen == [*(4 * (3 * ["advance"] + 3 * ["conclude"])), *(2 * (2 * ["advance"] + 2 * ["conclude"]))]


def test_what_all_answer_before_their_first_step_is_answered_once(tmp_path, monkeypatch):
    seen, real = [], steps.compare_answers
    monkeypatch.setattr(steps, "compare_answers", lambda *given: seen.append(given[3]) or real(*given))
    console = together_in(tmp_path, kinds={"r4": KINDS["r4"], "r2": KINDS["r2"], "fewer": {"train": {"exact_match_rows": 2}}})
    assert seen == [0, 0, STEPS, STEPS, STEPS]
    for name, watcher in console.runs.items():
        assert [(each.step, each.rows) for each in watcher.answers] == [(step, 2 if name == "fewer" else 3) for step in (0, STEPS)]


def test_records_may_lose_lines_where_a_full_disk_ends_nothing(tmp_path, monkeypatch):
    seen = []
    finish = sweep.finish
    monkeypatch.setattr(sweep, "finish", lambda parts, run, *rest: seen.append(run.records.may_lose_lines) or finish(parts, run, *rest))
    together_in(tmp_path, output={"on_full_disk": "continue"})
    assert seen == [True, True, True]


def test_a_run_that_is_left_alone_is_measured_too(tmp_path):
    together_in(tmp_path, kinds={"r4": KINDS["r4"]})
    assert "training" in json.loads((tmp_path / "all" / "r4" / "memory.json").read_text())["measured"]


def test_a_run_killed_between_its_result_and_its_report_gets_one(tmp_path):
    together_in(tmp_path, kinds={"r4": KINDS["r4"]})
    (tmp_path / "all" / "r4" / "report.html").unlink()
    together_in(tmp_path, kinds={"r4": KINDS["r4"]})
    assert (tmp_path / "all" / "r4" / "report.html").is_file()


@pytest.mark.slow
def test_finished_runs_are_left_as_they_are(tmp_path):
    together_in(tmp_path, kinds={"r4": KINDS["r4"]})
    before = (tmp_path / "all" / "r4" / "result.json").read_bytes()
    console = together_in(tmp_path)
    assert "finished already: r4" in console.notes[0]
    assert not console.runs.get("r4", Watcher()).steps
    assert (tmp_path / "all" / "r4" / "result.json").read_bytes() == before
    assert console.runs["r2"].steps


def test_where_memory_runs_out_each_makes_its_step_alone_and_the_end_is_the_same(tmp_path, monkeypatch):
    together_in(tmp_path, "enough")
    joint = together.hidden_states

    def little(model, ids, *others):
        if len(ids) > 4:
            raise torch.OutOfMemoryError("no room")
        return joint(model, ids, *others)

    monkeypatch.setattr(together, "hidden_states", little)
    console = together_in(tmp_path, "little")
    assert "out of memory in a pass of 3 runs together: from now on at most 2 runs in a pass" in console.notes[-1]
    for name in KINDS:
        assert_alike(tmp_path / "enough" / name, tmp_path / "little" / name)


@pytest.mark.slow
def test_one_whose_loss_is_no_number_ends_and_the_others_go_on(tmp_path):
    bad = {"method": {"rank": 2, "alpha": 1e38}, "optimizer": {"lr": 10.0}, "train": {"max_skipped": 0}}
    kinds = {"good": KINDS["r4"], "bad": bad}
    with pytest.raises(Diverged, match="bad: "):
        together_in(tmp_path, kinds=kinds)
    assert RunFolder(tmp_path / "all" / "good").is_finished
    assert not RunFolder(tmp_path / "all" / "bad").is_finished
    run(recipe_of(tmp_path, "alone", "good", KINDS["r4"]))
    assert_alike(tmp_path / "all" / "good", tmp_path / "alone" / "good")


def test_what_is_planned_is_what_is_measured(tmp_path):
    kinds = {name: KINDS[name] for name in ("r4", "r2")}
    together_in(tmp_path, kinds=kinds, memory={"plan": "require", "checkpointing": "block"}, train={"exact_match_rows": 0})
    memory = json.loads((tmp_path / "all" / "r4" / "memory.json").read_text())
    for phase in ("training", "optimizer"):
        planned, measured = memory["planned"]["phases"][phase]["bytes"], memory["measured"][phase]["bytes"]
        assert measured <= planned * 1.02, phase
        assert planned <= measured * 1.2, phase


def test_a_plan_that_does_not_fit_begins_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("qlite.device.free_memory", lambda _: 1 << 20)
    with pytest.raises(MachineError, match="Train fewer runs together"):
        together_in(tmp_path, memory={"plan": "require"})
    assert not (tmp_path / "all" / "r4").exists()


SWEEP = 'recipe = "tiny.toml"\n[runs.r4]\nmethod.rank = 4\n[runs.r2]\nmethod.rank = 2\noptimizer.lr = 5e-4\n'
RECIPE = '[base]\nmodel = "some/model"\n\n[data]\ntrain = "rows.jsonl"\n\n[train]\nsteps = 20\n'


def sweep_file(folder: Path, text: str) -> Path:
    (folder / "tiny.toml").write_text(RECIPE)
    path = folder / "ranks.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("method.rank=3", "method.rank: is set for this run and on the command line, too; leave it out of one"),
        ("output.dir=elsewhere", "output.dir: a sweep's runs stand in runs/ranks, each under its name; leave it out"),
    ],
)
def test_what_a_command_line_could_not_do_is_refused(tmp_path, override, problem):
    with pytest.raises(RecipeError) as caught:
        read_sweep(sweep_file(tmp_path, SWEEP), [override])
    assert any(problem in each for each in caught.value.problems), caught.value.problems


def test_a_recipe_is_no_sweep(tmp_path):
    sweep_file(tmp_path, SWEEP)
    with pytest.raises(RecipeError, match="this is a recipe, and a sweep is wanted"):
        read_sweep(tmp_path / "tiny.toml", [])


def test_a_sweep_file_is_its_recipe_with_each_runs_keys_over_it(tmp_path):
    found = read_sweep(sweep_file(tmp_path, SWEEP), ["train.steps=7"])
    assert list(found) == ["r4", "r2"]
    assert [recipe.method.rank for recipe in found.values()] == [4, 2]
    assert [recipe.optimizer.lr for recipe in found.values()] == [2e-4, 5e-4]
    assert {recipe.train.steps for recipe in found.values()} == {7}
    assert [recipe.output.dir for recipe in found.values()] == ["runs/ranks/r4", "runs/ranks/r2"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", 'recipe: is not given; say which recipe all runs share: recipe = "../quickstart.toml"'),
        ('recipe = "tiny.toml"\n', "[runs.NAME]: no run is given"),
        ('recipe = "no.toml"\n[runs.a]\n', "there is no file"),
        (SWEEP + "[run]\n", "run: a sweep has recipe and runs, and no such key"),
        (SWEEP + "[runs.x]\nrank = 4\n", "[runs.x] rank: a key has its table before it, as in method.rank = 4"),
        (SWEEP + "[runs.x]\nmethod.rnak = 4\n", '[runs.x] method.rnak = 4: no such key; did you mean "rank"?'),
        (SWEEP + '[runs."../x"]\nmethod.rank = 4\n', "its name is a folder's"),
        (SWEEP + "[runs.x]\nbase.bits = 8\n", "[runs.x] base.bits: 4 -> 8: has to be the same as in [runs.r4]"),
        (SWEEP + "[runs.x]\ntrain.packing = true\n", "[runs.x] train.packing: false -> true: has to be the same"),
        (SWEEP + '[runs.x]\nmethod.modules_to_save = ["lm_head"]\n', "method.modules_to_save: only low-rank pairs are trained with others"),
        (SWEEP + '[runs.x]\nmethod.init = "pissa"\n', "changes the base's weights, and all runs share them; train it alone"),
        ('recipe = "tiny.toml"\n[runs.a]\nmemory.mlp_chunk = 64\n', "memory.mlp_chunk: is not there for runs that are trained together"),
    ],
)
def test_what_is_wrong_with_a_sweep_is_said_by_file_run_key_and_fix(tmp_path, text, problem):
    path = sweep_file(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        read_sweep(path, [])
    assert any(problem in each for each in caught.value.problems), caught.value.problems


@pytest.mark.slow
def test_runs_may_have_rows_of_their_own(tmp_path):
    tiny_tables(tmp_path)
    save_rows(tmp_path / "more.jsonl", 30, seed=9)
    kinds = {"a": KINDS["r4"], "b": {**KINDS["r4"], "data": {"train": str(tmp_path / "more.jsonl")}}}
    together_in(tmp_path, kinds=kinds)
    for name, kind in kinds.items():
        run(recipe_of(tmp_path, "alone", name, kind))
        assert_alike(tmp_path / "all" / name, tmp_path / "alone" / name)
