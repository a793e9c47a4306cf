"""Whole runs on a tiny model: what is written, that it can be gone on with bit for bit, and that it never guesses."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli_w
import torch
from safetensors.torch import load_file, save_file

from qlite.data.batches import TokenBatches
from qlite.errors import QliteError, RecipeError, RunError
from qlite.files import is_whole
from qlite.hashes import sha256
from qlite.recipe.read import build_recipe
from qlite.train import main
from qlite.training import records, steps
from qlite.training.report import EvalReport
from qlite.training.run import train
from qlite.training.run_folder import RunFolder, find_run
from qlite.training.state import TrainState
from tests.marks import slow
from tests.tiny_run import STEPS, Watcher, run, tiny_recipe, tiny_tables


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never interrupted: (folder of its files, recipe, what was seen)."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = tiny_recipe(folder)
    return folder, recipe, run(recipe)


def adapter_sum(folder: Path) -> str:
    return sha256(folder / "run" / "adapter" / "adapter_model.safetensors")


def tensors(folder: Path) -> dict[str, bytes]:
    """Return the tensors of an adapter folder, bit for bit; what stands beside them in the file is the finished adapter's alone."""
    return {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}


def losses(folder: Path) -> list[str]:
    return [repr(r["loss"]) for r in RunFolder(folder / "run").records.read() if r["kind"] == "step"]


def test_a_run_leaves_adapter_recipe_metrics_versions_and_result(whole):
    folder, recipe, _ = whole
    written = {str(p.relative_to(folder / "run")) for p in (folder / "run").rglob("*") if p.is_file()}
    step = f"checkpoints/step-{STEPS:08d}"
    assert {
        "recipe.toml",
        "run.json",
        "data.json",
        "template.jinja",
        "metrics.jsonl",
        "result.json",
        "overview.json",
        "report.html",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        f"{step}/adapter_model.safetensors",
        f"{step}/optimizer.safetensors",
        f"{step}/state.json",
        f"{step}/manifest.json",
    } <= written
    assert {Path(name).suffix for name in written} == {".toml", ".json", ".jsonl", ".jinja", ".safetensors", ".html"}
    # Without a plan, memory.checkpointing = "auto" is what needs least.
    assert RunFolder(folder / "run").recipe() == recipe.having({"memory.checkpointing": "block"})
    assert {"qlite", "torch", "bitsandbytes", "device", "threads"} <= json.loads((folder / "run" / "run.json").read_text()).keys()


def test_metrics_hold_a_record_a_step_and_every_evaluation(whole):
    folder, _, seen = whole
    records = RunFolder(folder / "run").records.read()
    kinds = [r["kind"] for r in records if r["kind"] != "note"]
    assert kinds == ["answers", "step", "step", "step", "eval", "step", "step", "step", "eval", "answers"]
    first = next(r for r in records if r["kind"] == "step")
    assert first["loss"] == seen.steps[0].loss
    assert first["tokens_per_second"] > 0
    assert first["memory_used"] > 0


def test_it_learns(whole):
    _, _, seen = whole
    assert seen.steps[-1].loss < seen.steps[0].loss - 0.2
    assert seen.evaluations[-1].loss < seen.evaluations[0].loss


