"""Memory by phase and term: what was planned beside what was measured, as bars of one scale, and as a table."""

from dataclasses import dataclass

from qlite.memory import terms
from qlite.reporting.markup import count, number, plain, prose, size, table
from qlite.reporting.told import phases

MIB = 1024**2
ORDER = {term: index for index, term in enumerate(terms.ALL)}
SHOWN_SHARE = 0.004
"""Of the longest bar: a term that takes less is in the table alone."""


@dataclass(frozen=True)
class _Bar:
    name: str
    terms: dict[str, float]
    total: float


def draw_memory(memory: dict) -> str:
    """Return plan against measured of memory.json as a figure; nothing if it tells of no phase."""
    planned, measured = (_bars(memory, part) for part in ("planned", "measured"))
    order = [*planned, *(phase for phase in measured if phase not in planned)]
    longest = max((bar.total for bars in (planned, measured) for bar in bars.values()), default=0)
    if not longest:
        return ""
    rows = "".join(_phase(phase, planned.get(phase), measured.get(phase), longest) for phase in order)
    bars = [bar for found in (planned, measured) for bar in found.values()]
    used = {term for bar in bars for term, bytes in bar.terms.items() if bytes > SHOWN_SHARE * longest}
    keys = "".join(f'<li><i class="swatch {_look(term)}"></i>{prose(term)}</li>' for term in sorted(used, key=_rank))
    title = "By phase and term <small>bytes of tensors at each phase's peak</small>"
    words = f"{_told(planned, measured)}{_room(memory)}"
    return (
        f'<figure id="memory-bars" class="bars"><figcaption><h3 id="memory-bars-t">{title}</h3><p id="memory-bars-d">{words}</p>'
        f'<ul class="legend">{keys}</ul></figcaption>'
        f'<div role="group" aria-labelledby="memory-bars-t">{rows}</div>'
        f"<details><summary>Values as a table, in MiB</summary>{_values(planned, measured, order)}</details></figure>"
    )


def _bars(memory: dict, part: str) -> dict[str, _Bar]:
    found = {}
    for phase, peak in phases(memory, part).items():
        told = peak.get("terms")
        sizes = (
            {str(term): bytes for term, value in told.items() if (bytes := number(value)) and bytes > 0} if isinstance(told, dict) else {}
        )
        total = number(peak.get("bytes"))
        found[phase] = _Bar(
            part, dict(sorted(sizes.items(), key=lambda item: _rank(item[0]))), sum(sizes.values()) if total is None else total
        )
    return found


def _told(planned: dict[str, _Bar], measured: dict[str, _Bar]) -> str:
    both = [phase for phase in planned if phase in measured and measured[phase].total]
    if not both:
        return "There was no plan: what was measured stands alone." if measured else "Nothing was measured: the plan stands alone."
    phase = max(both, key=lambda each: measured[each].total)
    apart = max(abs(planned[each].total / measured[each].total - 1) for each in both)
    return (
        f"Most is held in {prose(phase)}: planned {size(planned[phase].total)}, measured {size(measured[phase].total)}. "
        f"Over all phases plan and run are at most {100 * apart:.2g} % apart."
    )


def _room(memory: dict) -> str:
    """Return in words what the plan was held against."""
    plan = memory.get("planned")
    needed, capacity = (number(plan.get(key)) if isinstance(plan, dict) else None for key in ("needed", "capacity"))
    return f" By plan the run needs {size(needed)} in all, of {size(capacity)} that were free." if needed and capacity else ""


def _phase(phase: str, planned: _Bar | None, measured: _Bar | None, longest: float) -> str:
    bars = "".join(_bar(phase, bar, longest) for bar in (planned, measured) if bar)
    return f'<div class="phase"><h4>{prose(phase)}</h4>{bars}</div>'


def _bar(phase: str, bar: _Bar, longest: float) -> str:
    pieces, left = [], 0.0
    for term, bytes in bar.terms.items():
        wide = 100 * bytes / longest
        if bytes > SHOWN_SHARE * longest:
            pieces.append(
                f'<rect class="{_look(term)}" x="{left:.2f}%" width="{wide:.2f}%" height="100%" data-tip="{plain(term)} {size(bytes)}"/>'
            )
        left += wide
    label, inside = plain(f"{phase}, {bar.name}: {size(bar.total)}"), "".join(pieces)
    drawn = f'<svg role="img" aria-label="{label}" height="14">{inside}</svg>'
    return f'<div class="bar {bar.name}"><span>{bar.name}</span>{drawn}<b>{size(bar.total)}</b></div>'


def _values(planned: dict[str, _Bar], measured: dict[str, _Bar], order: list[str]) -> str:
    every = sorted({term for bars in (planned, measured) for bar in bars.values() for term in bar.terms}, key=_rank)
    head = ["term", *(f"{prose(phase)}<br>{name}" for phase in order for name in ("planned", "measured"))]

    def cells(read) -> list[str]:
        return [read(bars[phase]) if phase in bars else "" for phase in order for bars in (planned, measured)]

    def tell(bytes: float) -> str:
        return "" if not bytes else f"{bytes / MIB:.2f}" if bytes < 100 * MIB else count(bytes / MIB)

    rows = [[prose(term), *cells(lambda bar, term=term: tell(bar.terms.get(term, 0.0)))] for term in every]
    return table(head, [*rows, ["all tensors", *cells(lambda bar: tell(bar.total))]], "numbers")


def _rank(term: str) -> int:
    return ORDER.get(term, len(ORDER))


def _look(term: str) -> str:
    return f"term{_rank(term)}"
