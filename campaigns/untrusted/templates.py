"""Chat templates that loop, swell, reach for Python or cannot be compiled: refused within 1.5 s."""

from __future__ import annotations

import random
import resource
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from campaigns.tally import Tally
from campaigns.untrusted.watch import CANARY, judged
from pennyweight.data.sandbox import ChatTemplate
from pennyweight.errors import DataError

__all__ = ["run"]

LIMIT_S, RANDOM = 1.5, 2000
MEMORY_LIMIT_BYTES = 512 * 2**20
NOW = datetime(2026, 1, 2)
LOOP = "{% for i in range(9999) %}"
END = "{% endfor %}"
SWELL = f"{{% set ns = namespace(x='ab') %}}{LOOP}"
LISTS = f"{{% set ns = namespace(x=[1]) %}}{LOOP}"
PYTHON = (
    "''.__class__.__mro__", "cycler.__init__.__globals__", "raise_exception.__globals__['os']",
    "self.__init__.__globals__", "namespace.__init__.__globals__", "dict.__call__.__globals__",
    "messages.append.__self__.clear()", "messages.clear()", "messages[0].update(a=1)",
    "(messages | map(attribute='__class__') | list)[0].__mro__", "strftime_now.__self__.__class__",
    "''|attr('__class__')|attr('__mro__')", "'{0.__class__.__mro__}'.format('')",
    "'%s'.__mod__(1).__class__", "range.__globals__", "loop.__class__", "joiner.__init__.__globals__",
    f"cycler.__init__.__globals__.os.environ.update({CANARY}='1')",
    "().__class__.__base__.__subclasses__()", "(range(3)|map('string')).gi_frame.f_globals",
)  # fmt: skip
SWELLING = (
    "ns.x + ns.x", "ns.x ~ ns.x", "ns.x * 2", "ns.x.replace('a', 'aaaaaaaa')", "ns.x | replace('a', 'aa')",
    "ns.x.join(['a'] * 9)", "ns.x | join('bb')", "'%s%s' % (ns.x, ns.x)", "'{0}{0}'.format(ns.x)",
    "[ns.x, ns.x]", "{1: ns.x, 2: ns.x}", "(ns.x, ns.x)", "dict(a=ns.x, b=ns.x)", "ns.x | escape ~ ns.x",
    "ns.x.center(99999)", "ns.x | tojson ~ ns.x", "[ns.x] * 9", "ns.x | list + ns.x | list", "ns.x.zfill(99999) ~ ns.x",
)  # fmt: skip
AT_ONCE = (
    "'a' * 10**9", "'a'.ljust(10**10)", "'\\t'.expandtabs(10**9)", "('\\t' * 99999).expandtabs(99999)",
    "('a' * 999999).translate({97: 'b' * 99999})", "('a' * 99999).join('b' * 99999)", "'{:>999999999}'.format(1)",
    "'{:{w}}'.format(1, w='999999999')", "'%999999999d' % 1", "'%*d' % (10**9, 1)", "9 ** 9 ** 9", "10 ** 99999",
    "range(10**9) | list", "range(99999) | list", "[1] * 10**9", "[1] | tojson(indent=10**9)", "('a' * 99999) | indent(10**8)",
    "range(9999) | list | tojson(separators=('a' * 99999, 'b'))", "('ab' * 3999999) | sort", "('a,' * 3999999).split(',')",
    "('a' * 7999999) | list", "('%(a)s' * 999) % {'a': 'a' * 99999}", "('{0}' * 999).format('a' * 99999)",
)  # fmt: skip
SHAPES = (
    "{% for i in x %}", "{% if x %}", "{% set x %}", "{% filter upper %}", "{% with %}", "{% call f() %}",
    "{% macro m() %}", "{% generation %}", "{{ (", "{{ [", "{{ {1:", "{{ f(", "{{ not ", "{{ -", "{{ 1 if 1 else ",
    "{#", "{% raw %}", "{{ 'a", "{{ a.b", "{% block a %}", "{% break %}", "{% include 'a' %}", "{% import 'a' as b %}",
    "{% extends 'a' %}", "{% autoescape true %}", "{% trans %}", "{% do x %}", "{% debug %}", "{{ 9", "{{ a|e",
)  # fmt: skip


