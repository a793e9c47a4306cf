"""Chat templates: the tokenizer's own, a built-in one for base models that bring none, or a Jinja file of the user's."""

import re
from pathlib import Path

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from qlite.data.sandbox import Renderer
from qlite.errors import DataError
from qlite.given import read_given
from qlite.units import MIB

TEMPLATES: dict[str, str] = {
    # Taori et al. 2023: the two prompts, word for word, that the original Alpaca run was trained with.
    "alpaca": (
        "{{ bos_token or '' }}{% for m in messages %}"
        "{% if m.role == 'assistant' %}{{ m.content }}{{ eos_token }}\n\n"
        "{% elif m.role == 'system' %}{{ m.content }}\n\n"
        "{% elif m.role == 'tool' %}{{ raise_exception('it has no place for the results of tools') }}"
        "{% else %}Below is an instruction that describes a task"
        "{% if '### Input:' in m.content %}, paired with an input that provides further context{% endif %}. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{{ m.content }}\n\n### Response:\n{% endif %}{% endfor %}"
    ),
    "chatml": (
        "{{ bos_token or '' }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "plain": (
        "{{ bos_token or '' }}{% for m in messages %}"
        "{% if m.role == 'tool' %}{{ raise_exception('it has no place for the results of tools') }}{% endif %}"
        "{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"  # a bare break behind %} is trimmed
    ),
}
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
SUFFIXES = (".jinja", ".jinja2", ".j2")
MOST_TEMPLATE_BYTES = 4 * MIB
"""Of a template's file: as many as the characters that the sandbox reads can take."""
# Llama 3's own date where a template's program has no clock. Any will do, if training and asking agree on it.
FROZEN_DATE = {"d": "26", "m": "07", "b": "Jul", "B": "July", "Y": "2024", "y": "24", "A": "Friday", "a": "Fri", "H": "12", "M": "00"}


def is_template_name(name: str) -> bool:
    """Return whether ``name`` can be a recipe's data.template: "auto", a built-in's name or a Jinja file's path."""
    return name == "auto" or name in TEMPLATES or name.endswith(SUFFIXES)


def find_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the Jinja text of ``name``: "auto" (the tokenizer's own, None if it has none), a built-in's name or a file's path.

    Raises:
        DataError: the file cannot be read, or the built-in needs tokens that the tokenizer does not have.
    """
    if name == "auto":
        own = tokenizer.chat_template
        own = own.get("default") if isinstance(own, dict) else own
        if not isinstance(own, str | None):
            raise DataError(f"base.model: its tokenizer's chat template is no text but {str(own)[:40]}; give data.template")
        return own or None
    if name in TEMPLATES:
        missing = [token for token in CHATML_TOKENS if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id)]
        if name == "chatml" and missing:
            raise DataError(
                'data.template = "chatml": this tokenizer has no token <|im_end|>, so the model could not learn to stop at it; '
                'choose "plain" or "alpaca"'
            )
        return TEMPLATES[name]
    try:
        text = read_given(name, MOST_TEMPLATE_BYTES).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise DataError(f'data.template: cannot read "{name}" ({error.strerror}); the folder looked in is {Path.cwd()}') from error
    except UnicodeDecodeError as error:
        raise DataError(f'data.template: "{name}" byte {error.start}: not UTF-8; save it as UTF-8') from error
    _require_jinja(text, name)
    if "messages" not in text:
        raise DataError(f'data.template: "{name}" never reads "messages", so it is no chat template')
    return text


def _require_jinja(text: str, name: str) -> None:
    """Raise DataError, with the line, if ``text`` is no Jinja template."""
    try:
        Renderer(text)
    except TemplateSyntaxError as error:
        raise DataError(f'data.template: "{name}" line {error.lineno}: not Jinja ({error.message})') from error
    except (TemplateError, RecursionError) as error:
        raise DataError(f'data.template: "{name}": {error}') from error


def freeze_date(template: str) -> str:
    """Return ``template`` with the calls that write today's date replaced by one date.

    A prompt with the date of training in it would never be asked again.
    """
    # Of at most 200 characters: what is never closed would be looked for to the end of the line, from every place it may begin.
    return re.sub(r"strftime_now\(\s{0,20}(['\"])(.{0,200}?)\1\s{0,20}\)", lambda found: f"{found[1]}{_date(found[2])}{found[1]}", template)


def _date(format: str) -> str:
    return re.sub(r"%-?([a-zA-Z])", lambda found: FROZEN_DATE.get(found[1], ""), format)
