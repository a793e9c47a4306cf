"""A chat template in Go's words, which Ollama wants, found by watching what the Jinja one writes around messages.

Jinja cannot be translated, but most chat templates only write a fixed text before and behind each message, by its role, and one at the
beginning. Those texts are read off a few conversations, and hold if longer ones and messages of many kinds are written the same. A template
that does more (Alpaca's looks into the message, Mistral's puts the system message into the last turn) has no Go template here.

Source of Go's side: pkg.go.dev/text/template, "Actions".
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from qlite.errors import DataError

Messages = list[dict[str, str]]
Write = Callable[[Messages, bool], str]
"""A conversation, and whether an answer is wanted behind it -> its text; raises DataError where the template refuses it."""
MARK = "Qz{}zQ"
"""A message's content: its place."""
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
TALK, TOLD = (USER, ASSISTANT, USER, ASSISTANT, USER), (SYSTEM, USER, ASSISTANT, USER, ASSISTANT, USER)
MOST_WORDS = 300
"""Of a template's own, tried as contents."""
TRIMS = "the run's template leaves out the white space around a message, and this one does not"
LOOKS = "the run's template changes what stands in earlier answers (reasoning, for example), and this one does not"


@dataclass(frozen=True)
class GoTemplate:
    """The template, and where it writes otherwise than the run's, in words."""

    text: str
    differences: tuple[str, ...]


@dataclass(frozen=True)
class Texts:
    """What stands around messages."""

    start: str
    """At the beginning of a conversation that has no system message."""
    before: dict[str, str]
    """By role; a role that the template refuses is missing."""
    behind: dict[str, str]
    end: str
    """Behind all, where an answer is wanted."""
    bos: str
    """What a system message that begins a conversation has before it, and another has not."""

    def written(self, messages: Messages) -> str:
        """Return the text that these make of ``messages``, an answer wanted."""
        begin = self.bos if messages[0]["role"] == SYSTEM and SYSTEM in self.before else self.start
        return begin + "".join(self.before[m["role"]] + m["content"] + self.behind[m["role"]] for m in messages) + self.end

    def in_go(self) -> str:
        """Return the Go template that writes them."""
        begin = f"{{{{ if eq $i 0 }}}}{_literal(self.start)}{{{{ end }}}}" if self.start else ""
        if SYSTEM in self.before and self.start != self.bos:
            told = f'{{{{ if eq .Role "system" }}}}{_literal(self.bos)}{{{{ else }}}}{_literal(self.start)}{{{{ end }}}}'
            begin = f"{{{{ if eq $i 0 }}}}{told}{{{{ end }}}}"
        turns = [
            f'eq .Role "{role}" }}}}{_literal(self.before[role])}{{{{ .Content }}}}{_literal(self.behind[role])}' for role in self.before
        ]
        chosen = f"{{{{ if {'{{ else if '.join(turns)}{{{{ end }}}}"
        return f"{{{{ range $i, $_ := .Messages }}}}{begin}{chosen}{{{{ end }}}}{_literal(self.end)}"


def go_template(write: Write, source: str, bos: str, adds_bos: bool) -> GoTemplate | None:
    """Return the chat template that ``write`` writes with in Go's words, or None where these texts cannot say it.

    ``source``: its Jinja; ``bos``: the text of the token that texts begin with; ``adds_bos``: the tokenizer puts it there itself.
    """
    found = _texts(write, bos)
    if found is None:
        return None
    talks = [TALK, TOLD] if SYSTEM in found.before else [TALK]
    if not all(_is_written(write, found, _marked(roles)) for roles in talks):
        return None
    if not all(_is_written(write, found, talk) for talk in _tried(source, talks, (SYSTEM, USER))):
        return None
    differences = []
    if not all(_is_written(write, found, _with(talk, place, "\n x \n")) for talk in talks for place in range(len(talk))):
        differences.append(TRIMS)
    if not all(_is_written(write, found, talk) for talk in _tried(source, talks, (ASSISTANT,))):
        differences.append(LOOKS)
    if adds_bos:
        found = replace(found, start=found.start.removeprefix(bos), bos=found.bos.removeprefix(bos))
    return GoTemplate(found.in_go(), tuple(differences))


def _texts(write: Write, bos: str) -> Texts | None:
    """Return the texts around messages; None where one is missing, written twice, or in another place."""
    user, talk = _around(write, (USER,), False), _around(write, (USER, ASSISTANT), False)
    asked, longer = _around(write, (USER,), True), _around(write, (USER, ASSISTANT, USER), True)
    if user is None or talk is None or asked is None or longer is None:
        return None
    behind_user, behind_answer = user[-1], talk[-1]
    before_answer, before_user = _less(longer[1], behind_user), _less(longer[2], behind_answer)
    end = _less(asked[-1], behind_user)
    if before_answer is None or before_user is None or end is None or not asked[0].endswith(before_user):
        return None
    start = asked[0].removesuffix(before_user)
    before, behind = {USER: before_user, ASSISTANT: before_answer}, {USER: behind_user, ASSISTANT: behind_answer}
    if _text(write, _marked((SYSTEM, USER)), True) is None:
        return Texts(start, before, behind, end, "")
    told = _around(write, (SYSTEM, USER), True)
    if told is None or not told[1].endswith(before_user):
        return None
    # What all conversations begin with is no part of a system message.
    both = next(each for each in (start, bos, "") if start.startswith(each) and told[0].startswith(each))
    before[SYSTEM], behind[SYSTEM] = told[0].removeprefix(both), told[1].removesuffix(before_user)
    return Texts(start, before, behind, end, both)


def _less(text: str, beginning: str) -> str | None:
    return text.removeprefix(beginning) if text.startswith(beginning) else None


def _is_written(write: Write, found: Texts, messages: Messages) -> bool:
    return _text(write, messages, True) == found.written(messages)


def _tried(source: str, talks: Sequence[Sequence[str]], roles: Sequence[str]) -> Iterator[Messages]:
    """Yield conversations with what a template may look for in a message of ``roles``: the words that it has in quotes, and signs."""
    words = dict.fromkeys(a or b for a, b in re.findall(r"'([^'\n]+)'|\"([^\"\n]+)\"", source))
    contents = [f"{word} x {word}".strip() for word in list(words)[:MOST_WORDS] if word.strip()] + [
        "a\nb\n\nc",
        "<b> & 'c' \"d\" {{ e }} {% f %}",
    ]
    for talk in talks:
        for place, role in enumerate(talk):
            if role in roles:
                yield from (_with(talk, place, content) for content in contents)


def _with(roles: Sequence[str], place: int, content: str) -> Messages:
    messages = _marked(roles)
    messages[place]["content"] = content
    return messages


def _marked(roles: Sequence[str]) -> Messages:
    return [{"role": role, "content": MARK.format(place)} for place, role in enumerate(roles)]


def _text(write: Write, messages: Messages, ask: bool) -> str | None:
    try:
        return write(messages, ask)
    except DataError:
        return None


def _around(write: Write, roles: Sequence[str], ask: bool) -> list[str] | None:
    """Return the texts around messages of ``roles``; None where a message is missing, written twice or elsewhere."""
    parts = re.split(MARK.format(r"(\d+)"), _text(write, _marked(roles), ask) or "")
    return parts[::2] if parts[1::2] == [str(place) for place in range(len(roles))] else None


def _literal(text: str) -> str:
    """Return ``text`` as Go's templates write it down."""
    return re.sub(r"\{{2,}|\{$", lambda braces: f'{{{{ "{braces[0]}" }}}}', text)
