"""The model card of an export: what it is, what it was made from, and how it was checked. README.md, as hubs show it."""

from qlite import __version__
from qlite.errors import printable


def merged_card(name: str, base: str, facts: dict[str, str], audit: list[str], recipe: str) -> str:
    """Return the Markdown text. ``facts``: what is told, by its name; ``audit``: lines of its own section; ``recipe``: TOML."""
    head = ["---", "library_name: transformers", "tags: [qlite, lora]"]
    if base.count("/") == 1 and not base.startswith((".", "/", "~")):  # a hub id, which a hub makes a link of
        head.append(f"base_model: {printable(base)}")
    table = ["| | |", "|---|---|", *(f"| {_plain(key)} | {_plain(value)} |" for key, value in facts.items())]
    toml = ["```toml", printable(recipe).rstrip().replace("```", "'''"), "```"]
    lines = [*head, "---", "", f"# {_plain(name)}", "", *table]
    lines += ["", "## How the merge was checked", "", *audit, "", "## How it was trained", "", *toml]
    return "\n".join([*lines, "", f"Written by qlite {__version__}.", ""])


def _plain(text: str) -> str:
    """Return a stranger's text so that it makes no Markdown and no HTML of its own."""
    text = printable(text).replace("\n", " ").replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{c}" if c in "\\`*_[]|#" else c for c in text)
