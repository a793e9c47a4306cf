"""Ollama's Modelfile for a GGUF file: where the weights are, when an answer ends, what the run's system message was.

Source: Ollama, docs/modelfile.md. Its templates are Go's, not Jinja (formats/go_template.py).
"""

import json
from collections.abc import Sequence

from qlite.formats.go_template import GoTemplate

QUOTES = '"""'
NOT_IN_GO = """\
# No TEMPLATE: the run's chat template does more than to put texts around messages, so it was not put into Go's words. It is in the GGUF
# file (tokenizer.chat_template), as Jinja, and llama.cpp uses it as it is; Ollama takes one of its own for those that it recognises."""
RAW_TEXT = "# The run was trained on raw text, which is continued as it is."


def modelfile(source: Sequence[str], template: GoTemplate | None, stops: Sequence[str], system: str | None, is_raw: bool = False) -> str:
    """Return the Modelfile.

    ``source``: its first lines, FROM and perhaps ADAPTER; ``template``: the run's chat template, None where Go has no words for it;
    ``stops``: texts of the tokens that end an answer; ``is_raw``: the run has no chat template.
    """
    if is_raw:
        lines = [*source, RAW_TEXT, f"TEMPLATE {QUOTES}{{{{ .Prompt }}}}{QUOTES}"]
    elif template is None or QUOTES in template.text:
        lines = [*source, NOT_IN_GO]
    else:
        lines = [*source, *(f"# Beware: {each}." for each in template.differences), f"TEMPLATE {QUOTES}{template.text}{QUOTES}"]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    if system and QUOTES in system:
        lines.append("# The run's system message holds three quotes in a row, which a Modelfile cannot.")
    elif system:
        lines.append(f"SYSTEM {QUOTES}{system}{QUOTES}")
    return "\n".join(lines) + "\n"
