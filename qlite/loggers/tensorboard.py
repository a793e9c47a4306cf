"""TensorBoard: curves and texts in event files in the run's own folder. Source: torch.utils.tensorboard."""

from collections.abc import Sequence

from qlite.loggers.base import LoggedRun, Logger, literal


class TensorBoard(Logger):
    """Writes what ``tensorboard --logdir runs`` shows; all of it lies in the run's folder."""

    def __init__(self) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here: it takes a second, and only runs that ask for it have the package

        self._open = SummaryWriter

    def begin(self, run: LoggedRun) -> int:
        """Begin a new event file; what older ones say of steps after the one that the run goes on after is no longer shown."""
        goes_on = any(run.folder.glob("events.out.tfevents.*"))
        # At first, too, where there is nothing to drop: TensorBoard takes only the second mark of a start for one of going on.
        self._writer = self._open(str(run.folder), purge_step=run.step + 1 if goes_on else 0)
        if not goes_on:
            self._writer.add_text("recipe", literal(["recipe.toml"], [[run.recipe]]), 0)
            for step, text in run.notes:
                self.note(step, text)
        return run.step

    def numbers(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def rows(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self._writer.add_text(name, literal(columns, rows), step)

    def note(self, step: int, text: str) -> None:
        self._writer.add_text("notes", literal(["note"], [[text]]), step)

    def flush(self) -> None:
        """Hand all to the operating system: a killed process loses nothing then."""
        self._writer.flush()

    def end(self, is_finished: bool) -> None:
        self._writer.close()
