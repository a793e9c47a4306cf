"""What a function returns to Python shows itself: in a notebook in colour, anywhere else as text.

A notebook asks for ``_repr_mimebundle_`` (IPython, "Rich display"); rich draws, in the same words as on a terminal.
"""

import io
import re

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

WIDTH, HEIGHT = 100, 24
"""Characters and lines of what a notebook shows: it has no width of its own, and scrolls what is wider than the window."""
# No colours of its own: a notebook has a light and a dark theme. The fonts are those that have box and braille characters.
PAGE = (
    '<pre style="white-space:pre;overflow-x:auto;line-height:normal;'
    "font-family:Menlo,'DejaVu Sans Mono',Consolas,'Courier New',monospace\">{code}</pre>"
)

# Arrows, marks and braille: few fonts of one width have them all, and those that the browser takes instead are of another.
FOREIGN = re.compile("[\u2190-\u21ff\u25a0-\u25ff\u2700-\u27bf\u2800-\u28ff]")
CELL = '<span style="display:inline-block;width:1ch;line-height:1">{}</span>'


class Shown:
    """Base of the results: a subclass says in ``__rich_console__`` what is to be seen of it."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        raise NotImplementedError

    def __str__(self) -> str:
        return as_text(self)

    def __repr__(self) -> str:
        return str(self)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return as_bundle(self)


def as_text(part: RenderableType) -> str:
    """Return ``part`` as it is drawn without colours; what is to be copied is not cut."""
    console = Console(file=io.StringIO(), width=WIDTH, height=HEIGHT, force_jupyter=False, color_system=None, markup=False, highlight=False)
    console.print(part, crop=False)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def as_bundle(part: RenderableType) -> dict[str, str]:
    """Return ``part`` by MIME type, as a notebook takes it."""
    size = {"width": WIDTH, "height": HEIGHT}
    console = Console(file=io.StringIO(), record=True, force_terminal=True, force_jupyter=False, markup=False, highlight=False, **size)
    console.print(part, crop=False)
    page = console.export_html(inline_styles=True, code_format=PAGE)
    return {"text/plain": as_text(part), "text/html": FOREIGN.sub(lambda found: CELL.format(found[0]), page)}
