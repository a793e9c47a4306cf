"""Ollama's Modelfile for a GGUF file: where the weights are, when an answer ends, what the run's system message was.

Source: Ollama, docs/modelfile.md. Its templates are Go's, not Jinja: only those of qlite's that say the same in Go are written.
"""

import json
from collections.abc import Sequence

# Go's, by the name of the built-in Jinja template that says the same; BOS and EOS stand for the tokens' texts.
GO_TEMPLATES = {
    "chatml": ("BOS{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"),
    "plain": 'BOS{{- range .Messages }}{{ .Content }}{{ if eq .Role "assistant" }}EOS{{ end }}\n{{ end }}',
}
QUOTES = '"""'
NO_TEMPLATE = """\
# No TEMPLATE: the run's chat template is in the GGUF file (tokenizer.chat_template), as Jinja, and llama.cpp uses it as it is. Ollama
# takes a Go template of its own for the templates that it recognises; for another, write one here."""


def modelfile(source: Sequence[str], template: str | None, stops: Sequence[str], system: str | None) -> str:
    """Return the Modelfile.

    ``source``: its first lines, FROM and perhaps ADAPTER; ``template``: in Go, or None; ``stops``: texts of the tokens that end an answer.
    """
    lines = [*source, f"TEMPLATE {QUOTES}{template}{QUOTES}" if template else NO_TEMPLATE]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    if system and QUOTES in system:
        lines.append("# The run's system message holds three quotes in a row, which a Modelfile cannot.")
    elif system:
        lines.append(f"SYSTEM {QUOTES}{system}{QUOTES}")
    return "\n".join(lines) + "\n"


def go_template(name: str | None, bos: str, eos: str) -> str | None:
    """Return the built-in template ``name`` in Go's words, or None where Go cannot say it (Alpaca's looks into the message).

    ``bos``: the text of the token that begins a conversation, empty where the tokenizer puts it there itself.
    """
    return GO_TEMPLATES[name].replace("BOS", bos).replace("EOS", eos) if name in GO_TEMPLATES else None
