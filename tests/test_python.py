"""The verbs as functions: typed results, every mistake an exception, and a process that is afterwards as it was before."""

import ast
import gc
import importlib
import inspect
import itertools
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tomli_w
import torch
from transformers import PreTrainedModel

import qlite
from qlite import Merge, QliteError, Recipe, Sampling
from qlite.data.dataset import Data
from qlite.errors import DataError, DiskError, MachineError, RecipeError, RunError
from qlite.hashes import sha256
from qlite.methods.lora import LoRA
from qlite.model.load import Base
from qlite.recipe.schema import Train
from qlite.recipe.write import recipe_differences
from qlite.train import main
from qlite.training.notebook import SilentConsole
from qlite.training.open_run import open_run
from qlite.training.run_folder import RunFolder
from qlite.training.step import Stepper
from tests.tiny_run import tiny_tables

SHORT = Sampling(max_tokens=6)
STEPS = 4
FEW = {"steps": STEPS, "accumulation": 1, "eval_every": 2, "exact_match_rows": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(recipe, result) of a run that was trained from Python."""
    recipe = tiny(tmp_path_factory.mktemp("python"))
    return recipe, qlite.train(recipe, quiet=True)


def tiny(folder: Path, train: dict | None = None, **changes: dict) -> Recipe:
    return Recipe.from_tables(tiny_tables(folder, train=FEW | (train or {}), **changes))


def adapter_sum(folder: Path) -> str:
    return sha256(folder / "adapter" / "adapter_model.safetensors")


def models_alive() -> int:
    gc.collect()
    return sum(isinstance(each, PreTrainedModel) for each in gc.get_objects())


# What is imported


def test_qlite_alone_and_the_names_of_its_verbs_import_no_torch():
    code = "import sys, qlite\nfrom qlite import train, report, QliteError\nprint(callable(train), 'torch' in sys.modules, *dir(qlite))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    has_call, has_torch, *names = done.stdout.split()
    assert (has_call, has_torch) == ("True", "False")
    assert set(names) == {*qlite.__all__, "__version__"}


@pytest.mark.parametrize("verb", qlite.VERBS)
def test_a_verb_can_be_called_in_every_order_of_imports(verb, monkeypatch):
    ways = (
        f"from qlite import {verb} as found",
        f"import qlite.{verb} as found",
        f"from qlite.{verb} import main",
        f"import importlib; found = importlib.import_module('qlite.{verb}')",
        f"import qlite; found = qlite.{verb}",
        f"from qlite import *; found = {verb}" if verb in ("train", "report") else f"from qlite.{verb} import {verb} as found",
    )
    for first, second in itertools.permutations(ways, 2):
        for name in ("qlite", f"qlite.{verb}"):
            monkeypatch.delitem(sys.modules, name)
        names: dict = {}
        for way in (first, second, f"import qlite; last = qlite.{verb}"):
            exec(way, names)
        assert callable(names.get("found", names["last"])), (first, second)
        assert names["last"] is sys.modules[f"qlite.{verb}"], (first, second)
        assert callable(names["last"].main), (first, second)
        monkeypatch.undo()


@pytest.mark.parametrize("verb", qlite.VERBS)
def test_a_verb_has_the_signature_of_its_function_and_says_what_it_does(verb):
    module = getattr(qlite, verb)
    function = getattr(module, verb)
    assert inspect.signature(module) == inspect.signature(function)
    assert all(each.annotation is not inspect.Parameter.empty for each in inspect.signature(module).parameters.values())
    assert inspect.signature(module).return_annotation is not inspect.Signature.empty
    assert "Raises:" in function.__doc__


def test_editors_are_told_the_names_that_there_are():
    tree = ast.parse(Path(qlite.__file__).read_text(encoding="utf-8"))
    (told,) = [node for node in tree.body if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"]
    places = {node.names[0].asname: f"{node.module}.{node.names[0].name}" for node in told.body}
    assert set(places) == set(qlite.__all__)
    for name, place in places.items():
        module, _, attribute = place.rpartition(".")
        found = getattr(importlib.import_module(module), attribute)
        assert found is (getattr(getattr(qlite, name), name) if name in qlite.VERBS else getattr(qlite, name))
    assert (Path(qlite.__file__).parent / "py.typed").is_file()


def test_a_name_that_is_not_there_is_an_error_that_says_what_is():
    with pytest.raises(AttributeError, match="'qlite' has no attribute 'trian'; it has: Recipe, .* train"):
        qlite.trian  # noqa: B018


# Recipes


def test_a_recipe_from_python_is_the_one_from_the_file(tmp_path):
    tables = tiny_tables(tmp_path)
    (tmp_path / "mine.toml").write_text(tomli_w.dumps(tables))
    from_file = Recipe.from_file(tmp_path / "mine.toml", {"train.steps": 20, "method.targets": ("q_proj",)})
    assert (from_file.train.steps, from_file.method.targets) == (20, ("q_proj",))
    assert recipe_differences(from_file, Recipe.from_tables(tables, {"train.steps": 20, "method.targets": ["q_proj"]})) == []


def test_tables_may_be_the_objects_that_they_make(tmp_path):
    objects = {
        "base": Base(model=str(tmp_path)),
        "method": LoRA(rank=3, targets=("q_proj", "v_proj")),
        "data": Data(train=str(tmp_path / "rows.jsonl"), columns={"prompt": "question"}),
        "train": Train(steps=3),
    }
    recipe = Recipe.from_tables(objects)
    assert {name: getattr(recipe, name) for name in objects} == objects
    assert Recipe.from_tables({**objects, "output": {"dir": tmp_path / "run"}}).output.dir == str(tmp_path / "run")
    assert Recipe.from_tables(objects, {"train.steps": None, "train.epochs": 2}).train == Train(epochs=2)


def test_everything_that_is_wrong_is_said_at_once_and_as_of_a_file(tmp_path):
    tables = {"base": {"modle": "x", "bits": 5}, "train": {"steps": "20", "epochs": 3}, "trian": {}}
    path = tmp_path / "mine.toml"
    path.write_text(tomli_w.dumps(tables))
    problems = []
    for read in (lambda: Recipe.from_tables(tables, {"lr": 1}), lambda: Recipe.from_file(path, {"lr": 1})):
        with pytest.raises(RecipeError) as error:
            read()
        problems.append(error.value.problems)
    assert problems[0] == problems[1]
    assert len(problems[0]) == 7
    assert 'lr: a change is named with its table, for example "optimizer.lr"' in problems[0]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"base": {}}, "of the type dict; a dict of tables is made one by Recipe.from_tables"),
        (3, "of the type int"),
        ("nothing.toml", "nothing.toml: cannot read the recipe"),
    ],
)
def test_what_is_no_recipe_is_refused(given, words):
    with pytest.raises(RecipeError, match=words):
        qlite.train(given)


def test_a_recipe_whose_parts_were_changed_by_hand_is_judged_again(tmp_path):
    with pytest.raises(RecipeError, match=r"train.steps = -3: should be a whole number, 1 or more"):
        qlite.train(tiny(tmp_path).having({"train.steps": -3}))


def test_a_recipe_without_a_folder_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(RecipeError, match='give output.dir = "runs/mine"'):
        qlite.train(tiny(tmp_path, output={"dir": ""}), quiet=True)


# What comes back


def test_training_returns_the_figures_of_the_folder_and_prints_nothing_if_quiet(trained, capfd):
    recipe, result = trained
    again = qlite.train(recipe, quiet=True)
    assert capfd.readouterr() == ("", "")
    assert again == result
    run = RunFolder(Path(recipe.output.dir))
    steps = [each for each in run.records.read() if each["kind"] == "step"]
    assert result.losses == {each["step"]: each["loss"] for each in steps}
    assert (result.steps, sorted(result.held_out_losses)) == (STEPS, [2, 4])
    assert result.held_out_loss == result.held_out_losses[STEPS] == run.result["eval_loss"]
    assert (result.exact_before.step, result.exact_after.step, result.exact_after.rows) == (0, STEPS, 1)
    assert result.peak_tensor_bytes == run.result["peak_tensor_bytes"] > 0
    assert Path(result) == result.folder == run.path
    assert "trained      4 steps" in str(result)
    assert str(result) == repr(result) == result._repr_mimebundle_()["text/plain"]


def test_the_command_line_trains_the_same_bytes(trained, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(tomli_w.dumps(tiny_tables(tmp_path, train=FEW)))
    main([str(path)])
    assert adapter_sum(tmp_path / "run") == adapter_sum(trained[1].folder)


def test_answers_are_those_of_the_run_opened_by_hand(trained):
    _, result = trained
    answers = qlite.generate(result, ["abc", "fade"], base=True, sampling=SHORT, quiet=True)
    opened = open_run(RunFolder(result.folder), "cpu", lambda *_: None)
    base = [answer(opened, text) for text in answers.prompts]
    opened.attach()
    assert list(answers) == list(answers.texts) == [answer(opened, text) for text in answers.prompts]
    assert list(answers.base_texts) == base
    assert (len(answers), answers[0]) == (2, answers.texts[0])
    assert str(answers).startswith(f"> abc\nbase   {base[0]}\ntuned  {answers[0]}\n\n> fade")
    assert qlite.generate(result.folder, "abc", sampling=SHORT, quiet=True).texts == answers.texts[:1]


def answer(opened, text: str) -> str:
    ids = opened.encoder.encode_prompt([{"role": "user", "content": text}])
    out = opened.base.model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, eos_token_id=opened.encoder.stop_ids)
    return opened.encoder.decode([token for token in out[0, len(ids) :].tolist() if token not in opened.encoder.stop_ids])


@pytest.mark.parametrize("prompts", [[], [3], ["abc", None], None])
def test_prompts_that_are_none_are_refused(trained, prompts):
    with pytest.raises(DataError, match="a text, or a list of texts that is not empty"):
        qlite.generate(trained[1], prompts, quiet=True)


def test_a_prompt_longer_than_the_context_is_refused(trained):
    with pytest.raises(DataError, match="this model reads at most 2048: shorten it"):
        qlite.generate(trained[1], ["abc", "abc " * 3000], quiet=True)


def test_an_export_says_where_it_is_and_how_it_was_checked(trained, tmp_path):
    _, result = trained
    merged = qlite.export(result, merge=Merge(torch.bfloat16, rows=2), out=tmp_path / "merged", quiet=True)
    assert merged.folder == tmp_path / "merged"
    assert merged.size_bytes == (tmp_path / "merged" / "model.safetensors").stat().st_size
    assert merged.audit.written.same_answers == merged.audit.written.answers == 2
    assert f"wrote {tmp_path / 'merged'}" in str(merged).replace("\n", "")
    peft = qlite.export(result, adapter="peft", out=tmp_path / "peft", quiet=True)
    assert sorted(path.name for path in Path(peft).iterdir() if path.suffix != ".json") == ["README.md", "adapter_model.safetensors"]
    with pytest.raises(RunError, match="exists already"):
        qlite.export(result, adapter="peft", out=tmp_path / "peft")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, 'give one of merge="fp16", gguf="q8_0" and adapter="peft"'),
        ({"merge": "fp16", "gguf": "q8_0"}, "give one of"),
        ({"merge": "int8"}, 'merge = "int8": should be one of fp16, bf16, fp32, or a Merge'),
        ({"adapter": "lora"}, 'adapter = "lora": should be "peft" or "gguf"'),
        ({"gguf": "q3_k"}, "q3_k"),
        ({"gguf": 3}, "--gguf 3: gguf .* cannot quantise to it"),
    ],
)
def test_an_export_of_no_known_form_is_refused(trained, options, words):
    with pytest.raises(QliteError, match=words):
        qlite.export(trained[1], **options)


def test_evaluation_and_report_are_in_the_folder(trained):
    _, result = trained
    found = qlite.evaluate(result, metrics=["loss", "exact_match"], quiet=True)
    assert found.scores["adapter"]["loss"] == pytest.approx(result.held_out_loss, abs=1e-3)
    assert set(found.scores["base"]) == {"loss", "perplexity", "exact_match"}
    assert found.file.is_file()
    assert "exact_match" in str(found)
    assert qlite.report(result) == result.report


def test_figures_that_no_disk_takes_are_in_the_error(trained, monkeypatch):
    def full(*_: object) -> None:
        raise DiskError("full")

    monkeypatch.setattr("qlite.evaluate.write_comparison", full)
    with pytest.raises(DiskError) as error:
        qlite.evaluate(trained[1], metrics="loss", base=False, quiet=True)
    assert "perplexity" in error.value._render_traceback_()[1]


def test_a_plan_is_typed_and_shows_itself(trained):
    found = qlite.plan(trained[0], vram="4GiB", quiet=True)
    assert found.fits
    assert sum(found.terms.values()) == found.peak_bytes
    assert found.peak_bytes < found.needed_bytes < found.capacity_bytes == 4 * 1024**3
    assert set(found.step_seconds) == {"RTX 3060", "RTX 4070", "RTX 4090"}
    assert "verdict    fits a card of 4.00 GiB" in str(found)
    assert "verdict    fits a card of 4.00 GiB" in found._repr_mimebundle_()["text/html"]
    with pytest.raises(RecipeError, match="give one"):
        qlite.plan(trained[0], vram="4GiB", gpu="RTX 3060")


def test_a_preview_shows_the_rows(trained):
    found = qlite.preview(trained[0], row=2, quiet=True)
    assert "row 2 (train.jsonl line 2)" in str(found)
    assert found.data.require_sound() is None
    with pytest.raises(RecipeError, match="there are 40 training rows"):
        qlite.preview(trained[0], row=41, quiet=True)


def test_a_strangers_text_is_no_markup_and_no_html(trained):
    hostile = "[red]x[/red] <script>alert(1)</script> \x1b[2J"
    shown = qlite.generate.Answers((hostile,), (hostile,))._repr_mimebundle_()
    assert "[red]x[/red] <script>" in shown["text/plain"]
    assert "<script>" not in shown["text/html"]
    assert "\x1b" not in shown["text/plain"] + shown["text/html"]


# The process afterwards


def test_threads_generators_environment_and_handlers_are_what_they_were(tmp_path):
    handlers, threads = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}, torch.get_num_threads()
    recipe = tiny(tmp_path, parallel={"threads": threads + 1}, train={"steps": 2})
    torch.manual_seed(5)
    environment, expected = dict(os.environ), torch.rand(3).tolist()
    torch.manual_seed(5)
    result = qlite.train(recipe, quiet=True)
    qlite.generate(result, "abc", sampling=SHORT, seed=3, quiet=True)
    assert torch.get_num_threads() == threads
    assert torch.rand(3).tolist() == expected
    assert dict(os.environ) == environment
    assert {number: signal.getsignal(number) for number in handlers} == handlers


@pytest.mark.slow
def test_no_model_stays_in_memory_neither_after_a_call_nor_with_an_error_that_is_kept(tmp_path, monkeypatch):
    before = models_alive()
    result = qlite.train(tiny(tmp_path, train={"steps": 2}), quiet=True)
    qlite.generate(result, "abc", sampling=SHORT, quiet=True)
    assert models_alive() == before
    monkeypatch.setattr(Stepper, "step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as kept:
        qlite.train(tiny(tmp_path, output={"dir": str(tmp_path / "other")}), quiet=True)
    assert models_alive() == before
    assert kept.traceback[-1].name == "<lambda>"


def test_the_error_that_a_caller_is_handling_keeps_its_variables():
    def fail(mine: str) -> None:
        raise ValueError("theirs")

    def handle() -> dict:
        try:
            fail("kept")
        except ValueError as theirs:
            with pytest.raises(RecipeError):
                qlite.train(3)
            return dict(theirs.__traceback__.tb_next.tb_frame.f_locals)

    assert handle() == {"mine": "kept"}


def test_memory_that_runs_out_and_a_full_disk_are_exceptions(trained, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("qlite.generate.open_run", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried ...")))
        with pytest.raises(MachineError, match=r"out of memory: CUDA out of memory. Tried"):
            qlite.generate(trained[1], "abc", quiet=True)
    monkeypatch.setattr("qlite.room.free_disk", lambda _: 0)
    with pytest.raises(DiskError, match="0 B are free"):
        qlite.train(tiny(tmp_path), quiet=True)


class Stopping:
    """A console whose third step is the moment in which ``number`` is sent to this process."""

    def __init__(self, monkeypatch, number: int):
        original = SilentConsole.step

        def step(console: SilentConsole, report) -> None:
            original(console, report)
            if report.step == 3:
                signal.raise_signal(number)

        monkeypatch.setattr(SilentConsole, "step", step)


def test_an_interrupt_leaves_a_checkpoint_and_the_same_call_goes_on(trained, tmp_path, monkeypatch):
    recipe = tiny(tmp_path, output={"save_every": 0})
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            Stopping(patch, signal.SIGINT)
            with pytest.raises(KeyboardInterrupt) as stopped:
                qlite.train(recipe, quiet=True)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, handler)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert checkpoint.name.startswith("step-00000003")
    told = stopped.value._render_traceback_()
    assert told == ["Interrupted: SIGINT", "The same call goes on from the newest checkpoint, if one was written."]
    assert adapter_sum(qlite.train(recipe, quiet=True).folder) == adapter_sum(trained[1].folder)


@pytest.mark.slow
def test_another_signal_is_handed_on_to_who_answered_it_before(tmp_path, monkeypatch):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append((number, (tmp_path / "run" / "checkpoints").is_dir())))
    try:
        Stopping(monkeypatch, signal.SIGTERM)
        with pytest.raises(BaseException, match="SIGTERM"):
            qlite.train(tiny(tmp_path, output={"save_every": 0}), quiet=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [(signal.SIGTERM, True)]


@pytest.mark.slow
def test_another_thread_trains_the_same_bytes(trained, tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(qlite.train(tiny(tmp_path), quiet=True)))
    thread.start()
    thread.join()
    assert adapter_sum(found[0].folder) == adapter_sum(trained[1].folder)


@pytest.mark.slow
def test_a_second_run_in_a_folder_that_this_process_trains_in_is_refused(tmp_path, monkeypatch):
    recipe, found = tiny(tmp_path), []

    def step(console: SilentConsole, report) -> None:
        if report.step == 2:
            with pytest.raises(RunError, match=f"process {os.getpid()} is training there") as error:
                qlite.train(recipe, quiet=True)
            found.append(error.value)

    monkeypatch.setattr(SilentConsole, "step", step)
    assert qlite.train(recipe, quiet=True).steps == STEPS
    assert len(found) == 1
