"""One figure with curves over steps, or over ranks: drawn once for every width, readable without scripts, with its values as a table."""

from dataclasses import dataclass

from qlite.reporting.markup import plain, prose, short, table
from qlite.reporting.scale import Axis, Point, evenly, thin

BUCKETS = 240
"""Stretches that a curve is thinned to; a figure is seldom drawn with more dots across."""
TABLE_ROWS = 40
WIDTH = 1000
"""Units across; the picture is stretched to the room there is."""
TALL, FLAT = 280, 170
"""Heights in pixels."""


@dataclass(frozen=True)
class Line:
    """One curve: (step, value) in order of steps, and how it looks: classes of page.css."""

    name: str
    points: list[Point]
    look: str
    has_dots: bool = False
    """Drawn with a dot for each value, for curves of few."""


@dataclass(frozen=True)
class Chart:
    """What a figure shows and what it says in words."""

    key: str
    """Its id on the page."""
    title: str
    unit: str
    told: str
    """The finding in one sentence, as HTML."""
    lines: list[Line]
    height: int = FLAT
    from_zero: bool = False
    may_be_log: bool = False
    steps: tuple[float, float] | None = None
    """First and last step of the axis; without it, those of the lines."""
    counted: str = "step"
    """What the axis counts."""

    def draw(self) -> str:
        """Return the figure as HTML; nothing if no line has a point."""
        lines = [line for line in self.lines if line.points]
        if not lines:
            return ""
        every = [point for line in lines for point in line.points]
        across = Axis.along(*(self.steps or (min(every)[0], max(every)[0])))
        up = Axis.over([value for _, value in every], 6 if self.height == TALL else 5, self.from_zero, self.may_be_log)
        unit = f"{self.unit}, logarithmic" if up.is_log else self.unit
        legend = "".join(f'<li><svg class="key" aria-hidden="true"><path class="{line.look}" d="M2 6h16"/></svg>{prose(line.name)}</li>'
                         for line in lines)  # fmt: skip
        legend = f'<ul class="legend">{legend}</ul>' if len(lines) > 1 else ""
        drawing = _Drawing(across, up, self.height, self.counted)
        return (
            f'<figure id="{self.key}" class="chart"><figcaption><h3 id="{self.key}-t">{self.title} <small>{unit}</small></h3>'
            f'<p id="{self.key}-d">{self.told}</p>{legend}</figcaption>'
            f'<div class="frame">{drawing.scale_up()}{drawing.plot(lines, self.key)}{drawing.scale_across()}</div>'
            f"<details><summary>Values as a table</summary>{_values(lines, self.counted)}</details></figure>"
        )


@dataclass(frozen=True)
class _Drawing:
    """The pieces of one figure: labels are never stretched, so each axis is a picture of its own beside the curves."""

    across: Axis
    up: Axis
    height: int
    counted: str

    def x(self, step: float) -> str:
        return _brief(WIDTH * self.across.place(step))

    def y(self, value: float) -> str:
        return _brief(self.height * (1 - self.up.place(value)))

    def scale_up(self) -> str:
        labels = "".join(f'<text x="100%" y="{self.y(tick)}" dy=".32em">{self.up.label(tick)}</text>' for tick in self.up.ticks)
        return f'<svg class="up" height="{self.height}" aria-hidden="true">{labels}</svg>'

    def scale_across(self) -> str:
        first = f"{self.counted} {self.across.label(self.across.low)}"
        labels = [f'<text x="0" y="16">{first}</text>']
        for tick in self.across.ticks:
            place = 100 * self.across.place(tick)
            if place > 14:  # what is nearer would run into the first
                anchor = "end" if place > 97 else "middle"
                labels.append(f'<text x="{_brief(place)}%" y="16" text-anchor="{anchor}">{self.across.label(tick)}</text>')
        return f'<svg class="across" height="22" aria-hidden="true">{"".join(labels)}</svg>'

    def plot(self, lines: list[Line], key: str) -> str:
        grid = "".join(f"M0 {self.y(tick)}h{WIDTH}" for tick in self.up.ticks)
        drawn = "".join(self._line(line) for line in lines)
        return (
            f'<svg class="plot" height="{self.height}" viewBox="0 0 {WIDTH} {self.height}" preserveAspectRatio="none" role="img" '
            f'aria-labelledby="{key}-t" aria-describedby="{key}-d" data-from="{self.across.low:.12g}" '
            f'data-to="{self.across.high:.12g}" data-unit="{self.counted}">'
            f'<path class="grid" d="{grid}"/>{drawn}</svg>'
        )

    def _line(self, line: Line) -> str:
        points = thin(line.points, BUCKETS)
        places = [f"{self.x(step)} {self.y(value)}" for step, value in points]
        told = " ".join(f"{step:.12g} {value:.5g}" for step, value in points)
        dots = (
            f'<path class="{line.look} dots" d="{"".join(f"M{place}h0" for place in places)}"/>'
            if line.has_dots or len(points) == 1
            else ""
        )
        return f'<path class="{line.look}" d="M{"L".join(places)}" data-name="{plain(line.name)}" data-points="{told}"/>{dots}'


def _brief(place: float) -> str:
    return f"{place:.1f}".removesuffix(".0")


def _values(lines: list[Line], counted: str) -> str:
    """Return some of the values, evenly spread over the steps, a column a line."""
    columns = [dict(line.points) for line in lines]
    steps = evenly(sorted({step for column in columns for step in column}), TABLE_ROWS)
    if any(len(line.points) <= TABLE_ROWS for line in lines):  # where there are few, all of them
        steps = sorted({*steps, *(step for column in columns if len(column) <= TABLE_ROWS for step in column)})
    rows = [[f"{step:,.0f}", *(short(column.get(step)) for column in columns)] for step in steps]
    return table([counted, *(prose(line.name) for line in lines)], rows, "numbers")
