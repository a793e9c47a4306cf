"""From the schemas that data sets come in to one conversation: a list of {"role", "content"} messages."""

from collections.abc import Callable

from qlite.data.rows import Row
from qlite.errors import DataError

Messages = list[dict[str, str]]
# Alpaca's own heading; its template chooses its opening sentence by it.
INPUT_HEADING = "### Input:"


def _alpaca(fields: dict) -> Messages:
    """Taori et al. 2023, Stanford Alpaca: instruction, optional input, output."""
    extra = fields.get("input") or ""
    prompt = f"{fields['instruction']}\n\n{INPUT_HEADING}\n{extra}" if extra.strip() else fields["instruction"]
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": fields["output"]}]


def _prompt(fields: dict) -> Messages:
    return [{"role": "user", "content": fields["prompt"]}, {"role": "assistant", "content": fields["completion"]}]


def _messages(fields: dict) -> Messages:
    return [{"role": message["role"], "content": message["content"]} for message in fields["messages"]]


def _text(fields: dict) -> Messages:
    """Raw text: one message of no speaker, encoded as it is and trained as a whole."""
    return [{"role": "text", "content": fields["text"]}]


# Name in the recipe -> (fields a row must have, how to read it); the first whose fields are all there is it.
FORMATS: dict[str, tuple[tuple[str, ...], Callable[[dict], Messages]]] = {
    "messages": (("messages",), _messages),
    "prompt": (("prompt", "completion"), _prompt),
    "alpaca": (("instruction", "output"), _alpaca),
    "text": (("text",), _text),
}


def detect_format(row: Row) -> str:
    """Return the name of the format that ``row`` is in.

    Raises:
        DataError: its fields are those of no known format.
    """
    for name, (needed, _) in FORMATS.items():
        if all(field in row.fields for field in needed):
            return name
    known = "; ".join(f"{name}: {', '.join(needed)}" for name, (needed, _) in FORMATS.items())
    raise DataError(f"{row.where}: fields {', '.join(map(repr, row.fields)) or '(none)'} fit no format. Known: {known}")


def to_messages(row: Row, format: str) -> Messages:
    """Return ``row`` as messages.

    Raises:
        DataError: a field is missing or not text, or no answer stands last.
    """
    needed, read = FORMATS[format]
    missing = [field for field in needed if field not in row.fields]
    if missing:
        raise DataError(f'{row.where}: no field "{missing[0]}", which format "{format}" needs')
    try:
        messages = read(row.fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f'{row.where}: not in format "{format}" ({type(error).__name__}: {error})') from error
    if not messages:
        raise DataError(f"{row.where}: a conversation without messages has no answer to learn")
    for message in messages:
        if not isinstance(message["content"], str) or not isinstance(message["role"], str):
            raise DataError(f"{row.where}: a {message['role']} turn is a {type(message['content']).__name__}, not text")
    if messages[-1]["role"] not in ("assistant", "text"):
        raise DataError(f"{row.where}: the last turn is of role {messages[-1]['role']!r}; there is no answer to learn")
    return messages
