"""Chat templates of strangers: what they may do is what transformers lets them; what would take the machine is refused."""

import time
import tracemalloc

import pytest
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from qlite.data.sandbox import Renderer
from qlite.data.template import TEMPLATES
from tests.marks import slow

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 < 3 & 'x'?"},
    {"role": "assistant", "content": "yes", "reasoning_content": "it is", "tool_calls": None},
    {"role": "user", "content": "and é?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": [1, None, 2.5]}}}],
    },
    {"role": "tool", "content": "12"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "array"}}}}}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
# What the templates of Llama 3, Qwen 3, Mistral, Gemma, Phi and DeepSeek are written with.
WRITTEN = [
    "{{ bos_token }}{% for m in messages %}{{ loop.index0 }}/{{ loop.length }}{{ m['role'] }}{% if loop.last %}!{% endif %}{% endfor %}",
    (
        "{% set ns = namespace(n=0, last='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{% set ns.last = m.content %}{% endfor %}{{ ns.n }}{{ ns.last }}"
    ),
    (
        "{%- if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}"
        "{% for m in messages[::-1] %}{{ m.content | trim }}\n{% endfor %}"
    ),
    "{% for m in messages %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endfor %}",
    "{% for m in messages if m.role != 'tool' %}{{ '<' ~ m.role ~ '>' + m.content }}{% else %}none{% endfor %}",
    (
        "{{ tools | tojson }}{{ tools | tojson(indent=4) }}{% for t in tools %}"
        "{{ t.function.parameters.properties.keys() | list | join(', ') }}{% endfor %}"
    ),
    (
        "{% macro say(m, end='.') %}{{ m.role | upper }}: {{ m.content }}{{ end }}{% endmacro %}{% for m in messages %}"
        "{{ say(m, end=';') }}{% endfor %}"
    ),
    (
        "{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}"
        "{{ c.function.arguments | tojson }}{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}"
        "{% endfor %}{% break %}{% endif %}{% continue %}{% endfor %}"
    ),
    "{% for m in messages %}{% if m.thinking is defined %}{{ m.thinking }}|{{ m.reasoning_content }}{% endif %}{% endfor %}",
    (
        "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}"
        "{{ (messages | last).role }}{{ messages | length }}"
    ),
    (
        "{{ messages[1].content.split('3')[0].strip().replace('<', 'less') }}{{ '%s-%d' | format('a', 3) }}"
        "{{ '%05.1f' % 2.5 }}{{ 7 // 2 }}{{ 2 ** 5 }}{{ 5000 * 5000 }}{{ '-' * 8 }}"
    ),
    (
        "{{ dict(a=1) }}{{ {'b': [1, (2, 3)]}.b }}{% set x, y = 1, 2 %}"
        "{{ x + y }}{{ [1] + [2] }}{{ messages[0].get('name', 'none') }}{{ nothing }}{{ nothing is defined }}"
    ),
    (
        "{% for key in ['role', 'content'] %}{{ messages[0][key] }}{% endfor %}{% for a, b in [(1, 2), (3, 4)] %}"
        "{{ a * b }}{% endfor %}{{ range(3) | list }}"
    ),
    (
        "{% set text %}{% for m in messages %}{{ m.content }}{% endfor %}{% endset %}"
        "{{ text | length }}{{ text[:5] }}{{ messages[0].content is string }}{{ messages is iterable }}"
    ),
    (
        "{{ 1700000000 | string }}{{ messages | tojson | length }}{% if add_generation_prompt %}ask{% endif %}"
        "{{ documents is none }}{{ (messages | first)['content'] | default(1700000000) }}"
    ),
]  # fmt: skip


@pytest.mark.parametrize("source", [*WRITTEN, *(TEMPLATES[name] for name in ("chatml",))])
@pytest.mark.parametrize("ask", [True, False])
def test_what_templates_write_is_what_transformers_writes(source, ask):
    plain = [[{key: value for key, value in message.items() if value is not None} for message in TALK]]
    options = {"tools": TOOLS, "documents": None, "chat_template": source, "add_generation_prompt": ask}
    expected, _ = render_jinja_template(conversations=plain, **options, **TOKENS)
    assert Renderer(source).render(TALK, TOOLS, ask, TOKENS) == expected[0]


