"""A run's report.html: read what its folder tells, whatever is missing there, and write the page beside it."""

import json
import tomllib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from qlite.errors import QliteError, RunError
from qlite.files import write_text
from qlite.formats.peft import WEIGHTS
from qlite.hashes import sha256
from qlite.reporting.document import is_ours
from qlite.reporting.run_page import run_page
from qlite.reporting.told import Told
from qlite.training.auditing import FILE
from qlite.training.run_folder import RunFolder


def leave_report(run: RunFolder, note: Callable[[str], None]) -> None:
    """Write the report of a finished run; what stands in its way ends no run, and ``note`` hears of it."""
    try:
        write_report(run)
    except QliteError as error:
        note(f"all is written but the run's report: {error}")
    except Exception as error:  # A flaw in the drawing must not make hours of training look failed.
        note(f"all is written but the run's report: this is a mistake of qlite's own ({error!r}); please report it")


def write_report(run: RunFolder, out: Path | None = None) -> Path:
    """Write the report of ``run``, to report.html in its folder or to ``out``, and return its path.

    Raises:
        RunError: a file of somebody else is there.
        MachineError: the disk does not take it.
    """
    return write_page(out or run.report, run_page(tell(run)))


def write_page(path: Path, page: str) -> Path:
    """Write ``page`` to ``path``, where nothing or an earlier page of qlite's may be, and return that."""
    if path.exists() and not is_ours(path):
        raise RunError(f'"{path}" exists and is no report of qlite\'s; move it away, or name another file with --out')
    write_text(path, page)
    return path


def tell(run: RunFolder) -> Told:
    """Return all that the folder of ``run`` tells; what cannot be read is empty, and named in ``unread``."""
    unread: list[str] = []
    text, recipe = "", {}
    try:
        text = (run.path / "recipe.toml").read_text(encoding="utf-8", errors="replace")
        recipe = tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        unread.append(_why("recipe.toml", error))
    files = {name: _object(run.path / f"{name}.json", unread) for name in ("run", "overview", "memory", "result")}
    records = []
    try:
        records = [record for record in run.records.read() if isinstance(record, dict)]
        if not records:
            unread.append("metrics.jsonl: missing or empty")
    except (OSError, RecursionError) as error:
        unread.append(_why("metrics.jsonl", error))
    written = None
    with suppress(OSError):
        written = (run.path / ("result.json" if run.is_finished else "metrics.jsonl")).stat().st_mtime
    return Told(
        path=run.path.absolute(),
        is_finished=run.is_finished,
        recipe_text=text,
        recipe=recipe,
        records=records,
        machine=files["run"],
        overview=files["overview"],
        memory=files["memory"],
        result=files["result"],
        evaluations=_of_this_adapter(run, {path.stem: _object(path, unread) for path in _found(run.path, "evaluations/*.json")}),
        audits=_of_this_adapter(run, {path.parent.name: _object(path, unread) for path in _found(run.path, f"[!.]*/{FILE}")}),
        unread=tuple(unread),
        written=written,
    )


def _of_this_adapter(run: RunFolder, found: dict[str, dict]) -> dict[str, dict]:
    """Return those of ``found`` that are of the adapter that is there now: a run that is trained afresh keeps its folder's exports."""
    try:
        now = sha256(run.adapter / WEIGHTS)
    except OSError:
        return {}
    settings = {name: each["settings"] if isinstance(each.get("settings"), dict) else each for name, each in found.items()}
    return {name: each for name, each in found.items() if settings[name].get("adapter_sha256", now) == now}


def _found(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


def _object(path: Path, unread: list[str]) -> dict:
    """Return the JSON object in ``path``; an empty one if there is no such file, or if it is damaged, which ``unread`` then says."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        unread.append(f"{path.name}: no JSON object")
    except FileNotFoundError:
        pass  # of an earlier version, or not that far yet
    except (OSError, ValueError, RecursionError) as error:
        unread.append(_why(path.name, error))
    return {}


def _why(name: str, error: Exception) -> str:
    return f"{name}: {getattr(error, 'strerror', None) or error}"
