"""A whole page: one file that asks for nothing, whose only style and script are ours, named by their hashes in its policy."""

import base64
import hashlib
from pathlib import Path

from qlite import __version__
from qlite.reporting.markup import plain

MARK = '<meta name="generator" content="qlite report">'
"""Tells our pages from anybody else's."""
MARK_WITHIN = 400
"""Characters from a page's start, within which the mark stands."""


def document(title: str, header: str, sections: list[str]) -> str:
    """Return the page; ``title`` is a text, ``header`` and ``sections`` are HTML."""
    style, script = (_own(name) for name in ("page.css", "page.js"))
    # Not even a hole in the escaping could load or run anything: what has another hash is not used.
    policy = f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"
    body = "\n".join(part for part in sections if part)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{MARK}\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        f'<meta name="referrer" content="no-referrer">\n<title>{plain(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n'
        f"<main>\n{header}\n{body}\n<footer>Written by qlite {plain(__version__)}. "
        f"This file is whole: it loads nothing.</footer>\n</main>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def is_ours(path: Path) -> bool:
    """Return whether ``path`` is a page that ``document`` made."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return MARK in file.read(MARK_WITHIN)
    except OSError:
        return False


def _own(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
