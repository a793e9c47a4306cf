"""What a step reports: one record that the console, the metrics file and every logger read."""

from dataclasses import asdict, dataclass, field
from typing import Protocol

from qlite.device import MemoryUse


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. ``loss`` is the mean over the step's trained tokens, in nats."""

    step: int
    """Number of this step, counted from 1."""
    steps: int
    """Steps of the whole run."""
    epoch: float
    """Passes over the training rows made so far."""
    loss: float
    lr: float
    """Learning rate of the first parameter group in this step."""
    grad_norm: float
    """L2 norm of all gradients before clipping."""
    tokens: int
    """Tokens the model read in this step, padding not counted."""
    trained_tokens: int
    """Tokens that carried a loss in this step."""
    seconds: float
    memory: MemoryUse

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def as_record(self) -> dict:
        """Return the step as one flat record for metrics.jsonl."""
        memory = {f"memory_{key}": value for key, value in asdict(self.memory).items() if value is not None}
        own = {key: value for key, value in asdict(self).items() if key != "memory"}
        return {"kind": "step", **own, "tokens_per_second": round(self.tokens_per_second, 2), **memory}


@dataclass(frozen=True)
class EvalReport:
    """One pass over the held-out rows. ``loss`` is the mean over their trained tokens, in nats."""

    step: int
    loss: float
    perplexity: float
    rows: int
    trained_tokens: int
    seconds: float

    def as_record(self) -> dict:
        return {"kind": "eval", **asdict(self)}


@dataclass(frozen=True)
class AnswerReport:
    """The model's own greedy answers to held-out prompts, compared letter by letter with the expected ones."""

    step: int
    rows: int
    exact: int
    """Answers equal to the expected ones."""
    samples: list[tuple[str, str, str]] = field(default_factory=list)
    """(prompt, expected answer, model's answer) of the first rows."""

    def as_record(self) -> dict:
        return {"kind": "answers", **asdict(self)}


@dataclass(frozen=True)
class SampleReport:
    """The model's answers to the recipe's own prompts, to be read: (prompt, answer)."""

    step: int
    samples: list[tuple[str, str]]

    def as_record(self) -> dict:
        return {"kind": "samples", **asdict(self)}


class Observer(Protocol):
    """Whoever wants to know what happens in a run: the console, the metrics file."""

    def note(self, message: str) -> None:
        """A line the user should read."""

    def phase(self, name: str, done: int, total: int) -> None:
        """``done`` of ``total`` (bytes, tensors, rows ...) of the phase ``name`` are finished; total 0 = unknown."""

    def step(self, report: StepReport) -> None: ...

    def evaluated(self, report: EvalReport) -> None: ...

    def answered(self, report: AnswerReport) -> None: ...

    def sampled(self, report: SampleReport) -> None: ...


class Broadcast:
    """Tells several observers the same."""

    def __init__(self, *observers: Observer):
        self.observers = observers

    def note(self, message: str) -> None:
        for observer in self.observers:
            observer.note(message)

    def phase(self, name: str, done: int, total: int) -> None:
        for observer in self.observers:
            observer.phase(name, done, total)

    def step(self, report: StepReport) -> None:
        for observer in self.observers:
            observer.step(report)

    def evaluated(self, report: EvalReport) -> None:
        for observer in self.observers:
            observer.evaluated(report)

    def answered(self, report: AnswerReport) -> None:
        for observer in self.observers:
            observer.answered(report)

    def sampled(self, report: SampleReport) -> None:
        for observer in self.observers:
            observer.sampled(report)
