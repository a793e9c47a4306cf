"""A chat template in Go's words, which Ollama wants, found by watching what the Jinja one writes around messages.

Jinja cannot be translated, but most chat templates only write fixed texts before, between and after messages, chosen by the roles that
meet. Those texts are read off a few conversations and hold if longer ones are written the same. A template that does more (Alpaca's looks
into the message, Mistral's puts the system message into the last turn) has no Go template here.   Go: pkg.go.dev/text/template.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from qlite.errors import DataError

Write = Callable[[list[dict[str, str]]], str]
"""Conversation -> its text, up to where the next answer begins; raises DataError where the template refuses it."""
MARK = "Qz{}zQ"
"""A message's content: its place."""
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
CHECKED = ((USER, ASSISTANT, USER, ASSISTANT, USER), (SYSTEM, USER, ASSISTANT, USER, ASSISTANT, USER))


@dataclass(frozen=True)
class Texts:
    """What stands around messages, by the roles that meet."""

    first: str
    """Before a user's message that begins the conversation."""
    answer: str
    """Between it and the answer."""
    further: str
    """Between an answer and the next user's message."""
    end: str
    """After the last user's message, up to the answer that is wanted."""
    system: str | None
    """Before the system message; None where the template refuses one."""
    after_system: str = ""
    """Between it and the user's."""

    def around(self, roles: Sequence[str]) -> list[str]:
        """Return the texts around messages of ``roles``, one more than these."""
        between = {(SYSTEM, USER): self.after_system, (USER, ASSISTANT): self.answer, (ASSISTANT, USER): self.further}
        begin = self.system if roles[0] == SYSTEM else self.first
        return [begin or "", *(between[pair] for pair in pairwise(roles)), self.end]

    def in_go(self) -> str:
        """Return the Go template that writes them."""
        cases = [f'{{{{ else if eq .Role "assistant" }}}}{_literal(self.answer)}{{{{ .Content }}}}']
        if self.after_system != self.further and self.system is not None:
            follows = '{{ else if and (eq $i 1) (eq (index $.Messages 0).Role "system") }}'
            cases.append(f"{follows}{_literal(self.after_system)}{{{{ .Content }}}}")
        cases.append(f"{{{{ else if $i }}}}{_literal(self.further)}{{{{ .Content }}}}")
        cases.append(f"{{{{ else }}}}{_literal(self.first)}{{{{ .Content }}}}")
        system = "" if self.system is None else f"{_literal(self.system)}{{{{ .Content }}}}"
        body = f'{{{{ if eq .Role "system" }}}}{system}{"".join(cases)}{{{{ end }}}}'
        return f"{{{{ range $i, $_ := .Messages }}}}{body}{{{{ end }}}}{_literal(self.end)}"


def go_template(write: Write, source: str, bos: str) -> str | None:
    """Return the chat template that ``write`` writes with in Go's words, or None where these texts cannot say it.

    ``source``: its Jinja; ``bos``: the text that the tokenizer will put before all, empty if it puts none.
    """
    plain, talk = _around(write, (USER,)), _around(write, (USER, ASSISTANT, USER))
    if plain is None or talk is None or (plain[0], plain[-1]) != (talk[0], talk[-1]):
        return None
    first, answer, further, end = talk
    found = Texts(first.removeprefix(bos), answer, further, end, None)
    if _text(write, (SYSTEM, USER)) is not None:
        told = _around(write, (SYSTEM, USER))
        if told is None:
            return None
        found = replace(found, system=told[0].removeprefix(bos), after_system=told[1])
    for roles in CHECKED if found.system is not None else CHECKED[:1]:
        around = _around(write, roles)
        if around is None or [around[0].removeprefix(bos), *around[1:]] != found.around(roles):
            return None
    return found.in_go() if _looks_into_nothing(write, source, first, end) else None


def _looks_into_nothing(write: Write, source: str, first: str, end: str) -> bool:
    """Return whether a message with all the words that the template's ``source`` has in quotes is written as any other."""
    words = " ".join(a or b for a, b in re.findall(r"'([^'\n]+)'|\"([^\"\n]+)\"", source))
    content = f"{MARK.format(0)} {words} {MARK.format(0)}"
    try:
        return write([{"role": USER, "content": content}]) == first + content + end
    except DataError:
        return False


def _text(write: Write, roles: Sequence[str]) -> str | None:
    try:
        return write([{"role": role, "content": MARK.format(place)} for place, role in enumerate(roles)])
    except DataError:
        return None


def _around(write: Write, roles: Sequence[str]) -> list[str] | None:
    """Return the texts around messages of ``roles``; None where one is missing, written twice or elsewhere."""
    parts = re.split(MARK.format(r"(\d+)"), _text(write, roles) or "")
    return parts[::2] if parts[1::2] == [str(place) for place in range(len(roles))] else None


def _literal(text: str) -> str:
    """Return ``text`` as Go's templates write it down."""
    return text.replace("{{", '{{ "{{" }}')
