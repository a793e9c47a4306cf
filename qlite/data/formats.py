"""From the schemas that data sets come in to one conversation: messages of a role each, as chat templates take them."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from qlite.data.rows import Row
from qlite.errors import DataError

Messages = list[dict]
# Alpaca's own heading; its template chooses its opening sentence by it.
INPUT_HEADING = "### Input:"
# What data sets call the four speakers, in small letters.
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "bing", "bard", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response", "ipython"), "tool"),
}
ROLE_NAMES = ("system", "user", "assistant", "tool")
# What a template may read of a message beside its role and content.
EXTRAS = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")


@dataclass(frozen=True)
class Conversation:
    """What one row says. Raw text is one message of role "text"."""

    messages: Messages
    tools: list[dict] | None = None
    """Tools that the assistant may call, as JSON schemas."""
    untrained: frozenset[int] = frozenset()
    """Messages of the assistant that are not to be learnt (OpenAI's "weight": 0)."""
    choices: tuple[str, ...] = ()
    """Multiple choice: the answers to choose from; the last message holds the right one."""
    right: int = -1
    """Index of the right choice."""
    goes_on: bool = False
    """Raw text that is not at its end: its next piece is another conversation."""

    @property
    def is_text(self) -> bool:
        return self.messages[0]["role"] == "text"

    @property
    def answers(self) -> list[int]:
        """Where the assistant speaks."""
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]

    def with_system(self, system: str) -> "Conversation":
        """Return the same with ``system`` in front, unless it is empty or the conversation has a system message or is raw text."""
        if not system or self.is_text or self.messages[0]["role"] == "system":
            return self
        untrained = frozenset(index + 1 for index in self.untrained)
        return replace(self, messages=[{"role": "system", "content": system}, *self.messages], untrained=untrained)


@dataclass(frozen=True)
class Reading:
    """How the rows of a source are read: the format's name, and what its fields and roles are called there.

    ``columns``: our field -> theirs: a column, a path into it ("instances.0.output"), or a text with columns in braces
    ("{title}: {body}"). ``roles``: our role -> theirs.
    """

    format: str
    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    found: set[tuple[str, str]] = field(default_factory=set)
    """The entries of both that a row has had."""

    def to_conversation(self, row: Row) -> Conversation:
        """Return ``row`` as a conversation that ends with an answer of the assistant, or raw text.

        Raises:
            DataError: a field is missing or not of the format, or nobody answers; with the row's file and line.
        """
        needed, _, read = FORMATS[self.format]
        fields = _Fields(row, self)
        missing = [name for name in needed if fields.get(name) is None]
        if missing:
            raise DataError(
                f'{row.where}: no field "{self.columns.get(missing[0], missing[0])}", which format "{self.format}" needs; '
                f"it has {_listed(row.fields)}"
            )
        conversation = read(fields)
        if conversation.is_text:
            return replace(conversation, goes_on=row.goes_on)
        if not conversation.answers:
            raise DataError(f"{row.where}: the assistant says nothing in it, so there is no answer to learn; remove the row")
        # What follows the last answer is not learnt and would not be asked.
        return replace(conversation, messages=conversation.messages[: conversation.answers[-1] + 1])


def unread_mapping(reading: Reading) -> dict[tuple[str, str], str]:
    """Return the entries of ``reading``'s mappings that came to nothing, each with why."""
    needed, optional, _ = FORMATS[reading.format]
    known = [*needed, *optional]
    columns = {
        (ours, theirs): "no row has it" if ours in known else f'format "{reading.format}" reads no field "{ours}", but {", ".join(known)}'
        for ours, theirs in reading.columns.items()
    }
    roles = dict.fromkeys(reading.roles.items(), "nobody in the data is called so")
    return {entry: why for entry, why in {**columns, **roles}.items() if entry not in reading.found}


def detect_format(rows: Iterable[Row], columns: Mapping[str, str]) -> str:
    """Return the name of the format that the first of ``rows`` is in, with fields renamed by ``columns``.

    Raises:
        DataError: its fields are those of no known format, or another row is in another format.
    """
    first, *others = rows
    format = _format_of(first, columns)
    if format is None:
        known = "; ".join(f"{name}: {', '.join(needed)}" for name, (needed, _, _) in FORMATS.items())
        raise DataError(
            f"{first.where}: fields {_listed(first.fields)} fit no format. Known: {known}. "
            'Say which field is which, for example data.columns = { prompt = "question", completion = "reply" }'
        )
    for row in others:
        # One that fits none lacks a field, which reading it will say.
        if (other := _format_of(row, columns)) not in (format, None):
            raise DataError(
                f'{row.where}: {_listed(row.fields)} is in format "{other}", and {first.where} is in format "{format}"; '
                "split the file, or give data.format"
            )
    return format


