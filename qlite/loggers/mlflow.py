"""MLflow: one run there for one run here, on a tracking server or in a file. Source: mlflow 3.17, tracking/client.py."""

import logging
import os
import time
from collections.abc import Sequence

from qlite.loggers.base import LoggedRun, Logger, literal

PARAMETER_CHARACTERS = 500
"""Longest value of a parameter that every MLflow server takes (mlflow.utils.validation: 500, and 6,000 since MLflow 2.10)."""
PARAMETERS_AT_ONCE = 100
"""mlflow.utils.validation.MAX_PARAMS_TAGS_PER_BATCH."""


class MLflow(Logger):
    """Sends figures, texts and the recipe to where MLFLOW_TRACKING_URI says, or else into mlflow.db in the folder of the command.

    The experiment is MLFLOW_EXPERIMENT_NAME, "qlite" without it.
    """

    def __init__(self) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # MLflow tells its makers which of its functions are called
        from mlflow import MlflowClient  # here: it takes seconds, and only runs that ask for it have the package
        from mlflow.entities import Metric, Param

        # What it makes of its own database is no matter of the screen.
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._open, self._metric, self._parameter = MlflowClient, Metric, Param
        self._notes: list[str] = []

    def begin(self, run: LoggedRun) -> int:
        """Begin a run, or go on with the one whose id is in the run's folder."""
        self._client = self._open()
        self._notes = [_line(step, text) for step, text in run.notes]
        kept = run.kept("mlflow")
        if kept:
            self._id = kept
            self._client.update_run(kept, status="RUNNING")
            return max((metric.step for metric in self._client.get_metric_history(kept, "train/loss")), default=0)
        self._id = self._client.create_run(self._experiment(), run_name=run.name).info.run_id
        run.keep("mlflow", self._id)
        parameters = [self._parameter(key, str(value)[:PARAMETER_CHARACTERS]) for key, value in run.config.items()]
        for start in range(0, len(parameters), PARAMETERS_AT_ONCE):
            self._client.log_batch(self._id, params=parameters[start : start + PARAMETERS_AT_ONCE])
        self._client.log_text(self._id, run.recipe, "recipe.toml")
        return 0

    def numbers(self, step: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[self._metric(name, value, now, step) for name, value in values.items()])

    def rows(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self._client.log_text(self._id, literal(columns, rows), f"{name}/step-{step:08d}.md")

    def note(self, step: int, text: str) -> None:
        """Write the file of all notes anew, as a file there cannot grow."""
        self._notes.append(_line(step, text))
        self._client.log_text(self._id, "\n".join(self._notes) + "\n", "notes.txt")

    def end(self, is_finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if is_finished else "KILLED")

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "qlite")
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found else self._client.create_experiment(name)


def _line(step: int, text: str) -> str:
    return f"step {step}: {text}"
