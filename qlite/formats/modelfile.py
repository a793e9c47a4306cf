"""Ollama's Modelfile for a GGUF file: where the weights are, when an answer ends, what the run's system message was.

Source: Ollama, docs/modelfile.md. Its templates are Go's, not Jinja (formats/go_template.py).
"""

import json
from collections.abc import Sequence

QUOTES = '"""'
NO_TEMPLATE = """\
# No TEMPLATE: the run's chat template does more than to put texts around messages, so it was not put into Go's words. It is in the GGUF
# file (tokenizer.chat_template), as Jinja, and llama.cpp uses it as it is; Ollama takes one of its own for those that it recognises."""


def modelfile(source: Sequence[str], template: str | None, stops: Sequence[str], system: str | None) -> str:
    """Return the Modelfile.

    ``source``: its first lines, FROM and perhaps ADAPTER; ``template``: in Go, or None; ``stops``: texts of the tokens that end an answer.
    """
    lines = [*source, f"TEMPLATE {QUOTES}{template}{QUOTES}" if template and QUOTES not in template else NO_TEMPLATE]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    if system and QUOTES in system:
        lines.append("# The run's system message holds three quotes in a row, which a Modelfile cannot.")
    elif system:
        lines.append(f"SYSTEM {QUOTES}{system}{QUOTES}")
    return "\n".join(lines) + "\n"
