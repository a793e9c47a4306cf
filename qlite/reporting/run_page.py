"""The report of one run: what was trained, how it went, what it took, what it says now."""

import time
from pathlib import PurePath
from statistics import median

from qlite.reporting import outcome, rows, texts
from qlite.reporting.bars import draw_memory
from qlite.reporting.chart import TALL, Chart, Line
from qlite.reporting.document import document
from qlite.reporting.markup import count, number, prose, section, short, size
from qlite.reporting.scale import Point
from qlite.reporting.told import Figures, Told
from qlite.units import GIB, KIB, MIB, format_count, format_seconds

LINKS = ("learning", "memory", "samples", "answers", "evaluations", "exports", "data", "notes", "recipe", "versions")
MANY = 20
"""Steps from which on a curve is drawn with its moving average; fewer need none."""


def run_page(told: Told) -> str:
    """Return the report of ``told`` as one HTML file."""
    figures = Figures.of(told)
    sections = [
        section("learning", "How it learned", *_learning(told, figures)),
        section("memory", "What it took of memory", draw_memory(told.memory), memory_over_time(told)),
        texts.samples(told),
        texts.answers(told),
        outcome.evaluations(told),
        outcome.exports(told),
        rows.rows(told),
        texts.notes(told),
        texts.recipe(told),
        texts.versions(told),
    ]
    return document(f"{told.name} · qlite", _header(told, figures, sections), sections)


def _header(told: Told, figures: Figures, sections: list[str]) -> str:
    state = "Finished" if told.is_finished else f"Not finished: {count(figures.steps or 0)} of {count(figures.planned_steps)} steps so far"
    when = time.strftime("%d %B %Y, %H:%M", time.localtime(told.written)) if told.written else ""
    there = {each.partition('"')[2].partition('"')[0] for each in sections}
    links = "".join(f'<a href="#{key}">{key}</a>' for key in LINKS if key in there)
    unread = "".join(f"<li>{prose(what, 300)}</li>" for what in told.unread)
    warning = (
        f'<div class="warning"><p>Not all of this run could be read, so something is missing here:</p><ul>{unread}</ul></div>'
        if unread
        else ""
    )
    numbers = "".join(f"<div><dt>{label}</dt><dd>{value}<small>{more}</small></dd></div>" for label, value, more in headline(told, figures))
    facts = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in trained(told, figures))
    mark = f'<span class="state {"done" if told.is_finished else "open"}">{state}</span>'
    return (
        f'<header><p class="eyebrow">{mark} {when}</p><h1>{prose(told.name, 200)}</h1><p class="lead">{_lead(told, figures)}</p>'
        f'<nav aria-label="Parts of this page">{links}</nav>{warning}<dl class="headline">{numbers}</dl>'
        f'<dl class="trained">{facts}</dl></header>'
    )


def base_name(told: Told) -> str:
    """Return the base's own name, without the folders or the archive it lies in."""
    model = str(told.key("base.model") or "an unknown base")
    return PurePath(model.replace("\\", "/")).name or model


def method_words(told: Told) -> str:
    """Return the method and its rank: "LoRA, rank 16"."""
    given = told.key("method.name") or "an unknown method"
    words = {"lora": "LoRA", "adalora": "AdaLoRA", "relora": "ReLoRA"}
    name = " + ".join(words.get(str(each), str(each)) for each in (given if isinstance(given, list) else [given]))
    if name == "LoRA":
        begun = {"pissa": "PiSSA", "loftq": "LoftQ"}.get(str(told.key("method.init")), name)
        name = "DoRA" if told.key("method.dora") is True else begun
    rank = number(told.key("method.rank"))
    return name if rank is None else f"{name}, rank {rank:.0f}"


def _lead(told: Told, figures: Figures) -> str:
    bits, steps, tokens, seconds = number(told.key("base.bits")), figures.steps, figures.tokens, figures.seconds
    held = "" if bits is None else f", held in {bits:.0f} bit,"
    lead = f"<b>{prose(base_name(told), 120)}</b>{held} with {prose(method_words(told), 80)}"
    taken = [f"{count(steps)} steps" if steps else "", f"{count(tokens)} tokens" if tokens else ""]
    over = " over ".join(part for part in taken if part)
    return f"{lead}{': ' if over else ''}{over}{f' in {format_seconds(seconds)}' if seconds else ''}."


