"""Chat templates are programs from strangers: this runs them with bounds on time, steps and output.

Jinja's immutable sandbox keeps a template from touching Python; it does not keep it from looping
for ever or writing for ever. Here every loop step and every call counts against a deadline, and
every string a template builds counts against a size, before the string is built where an operation
could make a huge one at once. What a template sees and writes is otherwise what transformers'
`apply_chat_template` gives it (the same filters, globals and whitespace rules).
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace

from pennyweight.errors import DataError

__all__ = ["ChatTemplate", "TemplateRefusedError"]

DEADLINE_S = 0.5
OUTPUT_LIMIT_CHARS = 8_000_000
SOURCE_LIMIT_CHARS = 128_000
_STEPS_BETWEEN_CLOCKS = 64
_NUMBER_LIMIT = 100_000
_ITEMS_LIMIT = 200_000
# What chat templates use, and its near kin; the rest of Jinja's filters format web pages.
_FILTERS = [
    "abs",
    "attr",
    "capitalize",
    "count",
    "d",
    "default",
    "dictsort",
    "e",
    "escape",
    "first",
    "float",
    "groupby",
    "indent",
    "int",
    "items",
    "join",
    "last",
    "length",
    "list",
    "lower",
    "map",
    "max",
    "min",
    "reject",
    "rejectattr",
    "replace",
    "reverse",
    "round",
    "safe",
    "select",
    "selectattr",
    "sort",
    "string",
    "title",
    "tojson",
    "trim",
    "unique",
    "upper",
]


class TemplateRefusedError(DataError):
    """The template broke a bound; no row can be rendered with it."""


class _Meter:
    """What one rendering has used. Thread time, so that a busy machine refuses nobody."""

    __slots__ = ("chars", "deadline", "steps")

    def __init__(self) -> None:
        self.steps, self.chars = 0, 0
        self.deadline = time.thread_time() + DEADLINE_S

    def step(self) -> None:
        self.steps += 1
        if self.steps % _STEPS_BETWEEN_CLOCKS == 0:
            self.check_clock()

    def check_clock(self) -> None:
        if time.thread_time() > self.deadline:
            raise TemplateRefusedError(
                f"chat template: ran longer than {DEADLINE_S:g} s and was stopped; "
                "use another template (data.template: plain, chatml or a Jinja file)"
            )

    def write(self, chars: int) -> None:
        self.chars += chars
        if self.chars > OUTPUT_LIMIT_CHARS:
            raise _too_large()


def _too_large() -> TemplateRefusedError:
    return TemplateRefusedError(
        f"chat template: builds more than {OUTPUT_LIMIT_CHARS:,} characters for one row; "
        "use another template (data.template: plain, chatml or a Jinja file)"
    )


_meter: ContextVar[_Meter] = ContextVar("meter of the rendering under way")


def _metered(values: Iterable[Any]) -> Iterator[Any]:
    meter = _meter.get()
    for value in values:
        meter.step()
        yield value


def _joined(*values: Any) -> str:
    parts = [str(_printable(value)) for value in values]
    _meter.get().write(sum(map(len, parts)))
    return "".join(parts)


def _bounded(value: Any) -> Any:
    """Count a value a template has just built; refuse one that holds too many others.

    Lists that hold the same list twice grow twofold with each step and only show it when printed
    or compared, so what is counted is what a walk through the value would meet.
    """
    if isinstance(value, str):
        _meter.get().write(len(value))
    elif isinstance(value, list | tuple | dict):
        seen, waiting = 0, [value]
        while waiting:
            held = waiting.pop()
            seen += len(held)
            if seen > _ITEMS_LIMIT:
                raise _too_large()
            inner = held.values() if isinstance(held, dict) else held
            waiting += [item for item in inner if isinstance(item, list | tuple | dict)]
    return value


def _printable(value: Any) -> Any:
    if isinstance(value, Namespace | Macro | Cycler | Joiner):
        raise ValueError(f"prints a {type(value).__name__}, which is not text")
    return value


def _written(value: Any) -> Any:
    """Called by Jinja on each value a template prints, also inside macros and set blocks."""
    meter = _meter.get(None)
    if meter is not None:  # None while constants are folded at compile time
        meter.write(len(value) if isinstance(value, str) else len(str(_printable(value))))
    return value


def _check_arguments(subject: Any, arguments: Sequence[Any]) -> None:
    """Refuse calls that could build a huge value in one C call, such as `x.ljust(10**10)`."""
    if any(isinstance(value, int) and abs(value) > _NUMBER_LIMIT for value in arguments):
        raise _too_large()
    texts = [value for value in (subject, *arguments) if isinstance(value, str)]
    if len(texts) >= 3:  # text.replace(old, new)
        text, old, new = texts[:3]
        if len(text) + text.count(old) * len(new) > OUTPUT_LIMIT_CHARS:
            raise _too_large()
    for glue in texts:  # glue.join(items), items|join(glue)
        items = [value for value in arguments if isinstance(value, list | tuple)]
        if len(glue) * sum(map(len, items)) > OUTPUT_LIMIT_CHARS:
            raise _too_large()


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same filter, counted; functools.wraps keeps the marks by which Jinja passes its context."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        meter = _meter.get(None)
        if meter is None:
            raise nodes.Impossible  # not folded at compile time, where nothing is counted
        meter.check_clock()
        _check_arguments(None, [*args, *kwargs.values()])
        return _bounded(function(*args, **kwargs))

    return call


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


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, loopcontrols],
            finalize=_written,
        )
        own = {"tojson": _to_json, "indent": _indented, "join": _join}
        self.filters = {name: _guarded(own.get(name, self.filters[name])) for name in _FILTERS}
        counted: dict[str, Callable[..., Any]] = {
            "_metered": _metered,
            "_joined": _joined,
            "_bounded": _bounded,
        }
        self.filters.update({name: _at_run_time(check) for name, check in counted.items()})
        del self.globals["lipsum"]
        self.globals.update(raise_exception=_raise, dict=_Dict(), namespace=_Namespace)

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        _meter.get().check_clock()
        # str.format arrives wrapped by the sandbox
        subject = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        _check_arguments(subject, [*args, *kwargs.values()])
        name = getattr(function, "__name__", "")
        if isinstance(subject, str) and name in {"format", "format_map"}:
            _refuse_wide_format(subject)
        return _bounded(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        meter = _meter.get()
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
            for number in (left, right):
                if isinstance(number, int) and abs(number) > _NUMBER_LIMIT:
                    raise _too_large()
        if operator == "**" and isinstance(right, int) and right > 64:
            raise _too_large()
        if operator == "%" and isinstance(left, str):
            _refuse_wide_format(left)
        return _bounded(super().call_binop(context, operator, left, right))


def _refuse_wide_format(pattern: str) -> None:
    digits = "".join(c if c.isdigit() else " " for c in pattern).split()
    if "*" in pattern or any(len(number) > 5 for number in digits):
        raise _too_large()


def _join(value: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
    items = list(value if attribute is None else (item[attribute] for item in value))
    _check_arguments(None, [str(d), items])
    return str(d).join(str(_printable(item)) for item in items)


def _indented(text: str, width: int = 4, first: bool = False, blank: bool = False) -> str:
    if not isinstance(width, int) or width * (text.count("\n") + 1) > OUTPUT_LIMIT_CHARS:
        raise _too_large()
    return jinja2.filters.do_indent(text, width, first, blank)


def _at_run_time(check: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps Jinja from folding a check into a constant at compile time, where nothing is counted."""

    @functools.wraps(check)
    def call(*args: Any) -> Any:
        if _meter.get(None) is None:
            raise nodes.Impossible
        return check(*args)

    return call


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if indent is not None and indent > 16:
        raise _too_large()
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class ChatTemplate:
    """A compiled template: messages in, text out, within bounds.

    `now` stands in for the clock (`strftime_now`), so that one run renders one text.
    """

    def __init__(self, source: str, *, name: str, now: datetime) -> None:
        self.name, self._now = name, now
        self.reads_clock = "strftime_now" in source
        if len(source) > SOURCE_LIMIT_CHARS:
            raise TemplateRefusedError(f"{name}: longer than {SOURCE_LIMIT_CHARS:,} characters")
        try:
            self._template = _compiled(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateRefusedError(
                f"{name}:{error.lineno}: not a Jinja template: {error.message}"
            ) from error
        except (RecursionError, MemoryError, OverflowError) as error:
            raise TemplateRefusedError(f"{name}: nested too deeply to compile") from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """Raises TemplateRefusedError on a broken bound, and ValueError with what the template said."""
        token = _meter.set(meter := _Meter())
        try:
            parts = []
            clock = {"strftime_now": self._now.strftime}
            for part in self._template.generate(**clock, **variables):
                meter.step()
                parts.append(part)
            return "".join(parts)
        except (TemplateRefusedError, SecurityError) as error:
            raise TemplateRefusedError(str(error)) from error
        except MemoryError as error:
            raise _too_large() from error
        except RecursionError as error:
            raise TemplateRefusedError(f"{self.name}: calls itself without end") from error
        except Exception as error:  # a stranger's program may raise anything; it concerns one row
            raise ValueError(f"{error}" or type(error).__name__) from error
        finally:
            _meter.reset(token)


@functools.lru_cache(maxsize=128)
def _compiled(source: str) -> jinja2.Template:
    environment = _Environment()
    return environment.from_string(_with_meters(environment.parse(source)))


def _with_meters(tree: nodes.Template) -> nodes.Template:
    """Count the steps of every loop, and the size of every `~`, slice, list, tuple and dict."""
    for loop in tree.find_all(nodes.For):
        loop.iter = _filtered(loop.iter, "_metered")
    _count_built(tree)
    return tree


def _count_built(node: nodes.Node) -> None:
    for field, value in list(node.iter_fields()):
        children = value if isinstance(value, list) else [value]
        for number, child in enumerate(children):
            if not isinstance(child, nodes.Node):
                continue
            _count_built(child)
            if (counted := _counted(child)) is not child:
                if isinstance(value, list):
                    value[number] = counted
                else:
                    setattr(node, field, counted)


def _counted(node: nodes.Node) -> nodes.Node:
    if isinstance(node, nodes.Concat):
        return _filtered(node.nodes[0], "_joined", node.nodes[1:])
    is_slice = isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    builds = isinstance(node, nodes.List | nodes.Dict) or (
        isinstance(node, nodes.Tuple) and node.ctx == "load"
    )
    return _filtered(node, "_bounded") if is_slice or builds else node


def _filtered(node: Any, name: str, arguments: Sequence[nodes.Expr] = ()) -> nodes.Node:
    return nodes.Filter(node, name, list(arguments), [], None, None).set_lineno(node.lineno)