def test_only_the_newest_checkpoints_are_kept(whole):
    folder, _, _ = whole
    kept = sorted(p.name for p in (folder / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000006"]
    assert all(is_whole(folder / "run" / "checkpoints" / name) for name in kept)


@pytest.mark.parametrize("stop_after", range(1, STEPS + 1))
def test_stopped_after_any_step_the_same_command_gives_the_same_bytes(whole, tmp_path, stop_after):
    folder, _, _ = whole
    recipe = tiny_recipe(tmp_path)
    run(recipe, stop_after)
    assert not RunFolder(tmp_path / "run").is_finished
    seen = run(recipe)
    assert adapter_sum(tmp_path) == adapter_sum(folder)
    assert losses(tmp_path) == losses(folder)
    resumed_from = (stop_after - 1) // 2 * 2  # a checkpoint every 2 steps; the stop comes before that of its own step
    assert seen.steps[0].step == resumed_from + 1


@pytest.mark.parametrize("optimizer", ["paged_adamw", "lion8bit", "torch_adamw"])
def test_so_does_every_kind_of_optimizer(tmp_path, optimizer):
    sums = []
    for name, stop in (("through", None), ("stopped", 3)):
        (tmp_path / name).mkdir()
        recipe = tiny_recipe(tmp_path / name, optimizer={"name": optimizer})
        if stop:
            run(recipe, stop)
        run(recipe)
        sums.append(adapter_sum(tmp_path / name))
    assert sums[0] == sums[1]


def test_evaluations_in_between_change_no_bit_of_the_training(whole, tmp_path):
    folder, _, _ = whole
    run(tiny_recipe(tmp_path, train={"eval_every": 1, "exact_match_rows": 0}))
    assert adapter_sum(tmp_path) == adapter_sum(folder)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(whole, tmp_path):
    folder, _, _ = whole
    recipe = tiny_recipe(tmp_path)
    run(recipe, stop_after=5)
    newest = tmp_path / "run" / "checkpoints" / "step-00000004" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    assert run(recipe).steps[0].step == 3
    assert adapter_sum(tmp_path) == adapter_sum(folder)


def test_a_changed_recipe_is_refused_with_the_key_old_and_new(whole, tmp_path):
    recipe = tiny_recipe(tmp_path)
    run(recipe, stop_after=1)
    with pytest.raises(RunError, match=r"train.seed: 0 -> 1.*optimizer.lr: 0.01 -> 0.02|optimizer.lr: 0.01 -> 0.02.*train.seed: 0 -> 1"):
        run(tiny_recipe(tmp_path, train={"seed": 1}, optimizer={"lr": 0.02}))


@pytest.mark.parametrize(
    "changes", [{"base": {"model": "./nothing"}}, {"method": {"targets": ["q_prj"]}}, {"data": {"train": "nothing.jsonl"}}]
)
def test_a_run_that_cannot_begin_leaves_no_folder_behind(tmp_path, changes):
    with pytest.raises(QliteError):
        run(tiny_recipe(tmp_path, **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stop_after", [*map(slow, range(1, 6)), 6])
def test_so_it_does_over_the_edges_of_epochs(tmp_path, stop_after):
    """Two steps an epoch: stops in the middle of one, on its edge, and after the very last step."""
    sums, changes = [], {"train": {"accumulation": 10, "steps": 6, "eval_every": 0, "exact_match_rows": 0}, "output": {"save_every": 1}}
    for name, stop in (("through", None), ("stopped", stop_after)):
        (tmp_path / name).mkdir()
        recipe = tiny_recipe(tmp_path / name, **changes)
        if stop:
            run(recipe, stop)
        seen = run(recipe)
        sums.append((adapter_sum(tmp_path / name), losses(tmp_path / name)))
    assert sums[0] == sums[1]
    assert [report.epoch for report in seen.steps] == [step / 2 for step in range(max(1, stop_after), 7)]


def test_another_machine_is_said_on_resuming(tmp_path):
    recipe = tiny_recipe(tmp_path)
    run(recipe, stop_after=3)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**facts, "torch": "2.7.0"}))
    assert any("torch: 2.7.0 -> " in note for note in run(recipe).notes)


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="holds something else"):
        run(tiny_recipe(tmp_path))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_finished_run_typed_again_does_nothing_and_fresh_starts_anew(whole, tmp_path, capsys, monkeypatch):
    tables = tiny_tables(tmp_path, train={"steps": 2, "exact_match_rows": 1})
    path = tmp_path / "mine.toml"
    path.write_text(tomli_w.dumps(tables))
    main([str(path)])
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    (tmp_path / "run" / "report.html").unlink()  # as if killed just before it was written
    (tmp_path / "run" / ".report.html.tmp-00000000-1").write_text("half")
    main([str(path)])
    assert (tmp_path / "run" / "report.html").is_file()
    assert not (tmp_path / "run" / ".report.html.tmp-00000000-1").exists()
    assert "finished already" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    main([str(path), "--fresh", "train.seed=1"])
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() != before
    assert find_run(None, tmp_path).path == tmp_path / "run"


def test_the_closing_words_name_figures_and_the_next_command(tmp_path, capsys):
    path = tmp_path / "mine.toml"
    path.write_text(tomli_w.dumps(tiny_tables(tmp_path, train={"steps": 2})))
    main([str(path)])
    words = capsys.readouterr().out
    for part in ("tokens/s", "exact match", "before training", "peak memory", "qlite.export --merge", "qlite.generate"):
        assert part in words