def headline(told: Told, figures: Figures) -> list[tuple[str, str, str]]:
    """Return (label, value, what is beside it) of the figures that matter most, as HTML; those that nobody knows are left out."""
    found = []
    if figures.last_loss is not None:
        found.append(("Training loss", short(figures.last_loss, 3), f"from {short(figures.first_loss, 3)}"))
    if figures.eval_loss is not None:
        perplexity = f"perplexity {short(figures.perplexity, 3)}" if figures.perplexity is not None else "nats a token"
        found.append(("Held-out loss", short(figures.eval_loss, 3), perplexity))
    if figures.exact is not None:
        before, after = figures.exact
        found.append(("Exact answers", f"{count(after)}<i>/{count(figures.exact_rows)}</i>", f"{count(before)} before"))
    if figures.speed:
        found.append(("Speed", short(figures.speed, 3), "tokens a second"))
    if figures.tensor_bytes:
        amount, unit = size(figures.tensor_bytes).split()
        planned = f"planned {size(figures.planned_bytes)}" if figures.planned_bytes else "of tensors at most"
        found.append(("Peak of tensors", f"{amount}<i> {unit}</i>", planned))
    elif figures.peak_bytes:
        amount, unit = size(figures.peak_bytes).split()
        found.append(("Peak memory", f"{amount}<i> {unit}</i>", prose(figures.peak_kind, 60)))
    return found


def trained(told: Told, figures: Figures) -> list[tuple[str, str]]:
    """Return (label, value) of what was trained, on what, as HTML."""
    bits, kind = number(told.key("base.bits")), told.key("base.quant_type")
    double = " with double quantisation" if told.key("base.double_quant") is True and bits == 4 else ""
    held = f"{bits:.0f} bit{f' ({prose(kind, 20)}{double})' if bits == 4 and kind else ''}" if bits is not None else ""
    targets = told.key("method.targets")
    targets = ", ".join(map(str, targets)) if isinstance(targets, list) else str(targets or "")
    epochs = told.curve("step", "epoch")
    steps = f"{count(figures.steps)}{f', {short(epochs[-1][1], 3)} epochs' if epochs else ''}" if figures.steps else ""
    shape = [number(told.key(f"train.{key}")) for key in ("micro_batch", "accumulation", "tokens")]
    peak = f"{size(figures.peak_bytes)} ({prose(figures.peak_kind, 60)})" if figures.peak_bytes else ""
    found = {
        "Base": f"<code>{prose(told.key('base.model') or '', 300)}</code>",
        "Weights": held,
        "Method": f"{prose(method_words(told), 80)}{f', on {prose(targets, 200)}' if targets else ''}",
        "Trained": f"{count(figures.parameters)} parameters ({format_count(figures.parameters)})" if figures.parameters else "",
        "Steps": steps,
        "A step": f"{shape[0]:.0f} × {shape[1]:.0f} rows of at most {shape[2]:,.0f} tokens" if None not in shape else "",
        "Tokens": count(figures.tokens) if figures.tokens else "",
        "Time in training": format_seconds(figures.seconds) if figures.seconds else "",
        "Optimizer": f"{prose(told.key('optimizer.name') or '', 60)}, lr {prose(told.key('optimizer.lr'), 30)}"
        if told.key("optimizer.name")
        else "",
        "Memory at most": peak if figures.tensor_bytes else "",  # else it is among the large figures
        "Device": prose(told.machine.get("device", ""), 120),
        "Folder": f"<code>{prose(told.path, 300)}</code>",
    }
    return [(label, value) for label, value in found.items() if value and value != "<code></code>"]


