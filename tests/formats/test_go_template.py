"""Chat templates in Go's words: what Ollama will write is what training wrote, or there is none."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlite.data.sandbox import Renderer
from qlite.data.template import TEMPLATES
from qlite.errors import DataError
from qlite.formats.go_template import LOOKS, TRIMS, GoTemplate, Write, go_template

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
# Written after what the families' own templates do, each with its way of beginning, ending and refusing.
FAMILIES = {
    "llama 3.1": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}{% set messages = messages[1:] %}"
        "{% else %}{% set system = '' %}{% endif %}<|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n{{ system }}"
        "<|eot_id|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "qwen 2.5": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}{% for m in messages %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "qwen 3": (
        "{% for m in messages %}{% set said = m.content.split('</think>')[-1] if m.role == 'assistant' else m.content %}"
        "<|im_start|>{{ m.role }}\n{{ said }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n"
        "{% endif %}"
    ),
    "single braces": "{% for m in messages %}{{ m.role }}: {{ '{' }}{{ m.content }}}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {{ '{' }}{% endif %}",
    "braces": "{% for m in messages %}{{ '{{' }}{{ m.role }}}} {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '{{assistant}} ' }}{% endif %}",
}
SAID = {"chatml": TEMPLATES["chatml"], "plain": TEMPLATES["plain"], **FAMILIES}
UNSAID = {
    "alpaca": TEMPLATES["alpaca"],  # looks for its own heading in the message
    "mistral": (  # the system message stands in the last turn
        "{{ bos_token }}{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST] "
        "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "a word of the system's": "{% for m in messages %}{{ m.role }}{% if 'json' in m.content %}!{% endif %}: {{ m.content }}{% endfor %}",
    "a first word": "{% for m in messages %}{{ m.role }}{% if m.content.startswith('/no') %}!{% endif %}: {{ m.content }}\n{% endfor %}",
    "line breaks": "{% for m in messages %}{{ m.role }}: {{ m.content | replace('\\n', ' ') }}\n{% endfor %}",
    "escaped": "{% for m in messages %}{{ m.role }}: {{ m.content | e }}\n{% endfor %}",
    "counted turns": "{% for m in messages %}{{ loop.index }} {{ m.role }}: {{ m.content }}\n{% endfor %}",
    "twice": "{% for m in messages %}{{ m.content }} {{ m.content }}{% endfor %}",
    "upper case": "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
}


def writer(source: str) -> Write:
    renderer = Renderer(source)

    def write(messages: list[dict[str, str]], ask: bool) -> str:
        try:
            return renderer.render(messages, None, ask, TOKENS)
        except Exception as error:
            raise DataError(str(error)) from error

    return write


def in_go(source: str, adds_bos: bool = False) -> GoTemplate | None:
    return go_template(writer(source), source, "<s>", adds_bos)


ACTION = re.compile(r"{{ (.*?) }}")


def run_go(template: str, messages: list[dict[str, str]]) -> str:
    """Return what Go makes of ``template``: of its actions those that are written are carried out here."""
    assert "{{{" not in template
    parts = ACTION.split(template)
    words = [("text", part) if place % 2 == 0 else ("action", part) for place, part in enumerate(parts)]
    assert words[:2] == [("text", ""), ("action", "range $i, $_ := .Messages")]
    said, last = "", max(place for place, word in enumerate(words) if word == ("action", "end"))
    for i, message in enumerate(messages):
        said += "".join(turn(iter(words[2:last]), {"eq $i 0": i == 0, "role": message["role"]}, message["content"]))
    return said + "".join(value if kind == "text" else json.loads(value) for kind, value in words[last + 1 :])


def turn(words: Iterator[tuple[str, str]], facts: dict, content: str, is_read: bool = True) -> Iterator[str]:
    """Yield what one message becomes, up to the end of a choice."""
    for kind, value in words:
        if kind == "action" and value.startswith("if "):
            yield from choice(words, value, facts, content, is_read)
        elif kind == "action" and value.startswith(("else", "end")):
            raise AssertionError(value)
        elif is_read:
            yield value if kind == "text" else content if value == ".Content" else json.loads(value)


def choice(words: Iterator[tuple[str, str]], first: str, facts: dict, content: str, is_read: bool) -> Iterator[str]:
    was_chosen, is_chosen = False, False
    condition = first
    while True:
        is_chosen = not was_chosen and (condition == "else" or holds(condition, facts))
        was_chosen = was_chosen or is_chosen
        for kind, value in words:
            if kind == "action" and value.startswith("if "):
                yield from choice(words, value, facts, content, is_read and is_chosen)
            elif kind == "action" and value.startswith(("else", "end")):
                condition = value
                break
            elif is_read and is_chosen:
                yield value if kind == "text" else content if value == ".Content" else json.loads(value)
        if condition == "end":
            return


def holds(condition: str, facts: dict) -> bool:
    words = condition.removeprefix("else ").removeprefix("if ")
    return facts[words] if words in facts else re.fullmatch(r'eq .Role "(\w+)"', words)[1] == facts["role"]


TALKS = [("user",), ("user", "assistant", "user"), ("system", "user"), ("system", "user", "assistant", "user", "assistant", "user")]
CONTENTS = ("{role} {i} says {{x}}", "two\nlines <b> & 'c' {{{{ d }}}}")


def talks(name: str) -> list[list[dict[str, str]]]:
    told = [
        [{"role": role, "content": content.format(role=role, i=i)} for i, role in enumerate(roles)]
        for roles in TALKS
        for content in CONTENTS
    ]
    return [talk for talk in told if name != "gemma" or talk[0]["role"] != "system"]


@pytest.mark.parametrize("name", SAID)
def test_what_go_writes_is_what_jinja_writes(name):
    template, write = in_go(SAID[name]).text, writer(SAID[name])
    for talk in talks(name):
        assert run_go(template, talk) == write(talk, True)


@pytest.mark.parametrize("name", ["llama 3.1", "gemma", "chatml"])
def test_a_beginning_that_the_tokenizer_puts_there_is_not_written_twice(name):
    template, write = in_go(SAID[name], adds_bos=True).text, writer(SAID[name])
    for talk in talks(name):
        assert "<s>" + run_go(template, talk) == write(talk, True)


def test_messages_in_other_orders_begin_and_end_as_all_do():
    """As Ollama may give them: a system message in the middle, or a conversation whose beginning was cut off."""
    orders = [("user", "system", "user"), ("assistant", "user"), ("user", "user"), ("system", "assistant", "user")]
    for name in ("chatml", "zephyr", "qwen 3"):
        template, write = in_go(SAID[name]).text, writer(SAID[name])
        for roles in orders:
            talk = [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]
            assert run_go(template, talk) == write(talk, True)


def test_a_system_message_that_the_template_refuses_leaves_nothing_behind():
    template, write = in_go(SAID["gemma"]).text, writer(SAID["gemma"])
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert run_go(template, talk) == write(talk[1:], True)


DIFFERS = {
    "llama 3.1": {TRIMS},
    "gemma": {TRIMS},
    "qwen 3": {LOOKS},
    **{name: set() for name in ("chatml", "plain", "qwen 2.5", "zephyr", "braces", "single braces")},
}


@pytest.mark.parametrize("name", SAID)
def test_where_it_differs_is_said(name):
    assert set(in_go(SAID[name]).differences) == DIFFERS[name]


@pytest.mark.parametrize("name", UNSAID)
def test_a_template_that_does_more_than_put_texts_around_messages_has_none(name):
    assert in_go(UNSAID[name]) is None


GO = """\
package main

import ("encoding/json"; "os"; "text/template")

type Message struct { Role, Content string }

func main() {
	var given struct { Template string; Messages []*Message }
	if err := json.NewDecoder(os.Stdin).Decode(&given); err != nil { panic(err) }
	t := template.Must(template.New("").Parse(given.Template))
	if err := t.Execute(os.Stdout, map[string]any{"Messages": given.Messages}); err != nil { panic(err) }
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="there is no Go compiler here")
def test_go_itself_writes_what_jinja_writes(tmp_path: Path):
    (tmp_path / "main.go").write_text(GO)
    program = tmp_path / "write"
    subprocess.run(
        ["go", "build", "-o", program, tmp_path / "main.go"], check=True, env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    )
    for name, source in SAID.items():
        for talk in talks(name):
            said = {"Template": in_go(source).text, "Messages": [{"Role": m["role"], "Content": m["content"]} for m in talk]}
            out = subprocess.run([program], input=json.dumps(said), capture_output=True, text=True, check=True).stdout
            assert out == writer(source)(talk, True), name
