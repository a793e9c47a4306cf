"""Weights & Biases: one run there for one run here, found again by its id. Source: wandb 0.31, wandb_settings.py and wandb_run.py."""

import atexit
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from qlite.errors import QliteError
from qlite.loggers.base import EVERYTHING, PATIENCE_SECONDS, LoggedRun, Logger


class WeightsAndBiases(Logger):
    """Sends figures, texts and the recipe, and nothing else: no console output, code, git state, packages or machine.

    WANDB_PROJECT ("qlite" without it), WANDB_ENTITY, WANDB_MODE and the rest of its own settings hold as everywhere.
    """

    def __init__(self) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # wandb sends reports of its own faults to its makers
        import wandb  # here: it takes a second, and only runs that ask for it have the package

        self._wandb = wandb
        self._notes: list[tuple[int, str]] = []
        self._at_exit: list[Callable] = []

    def begin(self, run: LoggedRun) -> int:
        """Begin a run, or go on with the one whose id is in the run's folder.

        Raises:
            QliteError: nobody is logged in; otherwise it would ask for a key in the middle of the screen.
        """
        self._notes = list(run.notes)
        kept = run.kept("wandb")
        identity = kept or uuid.uuid4().hex[:12]
        run.keep("wandb", identity)
        with self._keeping_to_itself():
            self._require_login()
            self._run = self._wandb.init(
                project=os.environ.get("WANDB_PROJECT", "qlite"),
                name=run.name,
                id=identity,
                resume="allow" if kept else None,
                dir=run.folder,
                config=run.config,
                settings=self._settings(),
                reinit="create_new",  # several runs trained together each have one of their own
            )
        # Of a run that was only written down the server knows nothing.
        return self._run.starting_step - 1 if kept and not self._is_offline() else EVERYTHING

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def rows(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = self._wandb.Table(columns=list(columns), data=[list(row) for row in rows])
        self._run.log({name: table}, step=step)

    def note(self, step: int, text: str) -> None:
        """Keep it for the table that ``end`` sends: sent one at a time, each would be a file with all before it."""
        self._notes.append((step, text))

    def end(self, is_finished: bool) -> None:
        if self._notes:
            self._run.log({"notes": self._wandb.Table(columns=["step", "note"], data=[list(note) for note in self._notes])})
        self._run.finish(exit_code=0 if is_finished else 1)

    def leave(self) -> None:
        """Let the process end without wandb's waiting for its own: what was not sent is on disk, for ``wandb sync``."""
        for function in self._at_exit:
            atexit.unregister(function)

    @contextmanager
    def _keeping_to_itself(self) -> Iterator[None]:
        """Undo what wandb changes of this process when it starts its own, and note what it wants done when this one ends.

        It replaces sys.exit and sys.excepthook to learn how the process ends; qlite's exit codes and messages are qlite's.
        """
        before = sys.exit, sys.excepthook, atexit.register

        def register(function: Callable, *given: object, **named: object) -> Callable:
            self._at_exit.append(function)
            return before[2](function, *given, **named)

        atexit.register = register
        try:
            yield
        finally:
            sys.exit, sys.excepthook, atexit.register = before

    def _is_offline(self) -> bool:
        return self._wandb.setup().settings.mode in ("offline", "dryrun", "disabled")

    def _require_login(self) -> None:
        self._wandb.setup(self._settings())
        if not self._is_offline() and not self._wandb.login(prompt=False, verify=False):
            raise QliteError("nobody is logged in; run `wandb login`, or set WANDB_MODE=offline and send it later with `wandb sync`")

    def _settings(self) -> object:
        return self._wandb.Settings(
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
            finish_timeout=PATIENCE_SECONDS,
        )
