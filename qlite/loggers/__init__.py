"""Tools that keep the figures of runs: each in a file of its own, its package imported only when a recipe names it."""

from collections.abc import Iterable
from importlib.util import find_spec

from qlite.errors import RecipeError, install_line
from qlite.loggers.base import Logger
from qlite.loggers.mlflow import MLflow
from qlite.loggers.tensorboard import TensorBoard
from qlite.loggers.wandb import WeightsAndBiases

LOGGERS: dict[str, type[Logger]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}
"""By the name that a recipe has for it, which is also that of its package and of qlite's extra."""


def require_loggers(names: Iterable[str]) -> None:
    """Raise RecipeError if a package that ``names`` need is not installed; nothing is imported."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        told = "package is" if len(missing) == 1 else "packages are"
        raise RecipeError(f"output.loggers: the {told} not installed ({', '.join(missing)}): {install_line(*missing)}")
