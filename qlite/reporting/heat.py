"""A grid of numbers from 0 to 1 as a picture: the more, the darker. One path for each of a few shades, so that many of them stay small."""

from dataclasses import dataclass

from qlite.reporting.markup import plain

SHADES = 20


@dataclass(frozen=True)
class Heat:
    """One map: rows from top to bottom, columns from left to right."""

    title: str
    values: list[list[float]]
    rows: list[int]
    """What each row stands for."""
    columns: list[int]

    def draw(self, across: str, down: str, is_small: bool = False) -> str:
        """Return it as HTML; ``across`` and ``down`` say what its columns and rows count."""
        shades: dict[int, list[str]] = {}
        for y, row in enumerate(self.values):
            for x, value in enumerate(row):
                shades.setdefault(round(SHADES * min(1.0, max(0.0, value))), []).append(f"M{x} {y}h1v1h-1z")
        shades.pop(0, None)  # which is the paper's own colour
        drawn = "".join(f'<path d="{"".join(cells)}" fill-opacity="{shade / SHADES:g}"/>' for shade, cells in sorted(shades.items()))
        first, last = self.values[0][0], self.values[-1][-1]
        told = f"{self.title}: {first:.2f} at {self.rows[0]}, {self.columns[0]}; {last:.2f} at {self.rows[-1]}, {self.columns[-1]}"
        scale = f"{across} {self.columns[0]} to {self.columns[-1]}, {down} {self.rows[0]} to {self.rows[-1]}"
        return (
            f'<figure class="heat{" small" if is_small else ""}"><figcaption>{plain(self.title)}</figcaption>'
            f'<svg viewBox="0 0 {len(self.columns)} {len(self.rows)}" preserveAspectRatio="none" role="img" aria-label="{plain(told)}">'
            f"<title>{plain(told)}</title>{drawn}</svg><small>{plain(scale)}</small></figure>"
        )
