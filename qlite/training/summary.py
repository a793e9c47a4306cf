"""What a finished run says of itself: result.json, and the closing words on the terminal."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlite.device import MemoryUse, peak_process_bytes
from qlite.streams import clean
from qlite.training.planning import planned_and_measured
from qlite.training.run_folder import RunFolder
from qlite.training.state import TrainState
from qlite.units import format_bytes, format_seconds


def summarise(records: list[dict], memory: MemoryUse, compared: dict, system: str, state: TrainState) -> dict:
    """Return the run's figures: losses in nats, seconds of training alone, tokens/s as the median over steps.

    The peak of the tensors, and what was planned for it, is that over all phases of ``compared``, memory.json's record.
    """
    steps = [record for record in records if record["kind"] == "step"]
    evaluations = [record for record in records if record["kind"] == "eval"]
    answers = [record for record in records if record["kind"] == "answers"]
    measured, phases = compared["measured"], list(planned_and_measured(compared))
    on_gpu = memory.reserved is not None
    return {
        "steps": len(steps),
        "tokens": sum(record["tokens"] for record in steps),
        "train_seconds": round(sum(record["seconds"] for record in steps), 2),
        # The records are gone where somebody has deleted them.
        "tokens_per_second": round(median([record["tokens_per_second"] for record in steps] or [0.0]), 1),
        "first_loss": steps[0]["loss"] if steps else None,
        "last_loss": steps[-1]["loss"] if steps else None,
        "eval_loss": evaluations[-1]["loss"] if evaluations else None,
        "perplexity": evaluations[-1]["perplexity"] if evaluations else None,
        "best_loss": state.best_loss,
        "best_step": state.best_step if evaluations else None,
        "peak_memory_bytes": memory.peak if on_gpu else peak_process_bytes(),
        "peak_memory_kind": "allocated on the GPU" if on_gpu else "process",
        "peak_tensor_bytes": max((peak["bytes"] for peak in measured.values()), default=None),
        "planned_tensor_bytes": max((planned for _, planned, _ in phases), default=None),
        "system": system,
        "answers": answers,
    }


def print_summary(run: RunFolder) -> None:
    """Print the finished run's figures and what to type next."""
    result, console = run.result, Console(highlight=False, markup=False)
    for part in closing_words(result, run.path, run.report.is_file()):
        console.print(part)
    prompt = clean(_samples(result)[0][0]).replace('"', "'") if _samples(result) else "..."
    path = shlex.quote(str(run.path))
    # Not wrapped: these lines are there to be copied.
    lines = [f'qlite.generate {path} --prompt "{prompt}"', f"qlite.chat {path}"]
    if (form := _export_form(run)) is not None:
        lines = [f"qlite.export {form} {path}", *lines]
    console.print("\nNext:  " + "\n       ".join(f"python -m {line}" for line in lines), soft_wrap=True)


def _export_form(run: RunFolder) -> str | None:
    """Return how what was trained leaves qlite: merged, as PEFT's files, or not at all."""
    if run.recipe().method.is_mergeable:
        return "--merge"
    return "--adapter" if run.is_known_to_peft else None


def closing_words(result: dict, path: Path, has_report: bool) -> Iterator[Table | Text]:
    """Yield the figures of the run in ``path`` as a table, and some of its answers."""
    table = Table.grid(padding=(0, 2))
    seconds, speed = format_seconds(result["train_seconds"]), f"{result['tokens_per_second']:.0f} tokens/s"
    table.add_row("trained", f"{result['steps']} steps, {result['tokens']:,} tokens in {seconds}, {speed}")
    if result["first_loss"] is not None:
        table.add_row("loss", f"{result['first_loss']:.3f} -> {result['last_loss']:.3f}")
    if result["eval_loss"] is not None:
        best = f"; lowest {result['best_loss']:.3f} at step {result['best_step']}" if result["best_step"] != result["steps"] else ""
        table.add_row("held out", f"loss {result['eval_loss']:.3f}, perplexity {result['perplexity']:.2f}{best}")
    if result["answers"]:
        counts = [f"{record['exact']}/{record['rows']}" for record in result["answers"]]
        table.add_row("exact match", f"{counts[0]} before training, {counts[-1]} after")
    table.add_row("peak memory", _peak_memory(result))
    table.add_row("written to", Text(str(path)))
    if has_report:
        table.add_row("to look at", Text(str(path / "report.html")))
    yield table
    for prompt, _, answer in _samples(result):
        yield Text(f"\n> {clean(prompt)}\n  {clean(answer)}")


def _samples(result: dict) -> list[tuple[str, str, str]]:
    return result["answers"][-1]["samples"] if result["answers"] else []


def _peak_memory(result: dict) -> str:
    """Return the run's peaks: "1.22 GiB of tensors (planned 1.22), 2.10 GiB of process memory"."""
    size, kind = format_bytes(result["peak_memory_bytes"]), result["peak_memory_kind"]
    # A run that an earlier version finished has no figures of tensors.
    held, planned = (result.get(key) for key in ("peak_tensor_bytes", "planned_tensor_bytes"))
    if not held:
        return f"{size} ({kind})"
    told = f" (planned {_in_the_unit_of(format_bytes(held), format_bytes(planned))})" if planned else ""
    return f"{format_bytes(held)} of tensors{told}, {size} {'of process memory' if kind == 'process' else kind}"


def _in_the_unit_of(other: str, amount: str) -> str:
    """Return ``amount`` without its unit if that is the unit of ``other``."""
    return amount.split()[0] if amount.split()[1] == other.split()[1] else amount
