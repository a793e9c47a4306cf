"""Chat templates in Go's words: what Ollama will write is what training wrote, or there is none."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlite.data.sandbox import Renderer
from qlite.data.template import TEMPLATES
from qlite.errors import DataError
from qlite.formats.go_template import go_template

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
    "braces": "{% for m in messages %}{{ '{{' }}{{ m.role }}}} {{ m.content }}\n{% endfor %}{{ '{{assistant}} ' }}",
}
SAID = {"chatml": TEMPLATES["chatml"], "plain": TEMPLATES["plain"], **FAMILIES}
UNSAID = {
    "alpaca": TEMPLATES["alpaca"],  # looks for its own heading in the message
    "mistral": (  # the system message stands in the last turn
        "{{ bos_token }}{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST] "
        "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "counted turns": "{% for m in messages %}{{ loop.index }} {{ m.role }}: {{ m.content }}\n{% endfor %}",
    "twice": "{% for m in messages %}{{ m.content }} {{ m.content }}{% endfor %}",
    "upper case": "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
}


def writer(source: str):
    renderer = Renderer(source)

    def write(messages: list[dict[str, str]]) -> str:
        try:
            return renderer.render(messages, None, True, TOKENS)
        except Exception as error:
            raise DataError(str(error)) from error

    return write


ACTION = re.compile(r"{{ (.*?) }}")


def in_go(template: str, messages: list[dict[str, str]]) -> str:
    """Return what Go makes of ``template``: of its actions those that are written are carried out here."""
    parts = ACTION.split(template)
    words = [("text", part) if place % 2 == 0 else ("action", part) for place, part in enumerate(parts)]
    assert words[:2] == [("text", ""), ("action", "range $i, $_ := .Messages")]
    last = max(place for place, word in enumerate(words) if word == ("action", "end"))
    inside, after = words[2:last], words[last + 1 :]
    said = ""
    for i, message in enumerate(messages):
        said += "".join(turn(iter(inside), i, message, messages[0]["role"]))
    return said + "".join(value if kind == "text" else "{{" for kind, value in after)


def turn(words: Iterator[tuple[str, str]], i: int, message: dict[str, str], first: str) -> Iterator[str]:
    """Yield what one message becomes."""
    is_chosen, was_chosen = True, False
    holds = {
        'eq .Role "system"': message["role"] == "system",
        'eq .Role "assistant"': message["role"] == "assistant",
        'and (eq $i 1) (eq (index $.Messages 0).Role "system")': i == 1 and first == "system",
        "$i": i > 0,
    }
    for kind, value in words:
        if kind == "action" and value.startswith(("if ", "else")):
            condition = value.removeprefix("else").strip().removeprefix("if").strip()
            is_chosen = not was_chosen and (holds[condition] if condition else True)
            was_chosen = was_chosen or is_chosen
        elif kind == "action" and value == "end":
            is_chosen = True
        elif is_chosen:
            yield value if kind == "text" else message["content"] if value == ".Content" else json.loads(value)


TALKS = [("user",), ("user", "assistant", "user"), ("system", "user"), ("system", "user", "assistant", "user", "assistant", "user")]


def talks(name: str) -> list[list[dict[str, str]]]:
    told = [[{"role": role, "content": f"{role} {i}\nsays {{x}}"} for i, role in enumerate(roles)] for roles in TALKS]
    return [talk for talk in told if name != "gemma" or talk[0]["role"] != "system"]


@pytest.mark.parametrize("name", SAID)
def test_what_go_writes_is_what_jinja_writes(name):
    template, write = go_template(writer(SAID[name]), SAID[name], ""), writer(SAID[name])
    for talk in talks(name):
        assert in_go(template, talk) == write(talk)


@pytest.mark.parametrize("name", ["llama 3.1", "gemma", "chatml"])
def test_a_beginning_that_the_tokenizer_puts_there_is_not_written_twice(name):
    template, write = go_template(writer(SAID[name]), SAID[name], "<s>"), writer(SAID[name])
    for talk in talks(name):
        assert "<s>" + in_go(template, talk) == write(talk)


@pytest.mark.parametrize("name", UNSAID)
def test_a_template_that_does_more_than_put_texts_around_messages_has_none(name):
    assert go_template(writer(UNSAID[name]), UNSAID[name], "") is None


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
    subprocess.run(["go", "build", "-o", program, tmp_path / "main.go"], check=True, env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"})
    for name, source in SAID.items():
        write, template = writer(source), go_template(writer(source), source, "")
        for talk in talks(name):
            said = {"Template": template, "Messages": [{"Role": m["role"], "Content": m["content"]} for m in talk]}
            out = subprocess.run([program], input=json.dumps(said), capture_output=True, text=True, check=True).stdout
            assert out == write(talk), name
