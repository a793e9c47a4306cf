"""What a run said: its answers to prompts over time and to held-out rows, what the user was told, the recipe, the versions."""

import re
from itertools import groupby

from qlite.reporting.markup import count, number, plain, prose, section, table
from qlite.reporting.scale import evenly
from qlite.reporting.told import Told

PROMPTS, ANSWERS, NOTES = 12, 8, 200
"""At most so many prompts, different answers to each, and notes are shown; how many more there are is said."""
VERSIONS = ("qlite", "torch", "bitsandbytes", "transformers", "safetensors", "tokenizers", "device", "threads", "kernels")


def samples(told: Told) -> str:
    """Return the answers to the recipe's own prompts, evaluation after evaluation; an answer that did not change is told once."""
    said: dict[str, list[tuple[float, str]]] = {}
    for record in told.of_kind("samples"):
        for prompt, answer in _texts(record, 2):
            said.setdefault(prompt, []).append((number(record.get("step")) or 0.0, answer))
    talks = "".join(_talk(prompt, answers) for prompt, answers in list(said.items())[:PROMPTS])
    more = _more(len(said) - PROMPTS, "prompts")
    return section("samples", "Samples over time", talks, more)


def _talk(prompt: str, answers: list[tuple[float, str]]) -> str:
    runs = [list(same) for _, same in groupby(answers, key=lambda item: item[1])]
    items = []
    for run in evenly(runs, ANSWERS):
        first, last, answer = run[0][0], run[-1][0], run[0][1]
        when = f"step {first:,.0f}" if first == last else f"steps {first:,.0f} to {last:,.0f}"
        items.append(f'<li><span class="when">{when}</span>{_said(answer)}</li>')
    more = _more(len(runs) - ANSWERS, "answers")
    return f'<article class="talk"><h3 class="said" dir="auto">{prose(prompt, 600)}</h3><ol>{"".join(items)}</ol>{more}</article>'


def answers(told: Told) -> str:
    """Return held-out prompts with the expected answer and the model's, before and after the training."""
    records = [record for record in told.answers() if number(record.get("exact")) is not None]
    if not records:
        return ""
    first, last = records[0], records[-1]
    before = {prompt: answer for prompt, _, answer in _texts(first, 3)} if first is not last else {}
    cards = []
    for prompt, expected, answer in _texts(last, 3):
        parts = [("expected", expected, "")]
        parts += [("before", before[prompt], _mark(before[prompt], expected))] if prompt in before else []
        parts += [("after" if before else "answered", answer, _mark(answer, expected))]
        told_parts = "".join(f"<div><dt>{name}{mark}</dt><dd>{_said(text)}</dd></div>" for name, text, mark in parts)
        cards.append(
            f'<article class="talk"><h3 class="said" dir="auto">{prose(prompt, 600)}</h3><dl class="compared">{told_parts}</dl></article>'
        )
    rows = number(last.get("rows"))
    then = f"{count(number(first['exact']))} before the training, " if first is not last else ""
    told_in_words = (
        f"Of {count(rows)} held-out rows, answered letter by letter as expected: {then}{count(number(last['exact']))} after step "
    )
    told_in_words += f"{count(number(last.get('step')))}."
    shown = " Here are the first ones." if cards else ""
    return section("answers", "Held-out answers", f"<p>{told_in_words}{shown}</p>", *cards)


def notes(told: Told) -> str:
    """Return what the user was told, in order; the same words once."""
    texts = list(dict.fromkeys(str(record["text"]) for record in told.of_kind("note") if record.get("text")))
    items = "".join(f"<li>{prose(text)}</li>" for text in texts[:NOTES])
    return section("notes", "What the run said", f'<ol class="notes">{items}</ol>' if items else "", _more(len(texts) - NOTES, "notes"))


def recipe(told: Told) -> str:
    """Return the recipe as TOML, table by table."""
    blocks = re.split(r"\n(?=\[)", told.recipe_text.strip()[:100_000])
    shown = "".join(f"<pre>{_toml(block.strip())}</pre>" for block in blocks if block.strip())
    return section("recipe", "Recipe", f'<div class="toml">{shown}</div>' if shown else "")


def _toml(block: str) -> str:
    lines = []
    for line in prose(block, len(block)).split("\n"):
        key, sign, value = line.partition(" = ")
        lines.append(
            f"<b>{key}</b>{sign}{value}"
            if sign and re.fullmatch(r"[\w.-]+", key)
            else f"<strong>{line}</strong>"
            if line[:1] == "["
            else line
        )
    return "\n".join(lines)


def versions(told: Told) -> str:
    """Return with what the run was made, and whether anything of it could not be read."""
    found = [name for name in VERSIONS if name in told.machine] + [name for name in told.machine if name not in VERSIONS]
    rows = [[prose(name), prose(told.machine[name], 300)] for name in found[:50]]
    return section("versions", "Made with", table(["what", "which"], rows, "plainly") if rows else "")


def _texts(record: dict, width: int) -> list[list[str]]:
    """Return the record's samples as lists of ``width`` texts; what is none is left out."""
    found = record.get("samples")
    return [
        [str(part) for part in sample]
        for sample in (found if isinstance(found, list) else [])
        if isinstance(sample, list) and len(sample) == width
    ]


def _said(text: str) -> str:
    return f'<p class="said" dir="auto">{prose(text)}</p>' if text.strip() else '<p class="said nothing">nothing</p>'


def _mark(answer: str, expected: str) -> str:
    return ' <span class="right">✓ exact</span>' if answer.strip() == expected.strip() else ' <span class="wrong">✗ other</span>'


def _more(missing: int, what: str) -> str:
    return f'<p class="more">{missing:,} more {plain(what)} are in metrics.jsonl.</p>' if missing > 0 else ""
