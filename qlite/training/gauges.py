"""Memory on the screen: a gauge of the whole device, and one of the tensors by term beside what the plan says.

Each term has its letter, the same as in the bars of qlite.plan, so that no colour carries meaning alone.
"""

from collections.abc import Callable, Iterable
from itertools import accumulate
from textwrap import wrap

from rich.text import Text

from qlite.device import MemoryUse
from qlite.memory import terms
from qlite.memory.terms import Terms
from qlite.training.report import spill_words
from qlite.units import GIB, KIB, MIB

LETTERS = dict(zip(terms.ALL, "BQENAGOSIDLKW", strict=True))
"""Each term's letter in a bar."""
COLOURS = dict(
    zip(
        terms.ALL,
        ("blue", "bright_blue", "cyan", "white", "green", "yellow", "bright_yellow", "red", "magenta", "bright_magenta", "bright_red",
         "bright_cyan", "bright_black"),
        strict=True,
    )
)  # fmt: skip
"""Each term's colour."""
OTHER = "other"
"""The name under which terms too small to be told alone are put together; its mark is "+"."""
SMALL_SHARE = 0.005
OVER_PLAN = 1.02
"""From here on more than planned is said to be so: what is less can be the rounding of a kernel's own workspace."""

Part = tuple[str, str, str, int]
"""(mark, style, label, bytes)."""


def memory_blocks(memory: MemoryUse, width: int) -> list[list[Text]]:
    """Return ways to show ``memory`` in lines of ``width`` cells, the fullest first; what matters least is missing first."""
    by_term = memory.terms and memory.planned
    device_bar, device_legend = _device_gauge(memory, width, "tensors" if by_term else "")
    alarm = [Text(line, "bold red") for line in wrap(spill_words(memory.spilled), width)] if memory.spilled else []
    plain = [*alarm, device_bar, *_flow(device_legend, width)]
    detailed = [*alarm, device_bar, *_flow([*device_legend, *_cache_figures(memory)], width)]
    if not by_term:
        return [detailed, plain]
    tensor_bar, tensor_legend = _tensor_gauge(memory, width)
    tensors = [tensor_bar, *_flow(tensor_legend, width)]
    return [[*detailed, *tensors], [*plain, *tensors], [*plain, tensor_bar], plain]


def shown_terms(found: Terms) -> Terms:
    """Return ``found`` without what takes less than half a percent, and all of that together under ``OTHER``, last."""
    least = SMALL_SHARE * sum(found.values())
    large = {term: size for term, size in found.items() if size >= least and size > 0}
    small = sum(found.values()) - sum(large.values())
    return {**large, OTHER: small} if small else large


def tensor_line(memory: MemoryUse) -> str:
    """Return the tensors by term as one line: "5.97 GiB of tensors (planned 6.02): base weights 3.25, ..."."""
    held = sum(memory.terms.values())
    unit, figure = _unit(max(held, memory.planned or 0))
    over = f": {_over(memory)}" if _over(memory) else ""
    planned = f" (planned {figure(memory.planned)}{over})" if memory.planned else ""
    listed = ", ".join(f"{term} {figure(size)}" for term, size in shown_terms(memory.terms).items())
    return f"{figure(held)} {unit} of tensors{planned}: {listed}"


def _device_gauge(memory: MemoryUse, width: int, beside: str) -> tuple[Text, list[Text]]:
    """Return a bar of the device's whole memory, and what its marks mean, in GiB; the bar begins where that of ``beside`` does."""
    parts = _device_parts(memory)
    held = memory.used if memory.reserved is None else max(memory.reserved, memory.driver or 0)
    name = "RAM" if memory.reserved is None else "VRAM"
    bar = Text(f"{name:<{len(beside)}} ")
    tail = f" {held / GIB:.1f} of {memory.total / GIB:.1f} GiB"
    # Each part contains the one before.
    _draw(bar, parts, [size for *_, size in parts], memory.total, max(4, width - bar.cell_len - len(tail)))
    legend = [_entry(mark, style, label, f"{size / GIB:.2f}") for mark, style, label, size in parts]
    if memory.reserved is not None:
        legend.append(Text.assemble(("peak ", "dim"), f"{memory.peak / GIB:.2f}"))
    return bar.append(tail), legend