def run(tally: Tally, cases: int | None) -> None:
    everything = list(_named())
    chosen = everything if cases is None else everything[:: max(1, len(everything) * 2 // cases)]
    if cases is None and sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (_held() + MEMORY_LIMIT_BYTES,) * 2)
    longest = 0.0
    for label, source, may_pass in [*chosen, *_at_random(RANDOM if cases is None else cases // 2)]:
        fault, took = judged(
            lambda source=source: _render(source), tally.folder, limit_s=LIMIT_S, may_pass=may_pass
        )
        longest = max(longest, took)
        tally.case(label, fault)
    tally.remark(f"longest {longest:.2f} s")


def _held() -> int:
    """Bytes of address space already in use."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0]
    return int(pages) * resource.getpagesize()


def _render(source: str) -> None:
    """As a surface does: a template's own ValueError is a refusal of one row."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    try:
        text = ChatTemplate(source, name="t", now=NOW).render({"messages": messages})
    except DataError:
        raise
    except ValueError as refused:
        raise DataError(str(refused)) from refused
    if messages != [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]:
        raise AssertionError("the messages were changed")
    if any(word in text for word in ("<class", "<function", "<module", "built-in", "HOME")):
        raise AssertionError(f"printed Python's insides: {text[:80]}")


def _named() -> Iterator[tuple[str, str, bool]]:
    for depth in (2, 3, 15):
        yield f"{depth} loops in each other", LOOP * depth + END * depth, False
        yield f"{depth} loops that print", LOOP * depth + "x" + END * depth, False
    for call in ("f(n)", "f(n) ~ f(n)", "f(n + 1)"):
        yield (
            f"macro {call}",
            f"{{% macro f(n) %}}{{{{ {call} }}}}{{% endmacro %}}{{{{ f(1) }}}}",
            False,
        )
    for expression in SWELLING:
        lists = expression[0] in "[({" or expression.startswith("dict")
        yield (
            f"swells by {expression}",
            (LISTS if lists else SWELL) + f"{{% set ns.x = {expression} %}}{END}{{{{ ns.x }}}}",
            False,
        )
    for expression in AT_ONCE:
        yield f"at once {expression}", f"{{{{ {expression} | string }}}}", False
        yield (
            f"kept {expression}",
            f"{{% set x = {expression} %}}{{{{ x | string | length }}}}",
            False,
        )
    for expression in PYTHON:
        yield f"python {expression}", f"{{{{ {expression} }}}}", True
        yield (
            f"python in a loop {expression}",
            f"{{% for i in [1] %}}{{% set x = {expression} %}}{{{{ x }}}}{END}",
            True,
        )
    for shape in SHAPES:
        for times in (1, 30, 300, 3000, 30_000):
            yield f"{shape} {times} times", shape * times, True
            yield f"{shape} {times} times in text", ("a" + shape) * times + "{{ 1 }}", True


def _at_random(number: int) -> Iterator[tuple[str, str, bool]]:
    """Pieces of all of these, put together."""
    dice = random.Random(0)
    pieces = [
        *SHAPES,
        LOOP,
        END,
        SWELL,
        "{% endif %}",
        " }}",
        " %}",
        "}}",
        "{% set ns.x = ns.x ~ ns.x %}",
    ]
    pieces += [f"{{{{ {e} }}}}" for e in (*PYTHON, *AT_ONCE)] + ["{{ messages }}", "\x00", "\ud800"]
    for at in range(number):
        yield f"at random {at}", "".join(dice.choices(pieces, k=dice.randrange(1, 12))), True
