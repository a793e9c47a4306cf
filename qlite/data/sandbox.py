"""A chat template is a stranger's program: it renders in jinja's sandbox and, beyond that, under bounds of size and time.

jinja's own sandbox keeps a template from Python's insides, but not from the machine: ``{{ 'a' * 10**10 }}`` takes all memory and two
loops, one in the other, an hour. Here every value that a template makes is weighed before it exists, or at once after, and every
turn of a loop and every call looks at the clock. What goes over a bound is a TemplateError, as a refusal of the template's own is.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import wraps
from types import GeneratorType

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

SOURCE = 1_000_000
"""Characters of a template."""
WEIGHT = 10_000_000
"""Characters of a value, eight for each part of a list or a table."""
WRITTEN = 100_000_000
"""Characters that one conversation may make a template write, with those that it drops again."""
SECONDS = 10.0
"""Of processor time for one conversation."""
# Arguments that say how long the result is: of filters by these names, and of a text's methods.
WIDTHS = {"center", "indent", "wordwrap", "format", "batch", "slice", "round", "tojson", "ljust", "rjust", "zfill", "expandtabs"}
NUMBER = re.compile(r"\d{7}")


class Renderer:
    """Renders one template. Reasoning is known to templates by two names, and each gets it by both."""

    def __init__(self, source: str):
        """Raises TemplateError: it is no Jinja, or too long."""
        if len(source) > SOURCE:
            raise TemplateError(f"it is {len(source):,} characters long; at most {SOURCE:,} are read")
        self._environment = _Environment()
        self._template = self._environment.from_string(source)

    def render(self, messages: list[dict], tools: list[dict] | None, ask: bool, tokens: dict[str, str]) -> str:
        """Return ``messages`` as text; ``ask``: up to where the next answer begins. ``tokens``: the tokenizer's own, by name.

        Raises:
            TemplateError: the template refuses them, or goes over a bound.
            Exception: whatever else the template's own code raises.
        """
        bounds = self._environment.begin()
        told = [_with_reasoning({key: value for key, value in message.items() if value is not None}) for message in messages]
        given = {**tokens, "messages": told, "tools": tools, "documents": None, "add_generation_prompt": ask}
        parts = []
        for part in self._template.generate(**given):
            bounds.write(len(part))
            parts.append(part)
        return "".join(parts)


class _Bounds(threading.local):
    """What is left to the conversation that is being rendered."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.written, self.ticks, self.until = 0, 0, time.thread_time() + SECONDS

    def tick(self) -> None:
        self.ticks += 1
        if not self.ticks % 256 and time.thread_time() > self.until:
            raise SecurityError(f"it takes more than {SECONDS:g} seconds")

    def write(self, characters: int) -> None:
        self.written += characters
        if self.written > WRITTEN:
            raise SecurityError(f"it writes more than {WRITTEN:,} characters")


class _Environment(ImmutableSandboxedEnvironment):
    """jinja's sandbox with the names that chat templates count on, and bounds."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        self.bounds = _Bounds()
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=self._finalised)
        self.filters = {name: self._bounded(name, each) for name, each in {**self.filters, "tojson": _tojson}.items() if name != "urlize"}
        self.filters |= {"_turns": self._turns, "_weighed": weighed}
        self.globals |= {"raise_exception": _refuse, "strftime_now": _now, "dict": _Dict(), "namespace": _Namespace}
        del self.globals["lipsum"]

    def begin(self) -> _Bounds:
        """Return the bounds, set for a new conversation."""
        self.bounds.begin()
        return self.bounds

    def call(self, context, obj, *args, **kwargs):
        """Call a function or a method of the template's values."""
        self.bounds.tick()
        method = getattr(obj, "__wrapped__", obj)  # jinja gives its own str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        args = tuple(self._weighed_parts(value) if isinstance(value, GeneratorType) else value for value in args)
        if isinstance(owner, str):
            _weigh_ahead(name, owner, args, kwargs)
        return weighed(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context, operator, left, right):
        """Compute what could be large: + * ** and %, which formats texts."""
        if operator == "%" and isinstance(left, str):
            _weigh_ahead("format", left, right if isinstance(right, tuple) else (right,), {})
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _require(left.bit_length() * right)
        elif operator == "*" and not (isinstance(left, int | float) and isinstance(right, int | float)):
            _require(_length(left) * _length(right))
        return weighed(super().call_binop(context, operator, left, right))

    def _parse(self, source, name, filename):
        return _Bounding().visit(super()._parse(source, name, filename))

    def _bounded(self, name: str, function: Callable) -> Callable:
        @wraps(function)  # with the mark by which jinja knows that it wants a context first
        def bounded(*args, **kwargs):
            self.bounds.tick()
            first = 1 if hasattr(function, "jinja_pass_arg") else 0
            value = args[first]
            if isinstance(value, GeneratorType):  # what a filter before this one makes, part by part: weighed as it comes
                value = self._weighed_parts(value)
                args = (*args[:first], value, *args[first + 1 :])
            _weigh_ahead(name, weighed(value), args[first + 1 :], kwargs)
            return weighed(function(*args, **kwargs))

        return bounded

    def _weighed_parts(self, values: Iterator) -> Iterator:
        weight = 0
        for value in values:
            self.bounds.tick()
            weight += _weight(value) + 8
            _require(weight)
            yield value

    def _turns(self, values: Iterable, written: int) -> Iterator:
        """Yield ``values``, in each turn of the loop that writes so many characters of the template's own."""
        for value in values:
            self.bounds.tick()
            self.bounds.write(written)
            yield value

    def _finalised(self, value: object) -> object:
        """See every value that is written, wherever it goes."""
        if not isinstance(value, str):
            value = str(weighed(value))
        self.bounds.write(len(value))
        return value


