"""Texts and numbers as HTML: what a stranger wrote is escaped, and what nobody would see in it is shown."""

import html
import re

from qlite.units import format_bytes

MOST_CHARACTERS = 2000
"""Of one text that a page shows; how many more there were is said."""
# Control and format characters, bidirectional overrides and lone surrogates; not line ends, tabs and what joins letters and emoji.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
MISSING = "–"
MOST = 1e100
"""Larger numbers are none of a run, and would burst an axis."""


def plain(value: object, limit: int = 300) -> str:
    """Return ``value`` on one line, for an attribute or a title: escaped, what is unseen written as ``\\x1b``."""
    text = " ".join(_cut(str(value), limit).split())
    return html.escape(UNSEEN.sub(_code, text))


def prose(value: object, limit: int = MOST_CHARACTERS) -> str:
    """Return ``value`` for an element, with its line ends: escaped, what is unseen written as ``\\x1b`` and marked as such."""
    text = html.escape(_cut(str(value), limit).replace("\r\n", "\n"))
    return UNSEEN.sub(lambda found: f'<span class="unseen">{_code(found)}</span>', text)


def table(head: list[str], rows: list[list[str]], look: str = "") -> str:
    """Return a table; ``head`` and ``rows`` are HTML, and the first cell of a row names it."""
    heads = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows)
    return f'<div class="scroll"><table class="{look}"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def section(key: str, title: str, *parts: str) -> str:
    """Return a part of a page under its heading; nothing if it has no parts."""
    inside = "".join(parts)
    return f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{title}</h2>{inside}</section>' if inside else ""


def number(value: object) -> float | None:
    """Return ``value`` as a number; None where it is none, or none that can be drawn."""
    is_one = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MOST
    return float(value) if is_one else None  # no comparison holds for what is not a number


def short(value: float | None, digits: int = 4) -> str:
    """Return ``value`` with so many significant digits: 0.0173, 4.65, 12,345, 3.4e-06."""
    if value is None:
        return MISSING
    if value and not 1e-4 <= abs(value) < 1e9:
        return f"{value:.{digits - 1}g}"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    text = f"{value:,.{digits - whole}f}" if whole and whole < digits else f"{value:,.0f}" if whole else f"{value:.{digits}g}"
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def count(value: float | None) -> str:
    """Return a whole number with its thousands apart."""
    return MISSING if value is None else f"{value:,.0f}"


def size(value: float | None) -> str:
    """Return an amount of bytes as a person reads it."""
    return MISSING if value is None else format_bytes(value)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]} … and {len(text) - limit:,} characters more"


def _code(found: re.Match) -> str:
    return found[0].encode("unicode_escape", "surrogatepass").decode()
