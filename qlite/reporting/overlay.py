"""Several runs on one page: their curves over each other, and a table of that in which they differ."""

from collections.abc import Callable

from qlite.reporting.chart import TALL, Chart, Line
from qlite.reporting.document import document
from qlite.reporting.markup import MISSING, count, prose, section, short, size, table
from qlite.reporting.told import Figures, Told
from qlite.units import format_seconds

LOOKS = [f"run{colour}{f' dash{dash}' if dash else ''}" for dash in range(4) for colour in range(6)]
"""What tells runs apart, by colour and, beyond six, by dashes, too."""
PLACES = ("output.dir",)
"""Keys that say nothing of what was trained."""


def overlay(runs: list[Told]) -> str:
    """Return one page on ``runs``, of which there are two or more, and at most as many as LOOKS."""
    names = _names(runs)
    sections = [
        section("curves", "Curves", *_curves(runs, names)),
        section("figures", "Figures", _figures(runs, names)),
        section("differences", "What differs in their recipes", _differences(runs, names)),
    ]
    title = f"{len(runs)} runs compared"
    items = "".join(f"<li>{_key(index)}<span>{prose(name, 120)}</span></li>" for index, name in enumerate(names))
    unread = "".join(
        f"<li>{prose(name, 120)}: {prose(what, 300)}</li>" for name, run in zip(names, runs, strict=True) for what in run.unread
    )
    warning = f'<div class="warning"><p>Not all could be read, so something is missing here:</p><ul>{unread}</ul></div>' if unread else ""
    header = f'<header><p class="eyebrow">qlite</p><h1>{title}</h1><ul class="legend runs">{items}</ul>{warning}</header>'
    return document(f"{title}: {', '.join(names)}", header, sections)


def _names(runs: list[Told]) -> list[str]:
    """Return a name for each run: its folder's, and where two have the same, the whole path."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else str(run.path) for name, run in zip(names, runs, strict=True)]


def _key(index: int) -> str:
    return f'<svg class="key" aria-hidden="true"><path class="{LOOKS[index]}" d="M1 6h18"/></svg>'


def _curves(runs: list[Told], names: list[str]) -> list[str]:
    def lines(curve: Callable[[Told], list], has_dots: bool = False) -> list[Line]:
        return [Line(name, curve(run), LOOKS[index], has_dots) for index, (name, run) in enumerate(zip(names, runs, strict=True))]

    loss = Chart("loss", "Training loss", "nats a token", "The moving average over a twentieth of each run.",
                 lines(lambda run: run.smooth_curve("loss")), TALL, may_be_log=True)  # fmt: skip
    small = [
        Chart("eval-loss", "Held-out loss", "nats a token", "At every evaluation, on each run's own held-out rows.",
              lines(lambda run: run.curve("eval", "loss"), has_dots=True), may_be_log=True),
        Chart("speed", "Speed", "tokens a second", "The moving average over a twentieth of each run.",
              lines(lambda run: run.smooth_curve("tokens_per_second")), from_zero=True),
    ]  # fmt: skip
    drawn = "".join(chart.draw() for chart in small)
    return [loss.draw(), f'<div class="pair">{drawn}</div>' if drawn else ""]


def _figures(runs: list[Told], names: list[str]) -> str:
    """Return the final figures, a column a run, the best of a line in bold where one is better than another."""
    found = [Figures.of(run) for run in runs]
    lines = [
        ("held-out loss", [each.eval_loss for each in found], short, min),
        ("lowest held-out loss", [each.best_loss for each in found], short, min),
        ("perplexity", [each.perplexity for each in found], short, min),
        (
            "exact answers",
            [_exact_share(each) for each in found],
            lambda value: f"{100 * value:.3g} %" if value is not None else MISSING,
            max,
        ),
        ("training loss at the end", [each.last_loss for each in found], short, None),
        ("tokens/s", [each.speed for each in found], lambda value: short(value, 3), max),
        (
            "time in training",
            [each.seconds for each in found],
            lambda value: format_seconds(value) if value is not None else MISSING,
            None,
        ),
        ("steps", [each.steps for each in found], count, None),
        ("tokens", [each.tokens for each in found], count, None),
        ("trained parameters", [each.parameters for each in found], count, None),
        ("peak of tensors", [each.tensor_bytes for each in found], size, min),
        ("planned for tensors", [each.planned_bytes for each in found], size, None),
        ("memory at most", [each.peak_bytes for each in found], size, min),
    ]
    rows = [[label, *_row(values, tell, better)] for label, values, tell, better in lines if any(value is not None for value in values)]
    states = ["finished" if run.is_finished else "not finished" for run in runs]
    rows += [["state", *states]] if len(set(states)) > 1 else []
    for key in dict.fromkeys(key for run in runs for key in run.machine):
        told = [run.machine.get(key) for run in runs]
        rows += (
            [[prose(key, 60), *(prose(MISSING if each is None else each, 200) for each in told)]]
            if any(each != told[0] for each in told)
            else []
        )
    return table(_head(names), rows, "differ")


def _exact_share(figures: Figures) -> float | None:
    return figures.exact[1] / figures.exact_rows if figures.exact and figures.exact_rows else None


def _row(values: list[float | None], tell: Callable, better: Callable | None) -> list[str]:
    known = [value for value in values if value is not None]
    best = better(known) if better and len(set(known)) > 1 else None
    return [f"<b>{tell(value)}</b>" if value is not None and value == best else tell(value) for value in values]


def _differences(runs: list[Told], names: list[str]) -> str:
    """Return the keys of the recipes whose values are not the same in all runs, a column a run."""
    flat = [_flat(run.recipe) for run in runs]
    keys = [key for key in dict.fromkeys(key for each in flat for key in each) if key not in PLACES]
    rows = [
        [prose(key, 120), *(prose(MISSING if key not in each else _value(each[key]), 300) for each in flat)]
        for key in keys
        if any(each.get(key) != flat[0].get(key) for each in flat)
    ]
    return table(_head(names), rows, "differ keys") if rows else "<p>Nothing: they are the same but for where they were written.</p>"


def _head(names: list[str]) -> list[str]:
    return ["", *(f"{_key(index)}{prose(name, 120)}" for index, name in enumerate(names))]


def _flat(recipe: dict) -> dict[str, object]:
    """Return the recipe's keys by their full names."""
    return {f"{table}.{key}": value for table, keys in recipe.items() if isinstance(keys, dict) for key, value in keys.items()}


def _value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