def _learning(told: Told, figures: Figures) -> list[str]:
    """Return the figures over steps; the loss is the large one."""
    loss, evals = told.curve("step", "loss"), told.curve("eval", "loss")
    steps = [step for step, _ in loss] or [step for step, _ in evals]
    ends = (steps[0], steps[-1]) if steps else None
    curves = [
        Line("each step", loss, "raw"),
        Line("moving average", told.smooth_curve("loss"), "main"),
        Line("held out", evals, "eval", has_dots=True),
    ]
    curves = curves if len(loss) >= MANY else [Line("training", loss, "main"), curves[2]]
    small = [
        Chart(
            "eval-loss", "Held-out loss", "nats a token", _eval_told(figures), [Line("held out", evals, "eval", has_dots=True)], steps=ends
        ),
        Chart(
            "lr", "Learning rate", "", _lr_told(told), [Line("learning rate", told.curve("step", "lr"), "main")], from_zero=True, steps=ends
        ),
        Chart("grad-norm", "Gradient norm", "before clipping", _norm_told(told), _both(told, "grad_norm"), may_be_log=True, steps=ends),
        Chart("speed", "Speed", "tokens a second", _speed_told(told), _both(told, "tokens_per_second"), from_zero=True, steps=ends),
    ]
    large = Chart("loss", "Loss", "nats a token", _loss_told(loss, figures), curves, TALL, may_be_log=True, steps=ends)
    drawn = "".join(chart.draw() for chart in small)
    return [large.draw(), f'<div class="pair">{drawn}</div>' if drawn else ""]


def _both(told: Told, key: str) -> list[Line]:
    points = told.curve("step", key)
    if len(points) < MANY:
        return [Line("each step", points, "main")]
    return [Line("each step", points, "raw"), Line("moving average", told.smooth_curve(key), "main")]


def _loss_told(loss: list[Point], figures: Figures) -> str:
    if not loss:
        return "Of the steps nothing is known; these are the evaluations."
    step, low = min(loss, key=_value)
    end = f"{short(figures.last_loss)}, the mean of the last steps" if len(loss) >= MANY else short(loss[-1][1])
    return f"From {short(loss[0][1])} to {end}. The lowest is that of step {count(step)}: {short(low)}."


def _eval_told(figures: Figures) -> str:
    ends = f"From {short(figures.first_eval_loss)} to {short(figures.eval_loss)}"
    return f"{ends}. The lowest is that of step {count(figures.best_step)}: {short(figures.best_loss)}."


def _lr_told(told: Told) -> str:
    points = told.curve("step", "lr")
    if not points:
        return ""
    step, high = max(points, key=_value)
    name = prose(told.key("schedule.name") or "schedule", 40).capitalize()
    return f"{name}: at most {short(high, 3)}, at step {count(step)}; {short(points[-1][1], 3)} in the last step."


def _norm_told(told: Told) -> str:
    points, clip = told.curve("step", "grad_norm"), number(told.key("train.clip_norm"))
    if not points:
        return ""
    step, high = max(points, key=_value)
    clipped = f"; {sum(value > clip for _, value in points):,} of {len(points):,} steps were clipped to {short(clip)}" if clip else ""
    return f"At most {short(high)}, at step {count(step)}{clipped}."


def _speed_told(told: Told) -> str:
    values = sorted(value for _, value in told.curve("step", "tokens_per_second"))
    if not values:
        return ""
    low, half, high = (short(value, 3) for value in (values[0], median(values), values[-1]))
    return f"The median is {half}; the slowest step makes {low}, the fastest {high}."


def _value(point: Point) -> float:
    return point[1]


def memory_over_time(told: Told) -> str:
    """Return what the device and the tensors held, step by step, beside the plan."""
    tensors = []
    for record in told.of_kind("step"):
        by_term, step = record.get("memory_terms"), number(record.get("step"))
        if isinstance(by_term, dict) and step is not None and 0 <= step < 1e12:
            tensors.append((step, sum(filter(None, map(number, by_term.values())))))
    on_card = bool(told.curve("step", "memory_reserved"))
    found = [
        ("whole card", told.curve("step", "memory_driver"), "fourth"),
        ("reserved by torch", told.curve("step", "memory_reserved"), "third"),
        ("allocated" if on_card else "process", told.curve("step", "memory_used"), "second"),
        ("tensors at a step's peak", sorted(dict(tensors).items()), "main"),
        ("planned for tensors", told.curve("step", "memory_planned"), "plan"),
    ]
    high = max((value for _, points, _ in found for _, value in points), default=0)
    unit, name = next(((unit, name) for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")) if high >= unit), (1, "bytes"))
    lines = [Line(label, [(step, value / unit) for step, value in points], look) for label, points, look in found]
    words = "What torch counts on the card" if on_card else "A process holds its libraries beside its tensors"
    total = max((value for _, value in told.curve("step", "memory_total")), default=0)
    words += f"; the {'card' if on_card else 'machine'} has {size(total)}." if total else "."
    return Chart("memory-steps", "Over the steps", name, words, lines, from_zero=True).draw()