BOMBS = {
    "a long text": "{{ 'a' * 10 ** 10 }}",
    "a long text, folded": "{{ 'a' * 10000000000 }}",
    "a large number": "{{ 10 ** 10000000000 }}",
    "loop in loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loop in loop over a list": "{% set l = range(99999) | list %}{% for a in l %}{% for b in l %}{% endfor %}{% endfor %}",
    "doubling by ~": "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "doubling by +": "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "doubling by join": "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] | join %}{% endfor %}",
    "doubling by replace": (
        "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s.replace('a', 'aa' * 99) %}{% endfor %}"
    ),
    "lists in lists": "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    "tables in tables": (
        "{% set ns = namespace(d={}) %}{% for i in range(60) %}{% set ns.d = {'a': ns.d, 'b': ns.d} %}{% endfor %}{{ ns.d }}"
    ),
    "a width": "{{ 'a' | center(10000000000) }}",
    "a width by a method": "{{ 'a'.ljust(10000000000) }}",
    "a width in a format": "{{ '%10000000000d' % 1 }}",
    "a width beside a format": "{{ '%*d' % (10000000000, 1) }}",
    "a width in braces": "{{ '{:10000000000}'.format(1) }}",
    "an indent": "{{ messages | tojson(indent=1000000000) }}",
    "a set block": "{% set x %}{% for i in range(99999) %}{% for j in range(999) %}" + "x" * 9999 + "{% endfor %}{% endfor %}{% endset %}",
    "written text": "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a long join": "{{ range(99999) | join('a' * 9999999) }}",
    "texts of a filter, joined": "{{ range(99999) | map('center', 1000000) | join | length }}",
    "texts of a filter, listed": "{{ range(99999) | map('center', 1000000) | list | length }}",
    "texts of a filter, joined by a method": "{{ ''.join(range(99999) | map('center', 1000000)) }}",
    "loops that call themselves": "{% for a in range(99999) recursive %}" + "x" * 9999 + "{{ loop(range(99999)) }}{% endfor %}",
    "lorem ipsum": "{{ lipsum(n=10000000) }}",
    "a long program": "{# " + "x" * 2_000_000 + " #}messages",
    "blocks in blocks": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "brackets in brackets": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
}
INSIDES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__class__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ dict.__class__ }}",
    "{{ self.__init__ }}",
    "{% set ns = namespace(__class__=1) %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(a=1) }}",
    "{{ ''|attr('__class__') }}",
    "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as x %}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ '{0.__class__}'.format('') }}",
]


@pytest.mark.parametrize("name", [slow(name) if name in ("tables in tables", "lists in lists") else name for name in BOMBS])
def test_what_would_take_the_machine_is_refused(name, monkeypatch):
    monkeypatch.setattr("qlite.data.sandbox.SECONDS", 0.5)
    tracemalloc.start()
    start = time.perf_counter()
    try:
        with pytest.raises((TemplateError, RecursionError, SyntaxError)):
            Renderer(BOMBS[name]).render(TALK, TOOLS, True, TOKENS)
    finally:
        seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert seconds < 90  # with every allocation followed, which is most of it
    assert peak < 400e6


@pytest.mark.parametrize("source", INSIDES)
def test_nothing_of_python_or_the_disk_is_reached(source):
    try:
        written = Renderer(source).render(TALK, TOOLS, True, TOKENS)
    except (TemplateError, TypeError, AttributeError):
        return
    assert written == ""  # undefined: jinja's way of saying no


def test_a_template_that_refuses_is_heard():
    with pytest.raises(TemplateError, match="no system message"):
        Renderer("{{ raise_exception('no system message') }}").render(TALK, None, False, {})


def test_long_conversations_are_within_the_bounds():
    talk = [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "word " * 200}] * 500
    assert len(Renderer(TEMPLATES["chatml"]).render(talk, None, False, {})) > 1_000_000