class _Bounding(NodeTransformer):
    """Makes loops count their turns; and texts and lists that a template puts together go through filters, which are bounded."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        if node.recursive:
            raise TemplateError("it has a recursive loop, which no chat template needs")
        written = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        node = self.generic_visit(node)
        node.iter = _filtered("_turns", node.iter, [nodes.Const(written, lineno=node.lineno)])
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        node = self.generic_visit(node)
        return _filtered("join", nodes.List(node.nodes, lineno=node.lineno))

    def visit_List(self, node: nodes.List) -> nodes.Filter:
        return _filtered("_weighed", self.generic_visit(node))

    def visit_Dict(self, node: nodes.Dict) -> nodes.Filter:
        return _filtered("_weighed", self.generic_visit(node))

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        node = self.generic_visit(node)
        return _filtered("_weighed", node) if node.ctx == "load" else node


def _filtered(name: str, node: nodes.Expr, args: list[nodes.Expr] | None = None) -> nodes.Filter:
    return nodes.Filter(node, name, args or [], [], None, None, lineno=node.lineno)


def weighed(value: object) -> object:
    """Return ``value``. Raises SecurityError if it has more than WEIGHT characters and parts."""
    kind = type(value)
    if kind is str:
        _require(len(value))
    elif kind is not bool and kind is not type(None):
        _weight(value)
    return value


def _weight(value: object) -> int:
    """Return the characters and parts of ``value``. Raises SecurityError if they are too many to be counted."""
    weight, open_values = 0, [value]
    while open_values:
        part = open_values.pop()
        if isinstance(part, str):
            weight += len(part)
        elif isinstance(part, int):
            weight += part.bit_length() // 3
        elif isinstance(part, dict):
            open_values += [*part, *part.values()]
            weight += 8 * len(part)
        elif isinstance(part, list | tuple):
            open_values += part
            weight += 8 * len(part)
        elif isinstance(part, Namespace):
            open_values.append(part._Namespace__attrs)
        _require(weight)
    return weight


def _weigh_ahead(name: str, owner: object, args: Iterable, kwargs: dict) -> None:
    """Raise SecurityError if the filter or method ``name`` would make too much of ``owner``."""
    values = [*args, *kwargs.values()]
    if name in WIDTHS and any(isinstance(value, int) and value > WEIGHT for value in values):
        _require(WEIGHT + 1)
    if name in ("format", "format_map") and isinstance(owner, str) and NUMBER.search(owner):
        _require(WEIGHT + 1)
    if name == "replace" and isinstance(owner, str) and len(values) >= 2:
        old, new = str(values[0]), str(values[1])
        _require(len(owner) + owner.count(old) * len(new))
    if name == "join" and values:
        between, parts = (owner, values[0]) if isinstance(owner, str) and not isinstance(values[0], str) else (values[0], owner)
        if hasattr(parts, "__len__"):
            _require(len(str(between)) * len(parts))


def _length(value: object) -> int:
    if isinstance(value, int):
        return abs(value)
    return len(value) if hasattr(value, "__len__") and not isinstance(value, Undefined) else 0


def _require(weight: int) -> None:
    if weight > WEIGHT:
        raise SecurityError(f"it builds a value of more than {WEIGHT:,} characters")


# What chat templates call


class _Generation(Extension):
    """The tag around what the assistant says, which other trainers need; it writes what stands in it."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dict:
    """``dict`` without its attributes."""

    def __call__(self, *args, **kwargs) -> dict:
        return dict(*args, **kwargs)


class _Namespace(Namespace):
    """jinja's, without names that Python keeps for itself."""

    def __init__(*args, **kwargs):
        self, *given = args
        values = dict(*given, **kwargs)
        for name in values:
            _require_plain(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name, value):
        _require_plain(name)
        super().__setitem__(name, value)


def _require_plain(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f'it keeps a value by the name "{name}"; names with "_" in front are Python\'s')


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _with_reasoning(message: dict) -> dict:
    said = next((message[name] for name in ("reasoning_content", "thinking", "reasoning") if name in message), None)
    return message if said is None else {"thinking": said, **message, "reasoning_content": said}
