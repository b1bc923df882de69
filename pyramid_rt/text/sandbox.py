"""Jinja for chat templates: programs of strangers, run in a sandbox that bounds what they may take.

jinja2's own sandbox keeps a template away from Python. It does not keep it from exhausting the process: `range` is
limited there, but not `'a' * 10**10`, `'%9999999999d' % 1`, loops within loops, a text doubled in a loop, or a list
that holds itself twice, forty times over. Here everything that makes a value is counted:

- a value may have a size of `MAX_SIZE`: its characters, and 8 for each entry; what it holds twice counts twice;
- all values that a rendering makes may have `MAX_TOTAL`, and so may what it writes;
- a rendering may take `MAX_STEPS` passes of loops, calls and filters, and `MAX_SECONDS`.

An operation that could make a large value of small ones at one blow is measured before it runs. The others make
nothing much larger than what they get, and are measured when they are done. Four filters of jinja2 that no chat needs
and that are hard to bound are not there: pprint, urlize, wordwrap, xmlattr; nor is the function lipsum.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_SIZE = 2**23
MAX_TOTAL = 2**27
MAX_STEPS = 200_000
MAX_SECONDS = 10.0
MAX_WIDTH = 10_000  # of padding and indentation; of what a list is cut into

_MAX_BITS = 4096
_ENTRY = 8
_CONTAINERS = (list, tuple, dict, set, frozenset)
_MISSING_FILTERS = ("pprint", "urlize", "wordwrap", "xmlattr")
_PERCENT_WIDTHS = re.compile(r"[-+ #0]*+(\d*+|\*)(?:\.(\d*+|\*))?+")
_BRACES = re.compile(r"\{([^{}]*)([{}]|$)")
_MAX_PATTERN = 2**16


class LimitError(jinja2.TemplateError):
    """A template takes too much; the message says of what."""


class _Budget:
    """Steps, time and sizes that one rendering, or one compilation, has taken."""

    def __init__(self) -> None:
        self._steps, self._total = 0, 0
        self._deadline = time.monotonic() + MAX_SECONDS

    def step(self, count: int) -> None:
        """Count passes of a loop, calls or filters."""
        self._steps += count
        if self._steps > MAX_STEPS:
            raise LimitError(f"it takes more than {MAX_STEPS} loop passes and calls")
        if time.monotonic() > self._deadline:
            raise LimitError(f"it takes more than {MAX_SECONDS:g} seconds")

    def take(self, size: int) -> None:
        """Count a value."""
        self._total += size
        if self._total > MAX_TOTAL:
            raise LimitError(f"its values take more than {MAX_TOTAL} characters in all")


_budget: ContextVar[_Budget | None] = ContextVar("template_budget", default=None)


@contextmanager
def bounded() -> Iterator[None]:
    """Give what runs inside a budget of its own."""
    token = _budget.set(_Budget())
    try:
        yield
    finally:
        _budget.reset(token)


def written(pieces: Iterable[str]) -> str:
    """The pieces that a template writes, put together; inside `bounded`."""
    kept: list[str] = []
    size = 0
    for piece in pieces:
        size += len(piece)
        _check_size(size)
        kept.append(piece)
    return "".join(kept)


# Entries of a list that are compared in the time of a step.
_SCANNED = 16


def _step(count: int = 1) -> None:
    budget = _budget.get()
    if budget is not None:
        budget.step(count)


def _check_size(size: int) -> None:
    if size > MAX_SIZE:
        raise LimitError(f"it makes a text or list of more than {MAX_SIZE} characters")


def _check_bits(bits: int) -> None:
    if bits > _MAX_BITS:
        raise LimitError(f"it makes a number of more than {_MAX_BITS} bits")


def _counted(value: Any) -> Any:
    """The same value, counted."""
    if isinstance(value, int):
        _check_bits(value.bit_length())
    elif isinstance(value, (str, bytes, *_CONTAINERS)):
        size = _size(value)
        _check_size(size)
        budget = _budget.get()
        if budget is not None:
            budget.take(size)
    return value


def _size(value: Any, indent: int = 0) -> int:
    """Size of a value; stops counting past `MAX_SIZE`. With `indent`, of its JSON with every entry on a line."""
    size, left = 0, [(value, 1)]
    while left and size <= MAX_SIZE:
        one, depth = left.pop()
        if isinstance(one, str | bytes):
            size += len(one)
        elif isinstance(one, _CONTAINERS):
            size += len(one) * (_ENTRY + depth * indent)
            left.extend((entry, depth + 1) for entry in one)
            if isinstance(one, dict):
                left.extend((entry, depth + 1) for entry in one.values())
    return size


# What is measured before it runs.


def _check_widths(*arguments: Any) -> None:
    for one in arguments:
        if isinstance(one, int) and abs(one) > MAX_WIDTH:
            raise LimitError(f"it asks for a width or count of more than {MAX_WIDTH}")


def _check_pattern(pattern: str, fields: int, values: Any, widths: Iterable[str]) -> None:
    """A format string: no width that is large or taken from the arguments, and no argument used too often."""
    _check_size(len(pattern) + fields * _size(values))
    if len(pattern) > _MAX_PATTERN:
        raise LimitError(f"it formats by a text of more than {_MAX_PATTERN} characters")
    for width in widths:
        if not width.isdecimal() or len(width) > 9:
            raise LimitError("it formats with a width that is taken from the values, or too large")
        _check_widths(int(width))


def _check_percent(pattern: Any, values: Any) -> None:
    if isinstance(pattern, str):
        _check_pattern(pattern, pattern.count("%"), values, _percent_widths(pattern))


def _percent_widths(pattern: str) -> Iterator[str]:
    """Widths and precisions of `%` formats, as they are written."""
    at = pattern.find("%") + 1
    while at:
        if pattern.startswith("(", at):  # a name, in which parentheses are balanced
            depth, at = 1, at + 1
            while depth and at < len(pattern):
                depth += {"(": 1, ")": -1}.get(pattern[at], 0)
                at += 1
        match = _PERCENT_WIDTHS.match(pattern, at)
        assert match is not None  # it matches nothing too
        yield from filter(None, match.groups())
        at = pattern.find("%", match.end() + 1) + 1


def _check_braces(pattern: str, values: Any) -> None:
    _check_pattern(pattern, pattern.count("{"), values, _brace_widths(pattern))


def _brace_widths(pattern: str) -> Iterator[str]:
    """Widths and precisions of `str.format`; a field within a field counts as one that is no number."""
    for field, end in _BRACES.findall(pattern.replace("{{", "").replace("}}", "")):
        if end == "{":
            yield end
        yield from re.findall(r"[1-9]\d*", field.partition(":")[2])


def _check_replace(text: Any, old: Any = "", new: Any = "", *_: Any, **__: Any) -> None:
    text, old, new = str(text), str(old), str(new)
    count = text.count(old) if old else len(text) + 1
    _check_size(len(text) + count * max(0, len(new) - len(old)))


def _check_indent(text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    _check_widths(width)
    step = len(width) if isinstance(width, str) else int(width)
    _check_size(len(str(text)) + (str(text).count("\n") + 1) * max(0, step))


def _check_tojson(value: Any, ensure_ascii: Any = False, indent: Any = None, *_: Any, **__: Any) -> None:
    step = len(indent) if isinstance(indent, str) else int(indent or 0)
    _check_widths(step)
    _check_size(_size(value, step))


def _check_join(values: list[Any], separator: Any = "", *_: Any, **__: Any) -> None:
    _check_size(_size(values) + len(str(separator)) * len(values))


def _check_sum(_: Any, __: Any = None, start: Any = 0) -> None:
    if not isinstance(start, int | float):
        raise LimitError("it sums something else than numbers")


def _check_cut(_: Any, count: Any = 0, *__: Any, **___: Any) -> None:
    _check_widths(count)


def _check_round(_: Any, precision: Any = 0, *__: Any, **___: Any) -> None:
    if isinstance(precision, int):  # the filter takes 10 to this power
        _check_bits(4 * abs(precision))


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    for one, count in ((left, right), (right, left)):
        if isinstance(one, str | bytes | list | tuple) and isinstance(count, int):
            _check_size(_size(one) * max(0, count))


def _check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(max(1, left.bit_length()) * abs(right))


_FILTER_CHECKS: dict[str, Callable[..., None]] = {
    "batch": _check_cut,
    "center": _check_cut,
    "format": lambda pattern, *values, **named: _check_percent(pattern, [*values, *named.values()]),
    "indent": _check_indent,
    "join": _check_join,
    "replace": _check_replace,
    "round": _check_round,
    "slice": _check_cut,
    "sum": _check_sum,
    "tojson": _check_tojson,
}
_OPERATOR_CHECKS: dict[str, Callable[[Any, Any], None]] = {
    "*": _check_product,
    "**": _check_power,
    "%": _check_percent,
}


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is measured and counted."""
    check = _FILTER_CHECKS.get(name)
    first = (
        1 if hasattr(function, "jinja_pass_arg") else 0
    )  # a context or the environment stands before the value

    @wraps(function)
    def guarded(*given: Any, **named: Any) -> Any:
        _step()
        arguments = list(given)
        if name == "join":
            arguments[first] = list(arguments[first])
        if check is not None:
            check(*arguments[first:], **named)
        return _counted(function(*arguments, **named))

    return guarded


