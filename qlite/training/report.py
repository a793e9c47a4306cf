"""What a step reports: one record that the console, the metrics file and every logger read."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Protocol

from qlite.device import MemoryUse
from qlite.units import format_bytes


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
    oom_retries: int = 0
    """How often the step ran out of memory and was gone on with in smaller pieces."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)  # a clock may be coarse

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


class StopWatch(Observer):
    """Calls ``check`` between the parts of what is not a step: rows that are evaluated, prompts that are answered."""

    def __init__(self, check: Callable[[], None]):
        self._check = check

    def phase(self, name: str, done: int, total: int) -> None:
        self._check()


# NVIDIA, "System Memory Fallback for Stable Diffusion" (answer 5490): since driver 546.01. WSL does not heed it: microsoft/WSL issue 11050.
NO_SPILLING = (
    'On Windows itself, NVIDIA Control Panel, Manage 3D settings, "CUDA - Sysmem Fallback Policy" = "Prefer No Sysmem Fallback" '
    "makes this an out-of-memory error, which qlite answers with smaller pieces"
)


class SpillWatch(Observer):
    """Tells ``listeners``, once in a run, that the driver has put a part of the card's memory into host memory.

    Nothing fails then: the steps only become many times slower, and no message of the driver says why.
    """

    def __init__(self, *listeners: Observer):
        self._listeners = listeners
        self._has_told = False

    def step(self, report: StepReport) -> None:
        if report.memory.spilled and not self._has_told:
            self._has_told = True
            for listener in self._listeners:
                listener.note(f"step {report.step}: {spill_words(report.memory.spilled)} or train.tokens. {NO_SPILLING}")


def spill_words(size: int) -> str:
    """Return what ``size`` spilled bytes mean and what to do about it."""
    return f"spilled {format_bytes(size)} to host memory: slow; lower train.micro_batch"


def is_due(every: int, step: int, steps: int) -> bool:
    """Return whether something done every so many steps, and always after the last, is due after ``step``."""
    return step == steps or (every > 0 and step % every == 0)