def _device_parts(memory: MemoryUse) -> list[Part]:
    if memory.reserved is None:
        return [("█", "green", "process", memory.used), ("▒", "yellow", "peak", memory.peak)]
    parts = [("█", "green", "allocated", memory.used), ("▓", "cyan", "reserved", memory.reserved)]
    return parts if memory.driver is None else [*parts, ("░", "magenta", "driver", memory.driver)]


def _cache_figures(memory: MemoryUse) -> list[Text]:
    """Return what of a card's memory no tensor ever needed: inside torch's allocator, and outside of it."""
    figures = []
    if memory.reserved is not None:
        # Against the peak: between two steps the room of the activations is free, but not lost.
        figures.append(("fragmented", memory.reserved - memory.peak))
    if memory.driver is not None:
        figures.append(("outside torch", memory.driver - memory.reserved))
    return [Text.assemble((f"{label} ", "dim"), f"{max(0, size) / GIB:.2f}") for label, size in figures]


def _tensor_gauge(memory: MemoryUse, width: int) -> tuple[Text, list[Text]]:
    """Return a bar of the tensors by term, as long as the plan unless they are more, and what its letters mean."""
    held, planned = sum(memory.terms.values()), memory.planned
    unit, figure = _unit(max(held, planned))
    parts = [(LETTERS.get(term, "+"), COLOURS.get(term, "dim"), term, size) for term, size in shown_terms(memory.terms).items()]
    bar = Text("tensors ")
    over = _over(memory)
    told = f", {over}" if over else ""
    tails = (f" {figure(held)} of planned {figure(planned)} {unit}{told}", f" {figure(held)}/{figure(planned)}{told}", f" {over}".rstrip())
    # The fullest that leaves a bar worth the name.
    tail = next(tail for tail in tails if width - bar.cell_len - len(tail) >= 8 or tail == tails[-1])
    _draw(bar, parts, accumulate(size for *_, size in parts), max(held, planned), max(4, width - bar.cell_len - len(tail)))
    legend = [_entry(mark, style, label, figure(size)) for mark, style, label, size in parts]
    return bar.append(tail, "bold red" if over else ""), legend


def _draw(bar: Text, parts: list[Part], ends: Iterable[int], whole: int, cells: int) -> None:
    """Append ``cells`` cells to ``bar``: of each part the marks up to its end, in bytes of ``whole``, and dots for what is free."""
    drawn = 0
    for (mark, style, *_), size in zip(parts, ends, strict=True):
        end = min(cells, round(cells * size / max(1, whole)))
        bar.append(mark * (end - drawn), style)
        drawn = max(drawn, end)
    bar.append("·" * (cells - drawn), "dim")


def _entry(mark: str, style: str, label: str, figure: str) -> Text:
    return Text.assemble((mark, style), (f" {label} ", "dim"), figure)


def _over(memory: MemoryUse) -> str:
    """Return by how much more than planned the tensors are, in words; nothing where they are as planned or there is no plan."""
    factor = sum(memory.terms.values()) / memory.planned if memory.planned else 0
    return f"{100 * (factor - 1):.0f} % over" if factor > OVER_PLAN else ""


def _unit(size: int) -> tuple[str, Callable[[int], str]]:
    """Return the unit in which figures up to ``size`` bytes are told, and how one is written."""
    name, unit, digits = next(each for each in (("GiB", GIB, 2), ("MiB", MIB, 1), ("KiB", KIB, 1)) if size >= each[1] or each[1] == KIB)
    return name, lambda number: f"{number / unit:.{digits}f}"


def _flow(parts: list[Text], width: int) -> list[Text]:
    """Return ``parts`` on as few lines as ``width`` allows."""
    lines = [Text()]
    for part in parts:
        if lines[-1] and lines[-1].cell_len + 2 + part.cell_len > width:
            lines.append(Text())
        lines[-1].append("  " if lines[-1] else "").append_text(part)
    return lines
