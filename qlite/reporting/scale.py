"""From numbers to places on paper: round ticks, curves thinned so that no extreme is lost, and their smooth course."""

from dataclasses import dataclass
from itertools import accumulate
from math import ceil, floor, log10

from qlite.reporting.markup import short

Point = tuple[float, float]
LOG_FROM = 50
"""From this ratio of largest to smallest on, a curve that may is drawn over a logarithmic axis."""


def thin(points: list[Point], buckets: int) -> list[Point]:
    """Return ``points`` with at most two of each of ``buckets`` stretches, the lowest and the highest; the first and the last stay."""
    if len(points) <= 2 * buckets + 2:
        return points
    inner, kept = points[1:-1], [points[0]]
    for index in range(buckets):
        stretch = inner[index * len(inner) // buckets : (index + 1) * len(inner) // buckets]
        kept += sorted({min(stretch, key=_value), max(stretch, key=_value)})
    return [*kept, points[-1]]


def evenly(items: list, most: int) -> list:
    """Return at most ``most`` of ``items``, evenly spread, with the first and the last."""
    if len(items) <= most:
        return items
    return [items[index * (len(items) - 1) // (most - 1)] for index in range(most)]


def smooth(values: list[float]) -> list[float]:
    """Return the moving average over a twentieth of ``values``, with most weight in its middle; unlike a running one it does not lag."""
    reach = max(len(values) // 50, min(3, len(values) // 10))
    return _means(_means(values, reach), reach)  # twice: a single outlier is a hill then, and no plateau with cliffs


@dataclass(frozen=True)
class Axis:
    """The range of one direction, from its lowest to its highest value, and the round values that are marked on it."""

    low: float
    high: float
    ticks: tuple[float, ...]
    is_log: bool = False

    def place(self, value: float) -> float:
        """Return where ``value`` lies: 0 at the lowest end, 1 at the highest."""
        low, high, value = map(log10, (self.low, self.high, value)) if self.is_log else (self.low, self.high, value)
        return (value - low) / (high - low)

    def label(self, tick: float) -> str:
        """Return ``tick`` in as few digits as tell it from its neighbours."""
        if self.is_log or len(self.ticks) < 2 or not 1e-4 <= max(map(abs, self.ticks)) < 1e7:
            return short(tick, 3)
        decimals = max(0, -floor(log10(self.ticks[1] - self.ticks[0]) + 1e-9))
        return f"{tick:,.{decimals + (0 if _is_whole(tick, decimals, self.ticks) else 1)}f}"

    @classmethod
    def over(cls, values: list[float], most_ticks: int = 5, from_zero: bool = False, may_be_log: bool = False) -> "Axis":
        """Return a vertical axis that holds ``values``, of which there is at least one, and ends on round ones."""
        low, high = min(values), max(values)
        if may_be_log and low > 0 and high / low >= LOG_FROM:
            return cls(*_log_axis(low, high), is_log=True)
        low = min(0.0, low) if from_zero else low
        if high - low < 1e-9 * max(abs(low), abs(high), 1e-12):
            low, high = (low - abs(low) / 2, high + abs(high) / 2) if high else (0.0, 1.0)
            low = max(0.0, low) if from_zero else low
        step = _round_step(high - low, most_ticks)
        first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
        return cls(first * step, last * step, tuple(round(index * step, 12) for index in range(first, last + 1)))

    @classmethod
    def along(cls, low: float, high: float, most_ticks: int = 5) -> "Axis":
        """Return an axis of steps, from the first to the last of them, with whole numbers marked."""
        high = high if high > low else low + 1
        step = max(1.0, _round_step(high - low, most_ticks))
        step = float(ceil(step)) if step < 10 else step
        ticks = [index * step for index in range(ceil(low / step), floor(high / step) + 1)]
        return cls(low, high, tuple(ticks))


def _means(values: list[float], reach: int) -> list[float]:
    """Return for each of ``values`` the mean of it and of up to ``reach`` on either side."""
    sums = [0.0, *accumulate(values)]
    spans = ((max(0, index - reach), min(len(values), index + reach + 1)) for index in range(len(values)))
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]


def _value(point: Point) -> float:
    return point[1]


def _round_step(span: float, most: int) -> float:
    """Return the smallest of 1, 2, 2.5, 5 times a power of ten that cuts ``span`` into fewer than ``most`` pieces."""
    rough = span / max(1, most - 1)
    power = 10.0 ** floor(log10(rough))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))


def _log_axis(low: float, high: float) -> tuple[float, float, tuple[float, ...]]:
    """Return the ends and ticks of a logarithmic axis: powers of ten, and 2 and 5 times them where there are few."""
    decades = range(floor(log10(low)), ceil(log10(high)) + 1)
    factors = (1, 2, 5) if len(decades) <= 3 else (1, 3) if len(decades) <= 4 else (1,)
    marks = [factor * 10.0**power for power in decades for factor in factors]
    below, above = [m for m in marks if m <= low * (1 + 1e-9)], [m for m in marks if m >= high * (1 - 1e-9)]
    first, last = max(below, default=low), min(above, default=high)
    ticks = [float(f"{mark:.6g}") for mark in marks if first <= mark <= last]
    return first, last, tuple(ticks if len(ticks) < 8 else ticks[:: ceil(len(ticks) / 7)])


def _is_whole(tick: float, decimals: int, ticks: tuple[float, ...]) -> bool:
    """Return whether all ``ticks`` are told by so many decimals: a step of 2.5 needs one more than one of 2."""
    return all(abs(each * 10**decimals - round(each * 10**decimals)) < 1e-6 for each in ticks)