def test_fresh_deletes_the_old_run_only_once_the_new_one_can_begin(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(tomli_w.dumps(tiny_tables(tmp_path, train={"steps": 2})))
    main([str(path)])
    (tmp_path / "run" / "notes.txt").write_text("mine")
    before = adapter_sum(tmp_path)
    with pytest.raises(QliteError):
        main([str(path), "--fresh", "base.model=./nothing"])
    assert RunFolder(tmp_path / "run").is_finished
    assert adapter_sum(tmp_path) == before
    main([str(path), "--fresh", "train.seed=3"])
    assert adapter_sum(tmp_path) != before
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_a_recipe_alone_does_not_make_a_folder_ours(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.toml").write_text("mine")
    with pytest.raises(RunError, match="holds something else"):
        run(tiny_recipe(tmp_path))
    RunFolder(folder).discard()
    assert (folder / "recipe.toml").read_text() == "mine"


def test_a_line_of_metrics_cut_short_by_a_crash_stops_nothing(tmp_path):
    recipe = tiny_recipe(tmp_path)
    run(recipe, stop_after=3)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "answers", "samples": [["a", "{}')
    assert run(recipe).steps[-1].step == STEPS


def test_a_long_log_is_continued_in_another_file_and_read_as_one(whole, tmp_path, monkeypatch):
    folder, _, _ = whole
    monkeypatch.setattr(records, "LOG_BYTES", 500)
    recipe = tiny_recipe(tmp_path, output={"save_every": 1, "keep": 9})
    run(recipe, stop_after=4)
    logs = sorted(path.name for path in (tmp_path / "run").glob("metrics*"))
    assert logs[:2] == ["metrics-0001.jsonl", "metrics-0002.jsonl"]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000003")  # the second is what is gone on with: older files are cut, too
    run(recipe)
    assert losses(tmp_path) == losses(folder)
    assert RunFolder(tmp_path / "run").result["steps"] == STEPS
    RunFolder(tmp_path / "run").discard()
    assert not list((tmp_path / "run").glob("metrics*"))


@pytest.mark.parametrize("jump", [-86_400, 10 * 365 * 86_400])
def test_a_clock_that_jumps_changes_nothing(whole, tmp_path, monkeypatch, jump):
    """Which checkpoint is the newest is a matter of steps; and what is measured is measured by a clock that nobody sets."""
    folder, _, _ = whole
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + jump)
    recipe = tiny_recipe(tmp_path)
    run(recipe, stop_after=5)
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    for number, path in enumerate(reversed(checkpoints)):  # the newest looks oldest
        os.utime(path, (number, number))
        os.utime(path / "manifest.json", (number, number))
    seen = run(recipe)
    assert seen.steps[0].step == 5
    assert adapter_sum(tmp_path) == adapter_sum(folder)
    assert all(record["seconds"] >= 0 for record in RunFolder(tmp_path / "run").records.read() if "seconds" in record)


@pytest.mark.parametrize("name", ["data.json", "template.jinja", "run.json", "recipe.toml", "adapter"])
@pytest.mark.parametrize("fresh", [False, True])
def test_files_of_the_users_own_are_never_written_over(tmp_path, name, fresh):
    recipe = tiny_recipe(tmp_path, train={"steps": 2})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    with pytest.raises(RunError, match=f"holds something else .{name}"):
        train(recipe, RunFolder(tmp_path / "run"), Watcher(), fresh)
    assert [(path.name, path.read_text()) for path in (tmp_path / "run").iterdir()] == [(name, "mine")]


@pytest.mark.parametrize("name", ["recipe.toml", "run.json", "result.json"])
def test_damaged_files_of_a_run_are_named(tmp_path, name):
    recipe = tiny_recipe(tmp_path, train={"steps": 2})
    run(recipe)
    (tmp_path / "run" / name).write_text("{")
    again = {"result.json": lambda: RunFolder(tmp_path / "run").result}.get(name, lambda: run(recipe))
    with pytest.raises(RunError, match=name):
        again()


def test_where_it_is_written_is_no_part_of_what_a_run_is(tmp_path):
    run(tiny_recipe(tmp_path), stop_after=3)
    assert run(tiny_recipe(tmp_path, output={"keep": 5, "save_every": 1})).steps[0].step == 3


def test_a_warm_up_longer_than_the_epochs_is_refused(tmp_path):
    tables = tiny_tables(tmp_path, train={"epochs": 1}, schedule={"warmup_steps": 50})
    del tables["train"]["steps"]
    with pytest.raises(RecipeError, match="warmup_steps = 50: not less than the run's 7 steps"):
        run(build_recipe(tables, "tiny.toml"))


def test_find_run_says_what_is_wrong(tmp_path):
    with pytest.raises(RunError, match="no finished run under"):
        find_run(None, tmp_path)
    with pytest.raises(RunError, match="is no run folder"):
        find_run(str(tmp_path), tmp_path)
    recipe = tiny_recipe(tmp_path)
    run(recipe, stop_after=1)
    with pytest.raises(RunError, match="is not finished"):
        find_run(str(tmp_path / "run"), tmp_path)


def test_nothing_non_finite_and_no_float32_is_in_a_checkpoint_of_a_bfloat16_run(whole):
    folder, _, _ = whole
    tensors = load_file(folder / "run" / "adapter" / "adapter_model.safetensors")
    assert {str(t.dtype) for t in tensors.values()} == {"torch.bfloat16"}
    assert all(t.isfinite().all() for t in tensors.values())


def rows_changed(folder: Path) -> None:
    path = folder / "train.jsonl"
    path.write_text(path.read_text().replace('"prompt": "', '"prompt": "b', 1))


def template_changed(folder: Path) -> None:
    path = folder / "base" / "chat_template.jinja"
    path.write_text(path.read_text() + "{# of another release #}")


def base_trained_further(folder: Path) -> None:
    path = folder / "base" / "model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


CHANGES = [(rows_changed, "data.train"), (template_changed, "data.template"), (base_trained_further, "base.model")]


@pytest.mark.parametrize(("change", "key"), CHANGES)
def test_changed_data_and_templates_are_refused_with_key_old_and_new(tmp_path, change, key):
    recipe = tiny_recipe(tmp_path)
    run(recipe, stop_after=3)
    change(tmp_path)
    with pytest.raises(RunError, match=rf"what is behind {key} has changed since .{key}: [0-9a-f]{{32}} -> [0-9a-f]{{32}}.*--fresh"):
        run(recipe)


def test_a_packed_run_learns_and_goes_on_with_the_same_bits(tmp_path):
    sums, changes = [], {"train": {"packing": True, "tokens": 96, "accumulation": 1, "exact_match_rows": 0}}
    for name, stop in (("through", None), ("stopped", 3)):
        (tmp_path / name).mkdir()
        recipe = tiny_recipe(tmp_path / name, **changes)
        if stop:
            run(recipe, stop)
        seen = run(recipe)
        sums.append(adapter_sum(tmp_path / name))
    assert sums[0] == sums[1]
    assert seen.steps[-1].tokens > 150  # two lines of up to 96 tokens, nearly full
    assert seen.steps[-1].loss < 4.6


def best_of(folder: Path) -> tuple[int, float]:
    evaluations = [r for r in RunFolder(folder / "run").records.read() if r["kind"] == "eval"]
    best = min(evaluations, key=lambda r: r["loss"])
    return best["step"], best["loss"]


STALLING = {
    "train": {"steps": 80, "eval_every": 1, "patience": 3, "exact_match_rows": 0, "accumulation": 1},
    "optimizer": {"lr": 0.1},
    "output": {"adapter": "best", "save_every": 100, "keep": 100},
}


@pytest.mark.parametrize("stop_after", [None, 2])
def test_a_run_that_no_longer_gains_stops_early_and_ends_with_the_best_adapter(tmp_path, stop_after):
    recipe = tiny_recipe(tmp_path, **STALLING)
    if stop_after:
        run(recipe, stop_after)
    seen = run(recipe)
    step, loss = best_of(tmp_path)
    last = seen.steps[-1].step
    assert last == step + 3 < 80
    assert any(f"stopped after step {last}: 3 evaluations" in note for note in seen.notes)
    result = RunFolder(tmp_path / "run").result
    assert (result["best_step"], result["best_loss"], result["steps"]) == (step, loss, last)
    # The adapter written is that of the best step, bit for bit, not that of the last.
    (tmp_path / "again").mkdir()
    changes = {**STALLING, "output": {"adapter": "last", "save_every": 1, "keep": 100}}
    run(tiny_recipe(tmp_path / "again", **changes))
    checkpoints = tmp_path / "again" / "run" / "checkpoints"
    assert tensors(tmp_path / "run" / "adapter") == tensors(checkpoints / f"step-{step:08d}")
    assert tensors(tmp_path / "run" / "adapter") != tensors(checkpoints / f"step-{last:08d}")


def test_a_run_that_has_stopped_early_does_not_go_on_when_it_is_finished_later(tmp_path):
    recipe = tiny_recipe(tmp_path, **STALLING)
    run(recipe)
    (tmp_path / "run" / "result.json").unlink()
    before = adapter_sum(tmp_path)
    assert run(recipe).steps == []
    assert adapter_sum(tmp_path) == before


def test_the_best_adapter_survives_a_resume_whose_evaluations_come_out_otherwise(tmp_path, monkeypatch):
    # As on a GPU: step 3 was the best before the stop, and is not when it is done again.
    losses = {1: 5.0, 2: 4.0, 3: 3.0}
    monkeypatch.setattr(steps, "evaluate", lambda *_: EvalReport(_[3], losses.get(_[3], 4.5), 1.0, 7, 1, 0.0))
    changes = {"train": {"eval_every": 1, "exact_match_rows": 0}, "output": {"adapter": "best", "save_every": 2}}
    run(tiny_recipe(tmp_path, **changes), stop_after=4)
    kept = tensors(tmp_path / "run" / "best" / "step-00000002")
    losses[3] = 4.1
    run(tiny_recipe(tmp_path, **changes))
    assert RunFolder(tmp_path / "run").result["best_step"] == 2
    assert tensors(tmp_path / "run" / "adapter") == kept


def test_best_adapters_that_no_checkpoint_knows_are_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "evaluate", lambda *_: EvalReport(_[3], 10.0 - _[3], 1.0, 7, 1, 0.0))
    changes = {"train": {"eval_every": 1, "exact_match_rows": 0}, "output": {"adapter": "best", "save_every": 2, "keep": 1}}
    run(tiny_recipe(tmp_path, **changes))
    assert [path.name for path in (tmp_path / "run" / "best").iterdir()] == ["step-00000006"]


def test_a_held_out_loss_that_is_no_number_is_never_the_best():
    state = TrainState(step=1).after(float("nan")).after(3.0)
    assert (state.best_loss, state.best_step, state.stale) == (3.0, 1, 0)
    assert state.after(float("nan")).stale == 1


def test_samples_are_answered_at_every_evaluation_and_kept(tmp_path):
    recipe = tiny_recipe(tmp_path, train={"samples": ["abc", "fed"], "exact_match_rows": 0})
    seen = run(recipe)
    assert [report.step for report in seen.samples] == [3, 6]
    assert [prompt for prompt, _ in seen.samples[0].samples] == ["abc", "fed"]
    assert any(answer for report in seen.samples for _, answer in report.samples)
    assert [r["step"] for r in RunFolder(tmp_path / "run").records.read() if r["kind"] == "samples"] == [3, 6]


def test_samples_change_no_bit_of_the_training(whole, tmp_path):
    folder, _, _ = whole
    run(tiny_recipe(tmp_path, train={"samples": ["abc"], "exact_match_rows": 0}))
    assert adapter_sum(tmp_path) == adapter_sum(folder)


def test_the_largest_batch_is_trained_first(whole):
    _, recipe, _ = whole
    rows = [json.loads(line) for line in Path(recipe.data.train).read_text().splitlines()]
    assert any(len(row["prompt"]) == 6 for row in rows)
    data = recipe.data.load(recipe.base.tokenizer(lambda *_: None), 64, lambda _: None)
    batches = TokenBatches(data.train, 2, 3, recipe.train.seed, 0)
    sizes = [[batch.input_ids.numel() for batch in batches.step(step)] for step in range(1, batches.steps_per_epoch + 1)]
    assert sizes[0][0] == max(max(step) for step in sizes)


def kill_once(command: list[str], folder: Path, delay: float) -> bool:
    """Start the run, kill its process group ``delay`` seconds after its first step; return whether it was killed in time."""
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    metrics = folder / "run" / "metrics.jsonl"
    before = metrics.read_text().count('"step"') if metrics.exists() else 0
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count('"step"') > before):
        time.sleep(0.005)
    time.sleep(delay)
    in_time = process.poll() is None
    if in_time:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return in_time


@pytest.mark.crash
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="process groups are of POSIX")
def test_killed_with_sigkill_the_same_command_gives_the_same_bytes(tmp_path):
    changes = {"train": {"steps": 60, "eval_every": 0, "exact_match_rows": 0}, "output": {"save_every": 7}}
    sums = []
    for name in ("through", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "mine.toml").write_text(tomli_w.dumps(tiny_tables(folder, **changes)))
        command = [sys.executable, "-m", "qlite.train", str(folder / "mine.toml")]
        if name == "killed":
            chance = random.Random(0)
            kills = sum(kill_once(command, folder, chance.uniform(0, 0.3)) for _ in range(2))
            assert kills > 0
            assert not RunFolder(folder / "run").is_finished
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        sums.append((adapter_sum(folder), losses(folder)))
    assert sums[0] == sums[1]
