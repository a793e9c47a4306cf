"""The rows of a run: where they come from, how many are kept and left out and why, and how long they are."""

from qlite.reporting.markup import count, number, plain, prose, section, short, table
from qlite.reporting.told import Told

LEFT_OUT = {
    "untrained": "have nothing to learn",
    "bad": "do not fit their format",
    "held_out_twins": "are equal to held-out rows, or overlap them",
}
"""overview.json's names of why rows are not trained as they stand."""


def rows(told: Told) -> str:
    """Return the section on the data; nothing where overview.json says nothing of it."""
    parts = told.overview.get("parts")
    parts = [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    if not parts:
        return ""
    head = ["", "read", "kept", "trained on", "held out", "tokens", "of them trained"]
    counted = [
        [
            prose(part.get("key", "")),
            *(count(number(part.get(key))) for key in ("read", "kept", "used", "held_out", "tokens", "trained_tokens")),
        ]
        for part in parts
    ]
    return section("data", "Data", table(head, counted, "numbers"), *(_part(part, told) for part in parts))


def _part(part: dict, told: Told) -> str:
    sources, left = part.get("sources"), part.get("left_out")
    sources = [source for source in (sources if isinstance(sources, list) else [])[:20] if isinstance(source, dict)]
    lines = []
    for source in sources:
        path, form = prose(source.get("path", ""), 300), prose(source.get("format", ""), 60)
        lines.append(f"{count(number(source.get('rows')))} rows of <code>{path}</code> in format {form}")
    left = left if isinstance(left, dict) else {}
    fate = {"cut_start": "cut at their start", "cut_end": "cut at their end"}.get(str(told.key("data.long_rows")), "left out")
    if long := number(part.get("long")):
        lines.append(f"{count(long)} are longer than train.tokens and are {fate}")
    lines += [f"{count(rows)} {words}, and are left out" for key, words in LEFT_OUT.items() if (rows := number(left.get(key)))]
    facts = f'<ul class="facts">{"".join(f"<li>{line}</li>" for line in lines)}</ul>' if lines else ""
    return f'<div class="part">{facts}{_histogram(part, number(told.key("train.tokens")))}</div>'


def _histogram(part: dict, limit: float | None) -> str:
    """Return the lengths of a part's rows as bars, each as wide as so many rows."""
    found, spread = part.get("histogram"), part.get("lengths")
    bins = [tuple(map(number, each)) for each in (found if isinstance(found, list) else []) if isinstance(each, list) and len(each) == 3]
    bins = [each for each in bins if None not in each][:60]
    if not bins:
        return ""
    key, most = plain(part.get("key", "data")), max(rows for _, _, rows in bins) or 1
    identity = "".join(letter if letter.isalnum() else "-" for letter in str(part.get("key", "data")))
    wide, drawn = 100 / len(bins), []
    for index, (low, high, rows) in enumerate(bins):
        tall = 120 * rows / most
        tall = max(tall, 1.5) if rows else 0
        look = ' class="over"' if limit is not None and low > limit else ""
        drawn.append(
            f'<rect{look} x="{index * wide + 0.12 * wide:.2f}%" width="{0.76 * wide:.2f}%" y="{120 - tall:.1f}" height="{tall:.1f}" '
            f'data-tip="{low:,.0f} to {high:,.0f} tokens: {rows:,.0f} rows"/>'
        )
    spread = spread if isinstance(spread, dict) else {}
    low, half, most_of, high = (count(number(spread.get(name))) for name in ("low", "median", "most", "high"))
    words = f"{low} to {high} tokens a row, half at most {half}, 99 % at most {most_of}; the limit is {short(limit)}."
    ends = f'<text x="0" y="15">{bins[0][0]:,.0f}</text><text x="100%" y="15" text-anchor="end">{bins[-1][1]:,.0f} tokens</text>'
    values = table(["tokens a row", "rows"], [[f"{low:,.0f} to {high:,.0f}", f"{rows:,.0f}"] for low, high, rows in bins], "numbers")
    name = f"{identity}-lengths"
    title = f'<h3 id="{name}-t">Lengths of {key} <small>rows by tokens</small></h3><p id="{name}-d">{words}</p>'
    bars = f'<svg class="bins" height="120" role="img" aria-labelledby="{name}-t" aria-describedby="{name}-d">{"".join(drawn)}</svg>'
    return (
        f'<figure id="{name}" class="histogram"><figcaption>{title}</figcaption>{bars}'
        f'<svg class="across" height="20" aria-hidden="true">{ends}</svg>'
        f"<details><summary>Values as a table</summary>{values}</details></figure>"
    )
