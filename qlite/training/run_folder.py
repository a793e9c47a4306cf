"""A run's folder: frozen recipe, versions, metrics, checkpoints, the finished adapter. Safetensors, JSON and TOML only.

runs/quickstart/
  recipe.toml     every key, paths absolute      run.json        versions, device, threads
  template.jinja  the chat template, if any      data.json       hashes of data, template, base
  metrics.jsonl   one record a step              result.json     written last: the run is finished
  checkpoints/step-00000020/                     adapter/        PEFT's two files
  memory.json     plan against measured, by phase and term      overview.json   rows, lengths, trained parameters
  report.html     all of it to be looked at
  best/step-00000015/  the adapter of the lowest held-out loss so far
  logs/           what TensorBoard, W&B and MLflow keep of it here, if output.loggers names them
"""

import json
import os
import tomllib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qlite.errors import Diverged, RunError
from qlite.files import (
    is_whole,
    new_folder,
    remove_empty,
    remove_file,
    remove_folder,
    remove_tree,
    set_aside,
    sweep,
    write_json,
    write_tensors,
    write_text,
)
from qlite.formats.peft import CONFIG, PEFT, WEIGHTS, adapter_tensors, copy_adapter, read_tensors, write_adapter
from qlite.optim.build import FlatOptimizer
from qlite.recipe.read import build_recipe
from qlite.recipe.schema import Recipe
from qlite.recipe.write import recipe_differences, recipe_toml
from qlite.reporting.document import is_ours
from qlite.training.provenance import versions
from qlite.training.records import Records
from qlite.training.report import AnswerReport, EvalReport, SampleReport, StepReport
from qlite.training.state import TrainState

BEGINNING = ("run.json", "data.json", "template.jinja")
"""What is written before recipe.toml, with which a run is begun."""
UNEVALUATED = "-unevaluated"
"""Ends the name of a checkpoint of a run that was stopped in the evaluation after its step: the run goes on with that evaluation."""
MAY_CHANGE = (
    "memory.plan", "memory.budget", "memory.checkpointing", "memory.loss_chunk", "memory.mlp_chunk", "memory.embedding", "memory.base",
    "memory.saved_inputs", "base.cache", "base.fused", "train.max_skipped",
)  # fmt: skip
"""The keys with which a run may go on otherwise: they decide where it computes, at most how it rounds, or when it gives up."""


