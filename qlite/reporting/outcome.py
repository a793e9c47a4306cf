"""What was measured of a run after it was finished: evaluations beside the base, and the audits of its exports."""

from qlite.reporting.markup import count, number, prose, section, short, table
from qlite.reporting.told import Told

MOST = 20
"""Evaluations and exports that are shown."""


def evaluations(told: Told) -> str:
    """Return what ``qlite.evaluate`` found on each set of rows."""
    parts = []
    for name, found in list(told.evaluations.items())[:MOST]:
        metrics = found.get("metrics")
        metrics = {key: each for key, each in metrics.items() if isinstance(each, dict)} if isinstance(metrics, dict) else {}
        rows = [[_metric(key, each), short(number(each.get("base"))), short(number(each.get("adapter")))] for key, each in metrics.items()]
        if rows:
            parts.append(f"<h3>{prose(name, 100)}</h3>{table(['', 'base', 'tuned'], rows, 'numbers')}")
    return section("evaluations", "Evaluations", *parts)


def _metric(name: str, found: dict) -> str:
    unit = found.get("unit")
    return f"{prose(name.replace('_', ' '), 60)}{f' <small>{prose(unit, 40)}</small>' if unit else ''}"


def exports(told: Told) -> str:
    """Return how each export was compared with the run."""
    parts = [_export(name, audit) for name, audit in list(told.audits.items())[:MOST]]
    return section("exports", "Exports, compared with the run", *parts)


def _export(name: str, audit: dict) -> str:
    candidates = audit.get("candidates")
    found = {f"over the {key} weights": each for key, each in candidates.items()} if isinstance(candidates, dict) else {}
    base = audit.get("base")
    found = {key: each for key, each in {**found, "the base, untrained": base}.items() if isinstance(each, dict)}
    if not found:
        return f"<h3>{prose(name, 100)}</h3><p>It was not compared.</p>"
    written = f"over the {audit.get('onto')} weights"
    rows = [[f"{prose(key, 60)}{' <b>written</b>' if key == written else ''}", *_cells(each)] for key, each in found.items()]
    head = ["merged", "KL, nats a token", "likeliest token the same", "loss", "the run's", "same answers"]
    left = number(audit.get("left"))
    words = f"<p>Of what training changed (KL of run and base), {left:.1%} is left.</p>" if left is not None else ""
    return f"<h3>{prose(name, 100)}</h3>{words}{table(head, rows, 'numbers')}"


def _cells(found: dict) -> list[str]:
    top1 = number(found.get("top1"))
    same, answers = number(found.get("same_answers")), number(found.get("answers"))
    return [
        short(number(found.get("kl")), 3),
        "–" if top1 is None else f"{top1:.1%}",
        short(number(found.get("loss"))),
        short(number(found.get("live_loss"))),
        f"{count(same)} of {count(answers)}",
    ]
