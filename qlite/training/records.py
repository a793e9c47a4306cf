"""metrics.jsonl: one record a line of all that happens in a run; continued in another file where it gets long."""

import json
from contextlib import suppress
from math import isfinite
from pathlib import Path

from qlite.errors import DiskError
from qlite.files import append_line, flush, keep_file, write_text
from qlite.training.state import TrainState
from qlite.units import MIB

LOG_BYTES = 16 * MIB
"""Size of metrics.jsonl beyond which it is continued in a new file."""


class Records:
    """The records of the run in ``folder``: of steps, evaluations, samples, answers, and what the user was told."""

    def __init__(self, folder: Path):
        self.newest = folder / "metrics.jsonl"
        self.may_lose_lines = False
        """Whether a line that a full disk does not take ends nothing."""

    def paths(self) -> list[Path]:
        """Return metrics.jsonl and, before it, what has become too long for one file."""
        older = sorted(self.newest.parent.glob("metrics-" + "[0-9]" * 4 + ".jsonl"))
        return [*older, self.newest] if self.newest.is_file() else older

    def read(self) -> list[dict]:
        """Return all of them; a line cut short by a crash is left out."""
        return [record for path in self.paths() for record in _records_of(path)]

    def add(self, record: dict) -> None:
        """Write one more. Raises DiskError if the disk does not take it, unless lines may be lost."""
        # JSON has no word for NaN, which a held-out loss can be.
        known = {key: None if isinstance(value, float) and not isfinite(value) else value for key, value in record.items()}
        try:
            append_line(self.newest, _line(known))
        except DiskError:
            if not self.may_lose_lines:
                raise

    def flush(self) -> None:
        """Wait until all are on the device, and begin a new file where this one has become long."""
        flush(self.newest)
        if self.newest.is_file() and self.newest.stat().st_size > LOG_BYTES:
            keep_file(self.newest, self.newest.with_name(f"metrics-{len(self.paths()):04d}.jsonl"))

    def rewind(self, state: TrainState) -> None:
        """Drop what is said of steps and evaluations after ``state``: they will be made again."""
        last = {"step": state.step, "eval": state.measured, "samples": state.measured, "answers": 0 if state.step >= 0 else -1}
        for path in self.paths():
            kept = [record for record in _records_of(path) if record.get("step", -1) <= last.get(record.get("kind"), state.step)]
            write_text(path, "".join(f"{_line(record)}\n" for record in kept))


def _line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


def _records_of(path: Path) -> list[dict]:
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with suppress(ValueError):
            records.append(json.loads(line, parse_constant=lambda _: None))  # earlier versions wrote NaN
    return records
