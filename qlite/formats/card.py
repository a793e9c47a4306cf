"""The model card of an export: what it is, what it was made from, and how it was checked. README.md, as hubs show it.

Source of the words in its head: huggingface.co/docs/hub/model-cards, "Specifying a base model" and "Specifying a library".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qlite import __version__
from qlite.errors import printable


@dataclass(frozen=True)
class Kind:
    """What sort of thing an export is, in a hub's words."""

    relation: str
    """To the base model. A GGUF file of merged weights is "finetune", too: "quantized" would call it the base's own weights."""
    library: str | None
    """Which loads it; None: a hub knows GGUF files by themselves."""
    tags: tuple[str, ...] = ()


MERGED, ADAPTER = Kind("finetune", "transformers"), Kind("adapter", "peft")
GGUF, GGUF_ADAPTER = Kind("finetune", None, ("gguf",)), Kind("adapter", None, ("gguf",))


def model_card(kind: Kind, name: str, base: str, facts: Mapping[str, str], sections: Mapping[str, Sequence[str]], recipe: str) -> str:
    """Return the Markdown text. ``facts``: what is told, by its name; ``sections``: lines by their heading; ``recipe``: TOML."""
    head = ["---", *([f"library_name: {kind.library}"] if kind.library else []), f"tags: [{', '.join(('qlite', *kind.tags))}]"]
    if base.count("/") == 1 and not base.startswith((".", "/", "~")):  # a hub id, which a hub makes a link of
        head += [f"base_model: {printable(base)}", f"base_model_relation: {kind.relation}"]
    table = ["| | |", "|---|---|", *(f"| {_plain(key)} | {_plain(value)} |" for key, value in facts.items())]
    toml = ["```toml", printable(recipe).rstrip().replace("```", "'''"), "```"]
    lines = [*head, "---", "", f"# {_plain(name)}", "", *table]
    for heading, texts in sections.items():
        lines += ["", f"## {heading}", "", *texts]
    return "\n".join([*lines, "", "## How it was trained", "", *toml, "", f"Written by qlite {__version__}.", ""])


def _plain(text: str) -> str:
    """Return a stranger's text so that it makes no Markdown and no HTML of its own."""
    text = printable(text).replace("\n", " ").replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{c}" if c in "\\`*_[]|#" else c for c in text)
