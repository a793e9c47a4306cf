"""What a finished run is to Python: its folder, and the figures that it has left there."""

from dataclasses import dataclass, fields
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult

from qlite.training.report import AnswerReport
from qlite.training.run_folder import RunFolder
from qlite.training.shown import Shown
from qlite.training.summary import closing_words


@dataclass(frozen=True, repr=False)
class TrainResult(Shown):
    """A finished run. It is a path, too: the other functions, ``open`` and ``Path`` take it for its folder."""

    folder: Path
    steps: int
    tokens: int
    """Tokens that the model read in training, padding not counted."""
    train_seconds: float
    """Of training alone."""
    tokens_per_second: float
    """The median over the steps."""
    losses: dict[int, float | None]
    """The loss of every step, in nats a trained token; without those that were skipped. None: no number."""
    held_out_losses: dict[int, float | None]
    """The loss on the held-out rows by the step after which it was measured."""
    held_out_loss: float | None
    """The last of these; None: there were no held-out rows."""
    perplexity: float | None
    best_loss: float | None
    best_step: int | None
    exact_before: AnswerReport | None
    """The answers to held-out prompts before training, compared letter by letter; None: the recipe asks for none."""
    exact_after: AnswerReport | None
    peak_tensor_bytes: int | None
    """The most that tensors took, as it was measured; None: it was not followed."""
    planned_tensor_bytes: int | None
    """What was planned for it before a weight was read; None: no plan was made."""
    peak_memory_bytes: int
    """The most that the card's allocator, or on a CPU the process, took in all."""
    notes: tuple[str, ...]
    """What the run has told beside its figures."""
    record: dict
    """result.json as it stands in the folder."""

    @classmethod
    def of(cls, run: RunFolder) -> "TrainResult":
        """Return what ``run``, which is finished, has left."""
        result, records = run.result, run.records.read()
        losses = {kind: {each["step"]: each["loss"] for each in records if each["kind"] == kind} for kind in ("step", "eval")}
        answers = [AnswerReport(**{key: value for key, value in each.items() if key != "kind"}) for each in result["answers"]]
        same = {field.name for field in fields(cls)} & result.keys()
        return cls(
            **{name: result[name] for name in same},
            folder=run.path.absolute(),
            losses=losses["step"],
            held_out_losses=losses["eval"],
            held_out_loss=result["eval_loss"],
            exact_before=answers[0] if answers else None,
            exact_after=answers[-1] if answers else None,
            notes=tuple(each["text"] for each in records if each["kind"] == "note"),
            record=result,
        )

    @property
    def report(self) -> Path:
        """The page to look at."""
        return self.folder / "report.html"

    def __fspath__(self) -> str:
        return str(self.folder)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from closing_words(self.record, self.folder, has_report=self.report.is_file())