def _guarded_test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A test that is counted: `select` and its like make one for every entry."""

    @wraps(function)
    def guarded(*given: Any, **named: Any) -> Any:
        scanned = len(given[-1]) if name == "in" and isinstance(given[-1], list | tuple) else 0
        _step(1 + scanned // _SCANNED)
        return function(*given, **named)

    return guarded


def _measured_call(method: Any, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, ...]:
    """Check a call of a method of a built-in value; the arguments to make it with."""
    name = getattr(method, "__name__", "")
    owner = getattr(method, "__self__", None)
    if name in ("format", "format_map") and owner is None:
        owner = getattr(getattr(method, "__wrapped__", None), "__self__", None)
    if isinstance(owner, int):
        _check_widths(*arguments, *named.values())
    if not isinstance(owner, str | bytes):
        return arguments
    if name in ("center", "ljust", "rjust", "zfill"):
        _check_widths(*arguments)
    elif name == "expandtabs":
        _check_widths(*arguments, *named.values())
        _check_size(len(owner) * max(8, *map(int, arguments), *map(int, named.values())))
    elif name == "replace":
        _check_replace(owner, *arguments)
    elif name == "join" and arguments:
        arguments = (list(arguments[0]), *arguments[1:])
        _check_join(arguments[0], owner)
    elif name in ("format", "format_map") and isinstance(owner, str):
        _check_braces(owner, [*arguments, *named.values()])
    return arguments


class _Namespace(Namespace):
    """A namespace whose repr leaves out what it holds: of two that hold each other it would be without end."""

    def __repr__(self) -> str:
        return "<namespace>"


class _Counting(NodeTransformer):
    """Puts the counting into a template: passes of loops, `~`, and lists, tuples and dicts that are written out."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self._call("step", []), lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("concatenated", node.nodes)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return self._call("same", [node])

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return self._call("same", [node])

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return self._call("same", [node]) if node.ctx == "load" else node

    @staticmethod
    def _call(method: str, arguments: list[nodes.Expr]) -> nodes.Call:
        return nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which no model was trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox. Compile and render inside `bounded`."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.globals["namespace"] = _Namespace
        del self.globals["lipsum"]
        filters = {**self.filters, "tojson": _tojson}
        self.filters = {
            name: _guarded(name, function)
            for name, function in filters.items()
            if name not in _MISSING_FILTERS
        }
        tests: dict[str, Any] = dict(self.tests)
        self.tests = {name: _guarded_test(name, test) for name, test in tests.items()}

    def concat(self, pieces: Iterable[str]) -> str:
        """The pieces that a macro or a block writes, put together."""
        text: str = _counted(written(pieces))
        return text

    def concatenated(self, *values: Any) -> str:
        """The operator `~`."""
        parts = [str(value) for value in values]
        _check_size(sum(map(len, parts)))
        return "".join(parts)

    def same(self, value: Any) -> Any:
        """A list, tuple or dict that the template writes out; `call` counts it."""
        return value

    def step(self) -> None:
        """The beginning of a loop's pass; `call` counts it."""

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """See `SandboxedEnvironment`."""
        check = _OPERATOR_CHECKS.get(operator)
        if check is not None:
            check(left, right)
        return _counted(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """See `SandboxedEnvironment`."""
        _step()
        arguments = _measured_call(__obj, args, kwargs)
        return _counted(super().call(__context, __obj, *arguments, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """See `SandboxedEnvironment`; `translate` could write a long text for every character."""
        if isinstance(obj, str | bytes) and attr in ("translate", "maketrans"):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def _generate(self, source: nodes.Template, *args: Any, **options: Any) -> str:
        counting = _Counting().visit(source)
        counting.set_environment(self)
        return super()._generate(counting, *args, **options)