def _format_of(row: Row, columns: Mapping[str, str]) -> str | None:
    present = {name for name, value in row.fields.items() if value is not None} | columns.keys()
    return next((name for name, (needed, _, _) in FORMATS.items() if present.issuperset(needed)), None)


# One reader for each format


class _Fields:
    """A row's fields under our names, checked as they are read."""

    def __init__(self, row: Row, reading: Reading):
        self.row, self.columns, self.found = row, reading.columns, reading.found
        self.roles = {theirs: ours for ours, theirs in reading.roles.items()}

    def get(self, name: str) -> object:
        """Return a field's value, None where the row has none."""
        column = self.columns.get(name, name)
        if column not in self.row.fields and (inner := re.findall(r"\{([^{}]+)\}", column)):
            missing = [part for part in inner if _find(self.row.fields, part) is None]
            if 0 < len(missing) < len(inner):
                raise self.error(f'data.columns.{name} = "{column}": the row has no "{missing[0]}"')
        value = _find(self.row.fields, column)
        if value is not None and name in self.columns:
            self.found.add((name, self.columns[name]))
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self.get(name)
        return default if value is None and default is not None else self.checked(value, f'field "{name}"')

    def checked(self, value: object, what: str) -> str:
        """Return ``value`` if it is a text that can be encoded; text parts of OpenAI's content lists are joined."""
        if isinstance(value, list) and value and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
            value = "".join(str(part.get("text", "")) for part in value)
        if not isinstance(value, str):
            hint = "; only text can be trained on" if isinstance(value, list) else ""
            raise self.error(f"{what} is {_kind(value)}, not text{hint}")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise self.error(f"{what} holds half a surrogate pair (\\u{ord(value[error.start]):04x}), which is no text") from error
        return value

    def dialogue(self, name: str, role: str, content: str) -> tuple[Messages, frozenset[int]]:
        """Return the messages in field ``name``, whose keys for speaker and text are ``role`` and ``content`` by default."""
        turns = _parsed(self.get(name))  # a CSV file has them as JSON text
        if not isinstance(turns, list) or not turns:
            raise self.error(f'field "{name}" is {_kind(turns)}; it should be a list of messages')
        role, content = self.columns.get("role", role), self.columns.get("content", content)
        self.found |= {(ours, theirs) for ours, theirs in self.columns.items() if theirs in (role, content)}
        messages, untrained = [], set()
        for number, turn in enumerate(turns, start=1):
            if not isinstance(turn, dict) or role not in turn or not (content in turn or turn.get("tool_calls")):
                has = _listed(turn) if isinstance(turn, dict) else _kind(turn)
                hint = 'say how they are called: data.columns = { role = "…", content = "…" }'
                raise self.error(f'message {number} should have "{role}" and "{content}", and has {has}; {hint}')
            if turn.get("weight") == 0 or turn.get("train") is False:
                untrained.add(len(messages))
            messages.append(self._message(turn, turn[role], turn.get(content), number))
        return messages, frozenset(untrained)

    def _message(self, turn: dict, role: object, content: object, number: int) -> dict:
        ours = self.roles.get(str(role)) or ROLES.get(str(role).lower())
        self.found.add((str(ours), str(role)))
        if ours is None:
            raise self.error(
                f'message {number} is of role {json.dumps(role)[:60]}, which is unknown; say who it is: data.roles = {{ user = "…" }}'
            )
        extras = {key: turn[key] for key in EXTRAS if turn.get(key) not in (None, [])}
        if not isinstance(extras.get("tool_calls", []), list):
            raise self.error(f"tool_calls of message {number} is {_kind(extras['tool_calls'])}; it should be a list")
        if "tool_calls" in extras:
            extras["tool_calls"] = [self._call(call, number) for call in extras["tool_calls"]]
        for key in ("reasoning_content", "thinking"):
            if key in extras:
                self.checked(extras[key], f"{key} of message {number}")
        text = "" if content is None and "tool_calls" in extras else self.checked(content, f"message {number} ({ours})")
        return {"role": ours, "content": text, **extras}

    def _call(self, call: object, number: int) -> dict:
        """Return one tool call with its arguments as an object: OpenAI has them as JSON text, and templates write them out themselves."""
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            wanted = '{"function": {"name": "…", "arguments": {…}}}'
            raise self.error(f"a tool call of message {number} is {_kind(call)} and should be like {wanted}")
        parsed = {**function, "arguments": _parsed(function.get("arguments"))}
        return {**call, "function": parsed} if "function" in call else parsed

    def tools(self) -> list[dict] | None:
        value = _parsed(self.get("tools"))
        if value in (None, "", []):
            return None
        if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
            raise self.error(f'field "tools" is {_kind(value)}; it should be a list of JSON schemas')
        return value

    def exchange(self, prompt: str, completion: str) -> Messages:
        system = self.text("system", "")
        first = [{"role": "system", "content": system}] if system else []
        return [*first, {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]

    def error(self, problem: str) -> DataError:
        return DataError(f"{self.row.where}: {problem}")


def _messages(fields: _Fields) -> Conversation:
    """OpenAI's chat format."""
    messages, untrained = fields.dialogue("messages", "role", "content")
    return Conversation(messages, fields.tools(), untrained)


def _sharegpt(fields: _Fields) -> Conversation:
    """ShareGPT: conversations of {"from", "value"}, the system message beside them or among them."""
    messages, untrained = fields.dialogue("conversations", "from", "value")
    return Conversation(messages, fields.tools(), untrained).with_system(fields.text("system", ""))


def _prompt(fields: _Fields) -> Conversation:
    """A prompt and its completion: two texts, or (TRL) two lists of messages of which only the second is learnt."""
    if not isinstance(fields.get("prompt"), list):
        return Conversation(fields.exchange(fields.text("prompt"), fields.text("completion")))
    asked, _ = fields.dialogue("prompt", "role", "content")
    answered, untrained = fields.dialogue("completion", "role", "content")
    skipped = {index for index, message in enumerate(asked) if message["role"] == "assistant"}
    return Conversation(asked + answered, fields.tools(), frozenset(skipped | {index + len(asked) for index in untrained}))


def _alpaca(fields: _Fields) -> Conversation:
    """Taori et al. 2023, Stanford Alpaca: instruction, optional input, output."""
    return Conversation(fields.exchange(_instruction(fields, "input"), fields.text("output")))


def _dolly(fields: _Fields) -> Conversation:
    """Conover et al. 2023, Databricks Dolly: instruction, optional context, response."""
    return Conversation(fields.exchange(_instruction(fields, "context"), fields.text("response")))


def _instruction(fields: _Fields, extra: str) -> str:
    instruction, more = fields.text("instruction"), fields.text(extra, "")
    return f"{instruction}\n\n{INPUT_HEADING}\n{more}" if more.strip() else instruction


def _choice(fields: _Fields) -> Conversation:
    """A question, its choices, and the right one: its index from 0, its letter from A, or its text."""
    choices, answer = fields.get("choices"), fields.get("answer")
    if isinstance(choices, dict):  # ARC has {"text": [...], "label": [...]}
        labels, choices = choices.get("label", ()), choices.get("text")
        answer = list(labels).index(answer) if answer in labels else answer
    if not isinstance(choices, list) or len(choices) < 2:
        raise fields.error(f'field "choices" is {_kind(choices)}; it should be a list of two texts or more')
    texts = tuple(fields.checked(choice, f"choice {number}") for number, choice in enumerate(choices, start=1))
    letters = [chr(ord("A") + index) for index in range(len(texts))]
    found = [index for index in range(len(texts)) if answer in (texts[index], letters[index], index) and not isinstance(answer, bool)]
    if not found:
        raise fields.error(f"answer {json.dumps(answer)} is none of the {len(texts)} choices, no letter and no index of one")
    return Conversation(fields.exchange(fields.text("question"), texts[found[0]]), choices=texts, right=found[0])


def _text(fields: _Fields) -> Conversation:
    """Raw text: one message of no speaker, encoded as it is and trained as a whole."""
    return Conversation([{"role": "text", "content": fields.text("text")}])


# Name in the recipe -> (fields a row must have, fields it may have, how to read it); the first whose fields are all there is it.
FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...], Callable[[_Fields], Conversation]]] = {
    "messages": (("messages",), ("role", "content", "tools"), _messages),
    "sharegpt": (("conversations",), ("role", "content", "system", "tools"), _sharegpt),
    "choice": (("question", "choices", "answer"), ("system",), _choice),
    "prompt": (("prompt", "completion"), ("system", "tools"), _prompt),
    "alpaca": (("instruction", "output"), ("input", "system"), _alpaca),
    "dolly": (("instruction", "response"), ("context", "system"), _dolly),
    "text": (("text",), (), _text),
}
FormatName = Literal["messages", "sharegpt", "choice", "prompt", "alpaca", "dolly", "text"]
FIELDS = sorted({name for needed, optional, _ in FORMATS.values() for name in (*needed, *optional)})


def _find(fields: dict, column: str) -> object:
    """Return what ``column`` names in ``fields`` (see ``Reading``), None where it is not there."""
    if column in fields:
        return fields[column]
    if "{" in column:
        parts = {name: _find(fields, name) for name in re.findall(r"\{([^{}]+)\}", column)}
        return None if None in parts.values() else re.sub(r"\{([^{}]+)\}", lambda found: str(parts[found[1]]), column)
    value: object = fields
    for step in column.split("."):
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def _parsed(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _listed(fields: dict) -> str:
    names = [repr(name)[:40] for name in fields]
    return ", ".join(names[:12]) + (", …" if len(names) > 12 else "") if names else "no fields"


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return "missing" if value is None else names.get(type(value), type(value).__name__)
