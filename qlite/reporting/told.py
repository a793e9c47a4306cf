"""What a run's folder tells, as plain values, and the figures that sum it up. Nothing is trusted to be there or to be of its kind."""

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from qlite.reporting.markup import number
from qlite.reporting.scale import Point, smooth

CURVED = 10
"""Steps over whose mean a loss is told: one step alone is chance."""


@dataclass(frozen=True)
class Told:
    """A run as its files tell it; what is missing in them is empty here."""

    path: Path
    is_finished: bool = False
    recipe_text: str = ""
    recipe: dict[str, dict] = field(default_factory=dict)
    records: list[dict] = field(default_factory=list)
    """metrics.jsonl's: "step", "eval", "answers", "samples" and "note" in their order."""
    machine: dict = field(default_factory=dict)
    """run.json: versions, device, threads."""
    overview: dict = field(default_factory=dict)
    """overview.json: rows, lengths, trained parameters."""
    memory: dict = field(default_factory=dict)
    """memory.json: plan against measured, by phase and term, in bytes."""
    result: dict = field(default_factory=dict)
    """result.json."""
    evaluations: dict[str, dict] = field(default_factory=dict)
    """evaluations/*.json, by name: what the run and its base reach on some rows."""
    audits: dict[str, dict] = field(default_factory=dict)
    """audit.json of each export in the run's folder, by the export's name: how it compares with the run."""
    unread: tuple[str, ...] = ()
    """Names of files that could not be read, each with why."""
    written: float | None = None
    """When its newest figures were written, in seconds since 1970."""

    @property
    def name(self) -> str:
        return self.path.name or str(self.path)

    def of_kind(self, kind: str) -> list[dict]:
        """Return the records of ``kind``, in order."""
        return [record for record in self.records if record.get("kind") == kind]

    def curve(self, kind: str, key: str) -> list[Point]:
        """Return (step, value) of the records of ``kind`` that have a number under ``key``, in order of steps, one a step."""
        found = {}
        for record in self.of_kind(kind):
            step, value = number(record.get("step")), number(record.get(key))
            if step is not None and value is not None and 0 <= step < 1e12:
                found[step] = value
        return sorted(found.items())

    def smooth_curve(self, key: str) -> list[Point]:
        """Return the moving average of a figure of the steps."""
        points = self.curve("step", key)
        return [(step, value) for (step, _), value in zip(points, smooth([value for _, value in points]), strict=True)]

    def key(self, name: str) -> object:
        """Return the recipe's value of "table.key"; None where there is none."""
        table, _, key = name.partition(".")
        found = self.recipe.get(table)
        return found.get(key) if isinstance(found, dict) else None

    def answers(self) -> list[dict]:
        """Return the records of answers that were compared; of a run whose metrics are gone, those that its result keeps."""
        kept = self.result.get("answers")
        return self.of_kind("answers") or [each for each in (kept if isinstance(kept, list) else []) if isinstance(each, dict)]


@dataclass(frozen=True)
class Figures:
    """A run in numbers; None where nobody knows."""

    steps: float | None
    planned_steps: float | None
    tokens: float | None
    seconds: float | None
    """Of training alone."""
    speed: float | None
    """Tokens a second, the median over steps."""
    first_loss: float | None
    last_loss: float | None
    """Mean of the last steps' losses."""
    eval_loss: float | None
    first_eval_loss: float | None
    perplexity: float | None
    best_loss: float | None
    best_step: float | None
    exact: tuple[float, float] | None
    """Exact answers in the first and the last comparison."""
    exact_rows: float | None
    peak_bytes: float | None
    peak_kind: str
    """What that peak is of: "process", "allocated on the GPU"."""
    tensor_bytes: float | None
    planned_bytes: float | None
    parameters: float | None
    """That were trained."""

    @classmethod
    def of(cls, told: Told) -> "Figures":
        """Return the figures of ``told``: what its result says, else what its records do."""
        steps, result = told.of_kind("step"), told.result
        losses = [value for _, value in told.curve("step", "loss")]
        evals, answers = told.curve("eval", "loss"), [each for each in told.answers() if number(each.get("exact")) is not None]
        speeds = [value for _, value in told.curve("step", "tokens_per_second")]
        best = min(evals, key=lambda point: point[1], default=(None, None))
        perplexities = told.curve("eval", "perplexity")
        measured, planned = (peaks(told.memory, part) for part in ("measured", "planned"))
        known = [phase for phase in planned if phase in measured]

        def say(key: str, else_value: float | None) -> float | None:
            value = number(result.get(key))
            return else_value if value is None else value

        def total(key: str) -> float | None:
            values = [value for _, value in told.curve("step", key)]
            return sum(values) if values else None

        return cls(
            steps=say("steps", len(steps) or None) if steps or not told.is_finished else number(told.key("train.steps")),
            planned_steps=max((value for _, value in told.curve("step", "steps")), default=number(told.key("train.steps"))),
            tokens=(say("tokens", None) or total("tokens")),
            seconds=(say("train_seconds", None) or total("seconds")),
            speed=(say("tokens_per_second", None) or (median(speeds) if speeds else None)),
            first_loss=losses[0] if losses else number(result.get("first_loss")),
            last_loss=_mean(losses[-min(CURVED, max(1, len(losses) // 4)) :]) if losses else number(result.get("last_loss")),
            eval_loss=say("eval_loss", evals[-1][1] if evals else None),
            first_eval_loss=evals[0][1] if evals else None,
            perplexity=say("perplexity", perplexities[-1][1] if perplexities else None),
            best_loss=best[1],
            best_step=best[0],
            exact=(number(answers[0]["exact"]), number(answers[-1]["exact"])) if answers else None,
            exact_rows=number(answers[-1].get("rows")) if answers else None,
            peak_bytes=say("peak_memory_bytes", max((value for _, value in told.curve("step", "memory_peak")), default=None)),
            peak_kind=str(result.get("peak_memory_kind", "in all")),
            tensor_bytes=say("peak_tensor_bytes", max(measured.values(), default=None)),
            planned_bytes=say("planned_tensor_bytes", max((planned[phase] for phase in known), default=None)),
            parameters=number(told.overview.get("trained_parameters")),
        )


def phases(memory: dict, part: str) -> dict[str, dict]:
    """Return the phases of memory.json's ``part``, "planned" or "measured": {"training": {"bytes": 5, "terms": {...}, ...}}."""
    found = memory.get(part)
    if part == "planned":
        found = found.get("phases") if isinstance(found, dict) else None
    return {str(phase): peak for phase, peak in found.items() if isinstance(peak, dict)} if isinstance(found, dict) else {}


def peaks(memory: dict, part: str) -> dict[str, float]:
    """Return the bytes of each of those phases."""
    return {phase: size for phase, peak in phases(memory, part).items() if (size := number(peak.get("bytes"))) is not None}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
