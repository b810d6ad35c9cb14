from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from pennyweight.data.sandbox import ChatTemplate, TemplateRefusedError
from pennyweight.data.sandbox.meter import DEADLINE_S
from tests.data.conftest import dressed, templates

NOW = datetime(2026, 1, 2, 3, 4)
DOUBLING = "{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"

HOSTILE = {
    "loop": "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "output": "{% for i in range(9999) %}{% for j in range(9999) %}xxxx{% endfor %}{% endfor %}",
    "wide range": "{% for i in range(99999) %}{% endfor %}",
    "branching macro": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
    "{{ f(40) }}",
    "endless macro": "{% macro f(n) %}{{ f(n+1) }}{% endmacro %}{{ f(0) }}",
    "endless loop": "{% for i in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "times": "{{ 'a' * 10**9 }}",
    "folded at compile time": "{{ 9 ** 9 ** 9 }}",
    "doubled with +": "{% set ns = namespace(x='a') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | length }}",
    "doubled with ~": "{% set ns = namespace(x='a') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x | length }}",
    "doubled list, printed": f"{{% set ns = namespace(x=[1]) %}}{DOUBLING}{{{{ ns.x }}}}",
    "doubled list, as JSON": f"{{% set ns = namespace(x=[1]) %}}{DOUBLING}{{{{ ns.x | tojson }}}}",
    "wide": "{{ 'a'.center(10**10) }}",
    "wide format": "{{ '{:>999999999}'.format(3) }}",
    "wide percent": "{{ '%999999999d' % 3 }}",
    "wide indent": "{{ [1] | tojson(indent=1000000000) }}",
    "replace": "{% set x = 'a' * 1000000 %}{{ x.replace('a', x) }}",
    "join": "{{ range(9999) | join('a' * 1000000) }}",
    "set block": "{% for i in range(9999) %}{% set x %}{{ 'a' * 1000000 }}{% endset %}{% endfor %}",
    "list of ranges": "{% for i in range(9999) %}{% set x = range(9999) | list %}{% endfor %}",
    "expandtabs": "{{ ('\\t' * 100000).expandtabs(50000) }}",
    "translate": "{{ ('a' * 1000000).translate({97: 'b' * 4000}) }}",
    "join of a text": "{{ ('a' * 100000).join('b' * 40000) }}",
    "join of a generator": "{{ ('a' * 100000).join(range(9999) | map('string')) }}",
    "width from an argument": "{{ '{:{w}}'.format(1, w='3000000000') }}",
    "one field many times": "{% set x = 'a' * 900000 %}{{ ('{0}' * 1000).format(x) }}",
    "one key many times": "{% set x = {'a': 'a' * 900000} %}{{ ('%(a)s' * 1000) % x }}",
    "many widths": "{{ ('%99999d' * 1000) % range(1000) | list }}",
    "wide separators": "{{ range(9999) | list | tojson(separators=('a' * 40000, 'b')) }}",
    "deep and wide JSON": "{% set ns = namespace(x=range(9999) | list) %}"
    "{% for i in range(300) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson(indent=16) }}",
    "one long text many times": "{% set x = 'a' * 900000 %}{{ [x] * 1000 }}",
    "sorted": "{% set x = ('ab' * 1000000) | sort %}",
    "loops in loops": "{% for i in x %}" * 60 + "{% endfor %}" * 60,
    "ifs in ifs": "{% if 1 %}" * 200 + "{% endif %}" * 200,
    "break outside a loop": "{% break %}",
    "an argument twice": "{{ dict(a=1, a=2) }}",
    "long number": "{{ " + "9" * 5000 + " }}",
    "half a surrogate pair": "{{ '\ud800' }}",
    "many parts": "{% set a = 1 %}" * 4000,
    "long chain": "{{ " + "1 < " * 9000 + "2 }}",
    "long source": "a" * 70000,
    "format and python": "{{ '{0.__class__.__mro__}'.format('') }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "reads a file": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "python": "{{ ''.__class__.__mro__ }}",
    "changes its input": "{{ messages.append(1) }}",
    "unknown filter": "{{ 'a' | center(9) }}",
    "not a template": "{% for %}",
    "deep": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_refused_in_time(name: str) -> None:
    """Bound: 1.5 s; the clock is the thread's own, so that a busy machine fails nobody."""
    began = time.thread_time()
    with pytest.raises(TemplateRefusedError):
        ChatTemplate(HOSTILE[name], name="t", now=NOW).render({"messages": []})
    assert time.thread_time() - began < DEADLINE_S + 1


ROWS = {
    "an escaped half of a surrogate pair": r"{{ '\ud800' }}",
    "its own long reason": "{{ raise_exception('a' * 1000000) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as x %}",
}


@pytest.mark.parametrize("name", ROWS)
def test_what_goes_wrong_with_a_row_is_one_line(name: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        ChatTemplate(ROWS[name], name="t", now=NOW).render({"messages": []})
    assert len(str(caught.value)) < 400


HARMLESS = {
    "{{ ''|attr('__class__') }}": "",
    "{{ raise_exception.__globals__ }}": "",
    "{{ [1]|selectattr('__class__')|list }}": "[]",
    "{{ self._TemplateReference__context }}": "",
    "{{ ', '.join(['a', 'b']) }}": "a, b",
    "{{ '{} and {:>4}'.format('a', 1) }}": "a and    1",
    "{{ '%s-%05.1f' % ('a', 2.5) }}": "a-002.5",
    "{{ 'a-b'.replace('-', '+') }}{{ 'a-b' | replace('-', '+') }}": "a+ba+b",
    "{{ [1, {'a': 'é'}] | tojson(indent=2) }}": '[\n  1,\n  {\n    "a": "é"\n  }\n]',
    "{{ 'a\\nb' | indent(2) }}": "a\n  b",
}


@pytest.mark.parametrize("source", HARMLESS)
def test_what_is_within_bounds_is_what_jinja_gives(source: str) -> None:
    assert ChatTemplate(source, name="t", now=NOW).render({}) == HARMLESS[source]


def test_a_template_s_own_refusal_is_about_one_row() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", name="t", now=NOW)
    with pytest.raises(ValueError, match="roles must alternate") as caught:
        template.render({})
    assert not isinstance(caught.value, TemplateRefusedError)


def test_the_clock_stands_still() -> None:
    template = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}", name="t", now=NOW)
    assert template.reads_clock
    assert template.render({}) == "2026-01-02"


def test_text_equals_transformers(shared_data: Path) -> None:
    """On every real template that takes plain text; one call with tools among them."""
    talk: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi ☂ <b>&amp;"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "  And?\n"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"a": [1, None]}}}]
    tokenizer = dressed(
        templates(shared_data), shared_data / "models" / "stories260k" / "tokenizer.json"
    )
    compared = 0
    for path in templates(shared_data):
        source = path.read_text(encoding="utf-8")
        if "strftime_now" in source:
            continue
        ours = ChatTemplate(source, name=path.name, now=NOW)
        for given in (None, tools):
            variables = {
                "messages": talk,
                "tools": given,
                "documents": None,
                "add_generation_prompt": True,
                **tokenizer.special_tokens_map,
            }
            try:
                theirs = tokenizer.apply_chat_template(
                    talk,
                    tools=given,
                    chat_template=source,
                    add_generation_prompt=True,
                    tokenize=False,
                )
            except Exception:  # a template that cannot take this conversation at all
                with pytest.raises(ValueError, match=r"."):
                    ours.render(variables)
                continue
            assert ours.render(variables) == theirs, path.name
            compared += 1
    assert compared > 150
