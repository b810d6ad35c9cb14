"""Jinja's immutable sandbox with its calls, operators and filters counted."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from pennyweight.data.sandbox import building
from pennyweight.data.sandbox.meter import (
    bounded,
    is_rendering,
    joined,
    metered,
    the_meter,
    too_large,
    written,
)

__all__ = ["Environment"]

RANGE_LIMIT = 20_000
_LARGEST_POWER = 64
# What chat templates use, and its near kin; the rest of Jinja's filters format web pages.
_FILTERS = [
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first",
    "float", "groupby", "indent", "int", "items", "join", "last", "length", "list", "lower",
    "map", "max", "min", "reject", "rejectattr", "replace", "reverse", "round", "safe",
    "select", "selectattr", "sort", "string", "title", "tojson", "trim", "unique", "upper",
]  # fmt: skip


class Environment(ImmutableSandboxedEnvironment):
    """`call`, `call_binop` and the filters are where a template can do something costly."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, loopcontrols],
            finalize=written,
        )
        own: dict[str, Callable[..., Any]] = {
            "indent": building.indented,
            "join": building.join,
            "replace": _replace,
            "tojson": building.to_json,
        }
        self.filters = {name: _guarded(own.get(name, self.filters[name])) for name in _FILTERS}
        counted: dict[str, Callable[..., Any]] = {
            "_metered": metered,
            "_joined": joined,
            "_bounded": bounded,
        }
        self.filters.update({name: _at_run_time(check) for name, check in counted.items()})
        del self.globals["lipsum"]
        self.globals.update(raise_exception=_raise, dict=_Dict(), namespace=_Namespace)
        self.globals["range"] = _range

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        the_meter().check_clock()
        arguments = [*args, *kwargs.values()]
        building.check_arguments(arguments)
        # str.format arrives wrapped by the sandbox
        method = getattr(function, "__wrapped__", function)
        subject, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(subject, str):
            if builder := building.BUILDERS.get(name):
                return bounded(builder(subject, *args, **kwargs))
            if name == "format":
                building.check_format(subject, arguments)
            elif name not in building.METHODS:
                raise building.refuse_method(name)
        elif isinstance(subject, bytes | bytearray):
            raise building.refuse_method(name)
        return bounded(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        meter = the_meter()
        if operator == "+" and type(left) is str and type(right) is str:  # nearly every one
            meter.step()
            meter.write(len(left) + len(right))
            return left + right
        meter.check_clock()
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(text, str | bytes | list | tuple) and isinstance(times, int):
                    meter.write(len(text) * max(0, times))
        if operator in {"*", "**"}:
            building.check_arguments((left, right))
        if operator == "**" and isinstance(right, int) and right > _LARGEST_POWER:
            raise too_large()
        if operator == "%" and isinstance(left, str):
            building.check_percent(left, right)
        return bounded(super().call_binop(context, operator, left, right))


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same filter, counted; functools.wraps keeps the marks by which Jinja passes its context."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not is_rendering():
            raise nodes.Impossible  # not folded at compile time, where nothing is counted
        the_meter().check_clock()
        building.check_arguments([*args, *kwargs.values()])
        return bounded(function(*args, **kwargs))

    return call


def _at_run_time(check: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps Jinja from folding a check into a constant at compile time."""

    @functools.wraps(check)
    def call(*args: Any) -> Any:
        if not is_rendering():
            raise nodes.Impossible
        return check(*args)

    return call


def _replace(text: Any, old: str, new: str, count: int | None = None) -> str:
    most = -1 if count is None else count
    return building.BUILDERS["replace"](str(text), str(old), str(new), most)


def _range(*bounds: int) -> range:
    numbers = range(*bounds)
    if len(numbers) > RANGE_LIMIT:
        raise too_large()
    return numbers


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


class _Namespace(Namespace):
    """A namespace whose names cannot begin with an underscore, as in transformers."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold the underscored name {name!r}")


class _Dict:
    """`dict(...)` for templates, without the class behind it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _GenerationTag(Extension):
    """`{% generation %}` blocks print their body; which tokens are trained is not read from them."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own protocol)

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)