class RunFolder:
    """One run on disk; as an Observer it writes metrics.jsonl."""

    def __init__(self, path: Path):
        self.path = path
        self.adapter, self.records, self.report = path / "adapter", Records(path), path / "report.html"
        self.logs = path / "logs"

    @property
    def peft_adapter(self) -> Path:
        """Where the finished adapter stands in PEFT's format, if PEFT has its type."""
        return beneath if (beneath := self.adapter / PEFT).is_dir() else self.adapter

    @property
    def is_known_to_peft(self) -> bool:
        """Whether PEFT has a type for what the run has trained: one of its config files is there."""
        return (self.peft_adapter / CONFIG).is_file()

    @property
    def is_begun(self) -> bool:
        """Whether a run of qlite's was begun here: a recipe alone may be anybody's."""
        return all((self.path / name).is_file() for name in ("recipe.toml", "run.json"))

    @property
    def is_finished(self) -> bool:
        return self.is_begun and (self.path / "result.json").is_file() and (self.adapter / WEIGHTS).is_file()

    @property
    def result(self) -> dict:
        """What the finished run said of itself."""
        return self._read("result.json")

    @property
    def identity(self) -> dict[str, str]:
        """What tells the data, the tokenizer and the base that the run was begun with from others, as hashes by key."""
        return self._read("data.json")

    @property
    def template(self) -> str | None:
        """The chat template that the run is trained with, as Jinja; None if it has none."""
        path = self.path / "template.jinja"
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def recipe(self) -> Recipe:
        """Return the frozen recipe. Raises RunError where there is none."""
        path = self.path / "recipe.toml"
        try:
            return build_recipe(tomllib.loads(path.read_text(encoding="utf-8")), str(path))
        except OSError as error:
            raise RunError(f'"{self.path}" is no run folder: it has no recipe.toml. Finished runs: {_names(self.path.parent)}') from error
        except ValueError as error:
            raise RunError(f"{path}: damaged ({error}); start afresh with --fresh") from error

    def check(self, recipe: Recipe) -> None:
        """Raise RunError if the folder belongs to another recipe or holds something else. Nothing is written."""
        if not self.is_begun:
            inside = [path.name for path in self.path.iterdir()] if self.path.is_dir() else []
            # A run that was killed while it began: run.json is written first.
            own = BEGINNING if "run.json" in inside and self._is_run_json() else ()
            others = [name for name in inside if not name.startswith(".") and name not in own]
            if others or self.path.is_file():
                raise RunError(f'output.dir = "{self.path}": exists and holds something else ({", ".join(others[:3])}); choose another')
            return
        differences = [text for text in recipe_differences(self.recipe(), recipe) if not _may_change(text)]
        if differences:
            raise RunError(
                f'"{self.path}" holds a run of another recipe ({"; ".join(differences)}). '
                "Go on with the old recipe, choose another output.dir, or start afresh with --fresh"
            )

    def _is_run_json(self) -> bool:
        with suppress(RunError):
            facts = self._read("run.json")
            return isinstance(facts, dict) and versions().keys() <= facts.keys()
        return False

    def changes(self, recipe: Recipe) -> list[str]:
        """Return in what ``recipe`` differs from the one that the run goes by, but for where and how often it is written."""
        found = recipe_differences(self.recipe(), recipe) if self.is_begun else []
        return [text for text in found if not text.startswith("output.")]

    def check_identity(self, identity: dict[str, str]) -> None:
        """Raise RunError if the run was begun with rows, a template or a base other than those of ``identity``."""
        then = self.identity if self.is_begun else identity
        changed = [key for key in {**then, **identity} if then.get(key) != identity.get(key)]
        if changed:
            told = "; ".join(f"{key}: {then.get(key)} -> {identity.get(key)}" for key in changed)
            raise RunError(
                f'"{self.path}" was begun with something else: what is behind {", ".join(changed)} has '
                f"changed since ({told}). Put it back, choose another output.dir, or start afresh with --fresh"
            )

    def discard(self) -> None:
        """Delete the run that was begun here: what qlite wrote while training, and nothing else (exports stay)."""
        if self.is_begun:
            # First what makes it count as finished, and last what makes it count as begun: a kill in between leaves a run to be discarded.
            remove_file(self.path / "result.json")
            for folder in (self.path, self.path / "checkpoints", self.path / "best"):
                sweep(folder)
            for folder in (*self._checkpoints(), *self._bests(), self.adapter):
                if folder.exists() and not remove_folder(folder):
                    set_aside(folder)
            for path in (
                *self.records.paths(),
                *(self.path / name for name in ("memory.json", "overview.json", "data.json", "template.jinja")),
            ):
                remove_file(path)
            if is_ours(self.report):
                remove_file(self.report)
            remove_tree(self.logs)
            for folder in (self.path / "checkpoints", self.path / "best"):
                remove_empty(folder)
            for name in ("recipe.toml", "run.json"):
                remove_file(self.path / name)

    def begin(self, recipe: Recipe, identity: dict[str, str], template: str | None, machine: dict[str, str | int]) -> list[str]:
        """Make the folder for ``recipe``, if it is not there yet; called when all that can be wrong with a run has been read.

        Returns what differs from the machine it began on ("torch: 2.12.0 -> 2.13.0"): with it the last bits will, too.
        """
        facts = {**versions(), **machine}
        if not self.is_begun:
            write_json(self.path / "run.json", facts)
            write_json(self.path / "data.json", identity)
            if template is not None:
                write_text(self.path / "template.jinja", template)
            else:
                remove_file(self.path / "template.jinja")
            write_text(self.path / "recipe.toml", recipe_toml(recipe))  # last: with it the folder is this run's
        elif recipe_differences(self.recipe(), recipe):  # in what may change
            write_text(self.path / "recipe.toml", recipe_toml(recipe))
        then = self._read("run.json")
        return [f"{key}: {then.get(key)} -> {facts.get(key)}" for key in {**then, **facts} if then.get(key) != facts.get(key)]

    def note(self, message: str) -> None:
        """Keep what the user was told beside the figures."""
        self.records.add({"kind": "note", "text": message})

    def phase(self, name: str, done: int, total: int) -> None:
        """Progress is for the screen alone."""

    def step(self, report: StepReport) -> None:
        self.records.add(report.as_record())

    def evaluated(self, report: EvalReport) -> None:
        self.records.add(report.as_record())

    def answered(self, report: AnswerReport) -> None:
        self.records.add(report.as_record())

    def sampled(self, report: SampleReport) -> None:
        self.records.add(report.as_record())

    def save(self, state: TrainState, model: nn.Module, optimizer: FlatOptimizer, keep: int, suffix: str = "") -> None:
        """Write a checkpoint, whole or not at all, then drop all but the ``keep`` newest. One that is there already stays as it is.

        ``suffix``: UNEVALUATED where the evaluation that is due after this step has not been made. Such a one is only there to go on from.

        Raises:
            Diverged: a parameter or a value of the optimizer's is not finite.
            DiskError: the disk does not take it; what was there before is as it was.
        """
        path = self.path / "checkpoints" / f"step-{state.step:08d}{suffix}"
        if is_whole(path):
            return
        tensors, numbers = optimizer.state()
        weights = adapter_tensors(model, resumable=True)
        self._require_finite({**weights, **tensors}, state.step)
        if path.exists():
            set_aside(path)
        self.records.flush()  # what a checkpoint has behind it is told there
        with new_folder(path) as folder:
            write_tensors(folder / WEIGHTS, weights)
            write_tensors(folder / "optimizer.safetensors", tensors)
            write_json(folder / "state.json", {**asdict(state), "optimizer": numbers})
        self.rotate(keep)

    def rotate(self, keep: int) -> None:
        """Drop all but the ``keep`` newest checkpoints, and the best adapters that none of these knows."""
        found = self._checkpoints()
        spent = [folder for folder in found[1:] if folder.name.endswith(UNEVALUATED)]
        for old in (*spent, *[folder for folder in found if folder not in spent][keep:]):
            remove_folder(old)
        # A best adapter stays as long as a run can still go on from a checkpoint that knows it.
        known = set()
        for folder in self._checkpoints():
            with suppress(RunError):  # one of somebody else's
                known.add(self._read(f"checkpoints/{folder.name}/state.json").get("best_step"))
        for old in self._bests():
            if int(old.name.removeprefix("step-")) not in known:
                remove_folder(old)

    def _require_finite(self, tensors: dict[str, Tensor], step: int) -> None:
        bad = next((name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()), None)
        if bad is not None:
            raise Diverged(
                f"after step {step}, {bad} holds values that are not finite, so nothing of it was saved; the last good checkpoint is "
                f"{self.newest or 'not there: none was written yet'}. Lower optimizer.lr or raise "
                "schedule.warmup_steps, with --fresh or another output.dir"
            )

    def resume(self, model: nn.Module, optimizer: FlatOptimizer, note: Callable[[str], None] = print) -> TrainState:
        """Load the newest whole checkpoint into ``model`` and ``optimizer``; without any, return the state of step 0.

        What a killed process has left half made is deleted, and damaged checkpoints get another name; ``note`` hears of both.
        """
        for folder in (self.path, self.path / "checkpoints", self.path / "best"):
            for name in sweep(folder):
                note(f"{folder / name}: was left half made when the run was killed; it is deleted")
        for folder in self._checkpoints():
            if not is_whole(folder):
                note(f"{folder} is damaged: what is in it is not what was written; it is now {set_aside(folder).name}")
                continue
            state = self._load(folder, model, optimizer)
            self.records.rewind(state)
            return state
        self.records.rewind(TrainState(step=-1, measured=-1))
        return TrainState()

    def _load(self, folder: Path, model: nn.Module, optimizer: FlatOptimizer) -> TrainState:
        """Return the state of a whole checkpoint, with its tensors put into ``model`` and ``optimizer``."""
        try:
            saved = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            numbers = saved.pop("optimizer")
            state = TrainState(**{**saved, "recent": tuple(saved["recent"])})
            tensors = load_file(folder / "optimizer.safetensors")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            # The sums are right, so qlite never wrote it: another version did, or somebody else.
            raise RunError(f'"{folder}" is no checkpoint of this version ({error}); start afresh with --fresh') from error
        copy_adapter(read_tensors(folder), model, folder, resumable=True)
        optimizer.load_state(tensors, numbers)
        return state

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint that is whole."""
        return next((folder for folder in self._checkpoints() if is_whole(folder)), None)

    def save_best(self, state: TrainState, model: nn.Module) -> None:
        """Keep the adapter as it is, the one of the lowest held-out loss so far."""
        with new_folder(self._best(state.step)) as folder:
            write_tensors(folder / WEIGHTS, adapter_tensors(model))

    def load_best(self, state: TrainState, model: nn.Module) -> None:
        """Put the adapter of the lowest held-out loss back into ``model``. Raises RunError if it is damaged."""
        folder = self._best(state.best_step)
        if not is_whole(folder):
            raise RunError(f'"{folder}" is damaged or missing; take output.adapter = "last"')
        copy_adapter(read_tensors(folder), model, folder)

    def write_adapter(self, recipe: Recipe, model: nn.Module, metadata: dict[str, str]) -> None:
        """Write what was trained; ``metadata`` says where it is from."""
        with new_folder(self.adapter) as folder:
            write_adapter(folder, model, recipe.method, recipe.base.model, metadata)

    def write_memory(self, record: dict) -> dict:
        """Write plan against measured memory, by phase and term, in bytes; return it with what was measured before a stop."""
        path = self.path / "memory.json"
        with suppress(RunError, KeyError, TypeError, AttributeError):  # none yet, or damaged: what is measured now is told alone
            before = self._read("memory.json")
            measured, earlier = record["measured"], before["measured"]
            larger = {phase: max((measured.get(phase), earlier.get(phase)), key=_bytes) for phase in {**earlier, **measured}}
            record = {**record, "measured": larger, "process_peak": max(record["process_peak"], before["process_peak"])}
        write_json(path, record)
        return record

    def write_overview(self, record: dict) -> None:
        """Write what is known of a run before its first step and is in no other file: its rows, its trained parameters."""
        write_json(self.path / "overview.json", record)

    def finish(self, result: dict) -> None:
        """Write the result; with it the run counts as finished."""
        write_json(self.path / "result.json", result)

    def _read(self, name: str) -> dict:
        path = self.path / name
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: damaged or missing ({error}); start afresh with --fresh") from error

    def _best(self, step: int) -> Path:
        return self.path / "best" / f"step-{step:08d}"

    def _bests(self) -> list[Path]:
        return sorted((self.path / "best").glob("step-" + "[0-9]" * 8))

    def _checkpoints(self) -> list[Path]:
        """Return the checkpoints, newest first, by step and never by clock; of one step, that with its evaluation first."""
        folder, name = self.path / "checkpoints", "step-" + "[0-9]" * 8
        found = [path for suffix in ("", UNEVALUATED) for path in folder.glob(f"{name}{suffix}")]
        return sorted(found, key=lambda path: path.name[: len("step-00000020")], reverse=True)


def _may_change(difference: str) -> bool:
    """Return whether a run may go on with this difference between its recipe and the one that is given."""
    key = difference.partition(":")[0]
    # 8-bit inputs are another gradient; where and how often a run is written is no part of what it computes.
    return key.startswith("output.") or (key in MAY_CHANGE and "8bit" not in difference)


def _bytes(peak: dict | None) -> int:
    return peak["bytes"] if peak else -1


def find_run(path: str | os.PathLike[str] | None, runs: Path = Path("runs")) -> RunFolder:
    """Return the run folder ``path``; without a path, the newest finished run under ``runs``.

    Raises:
        RunError: there is none, or it is not finished.
    """
    if path is None:
        finished = [folder for folder in runs.glob("*") if RunFolder(folder).is_finished]
        if not finished:
            raise RunError(f'no finished run under "{runs}"; name one, or train first: python -m qlite.train recipes/quickstart.toml')
        return RunFolder(max(finished, key=lambda folder: (folder / "result.json").stat().st_mtime))
    run = RunFolder(Path(path))
    run.recipe()
    if not run.is_finished:
        raise RunError(f'"{run.path}" is not finished; the command that began it goes on with it')
    return run


def _names(folder: Path) -> str:
    found = sorted(str(path.parent) for path in folder.glob("*/result.json"))
    return ", ".join(found) or "none here"
