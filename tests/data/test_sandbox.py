from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from pennyweight.data.sandbox import DEADLINE_S, ChatTemplate, TemplateRefusedError
from tests.data.conftest import dressed, templates

NOW = datetime(2026, 1, 2, 3, 4)
DOUBLING = "{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"

HOSTILE = {
    "loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "output": "{% for i in range(99999) %}{% for j in range(99999) %}xxxx{% endfor %}{% endfor %}",
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
    "join": "{{ range(99999) | join('a' * 1000000) }}",
    "set block": "{% for i in range(99999) %}{% set x %}{{ 'a' * 1000000 }}{% endset %}{% endfor %}",
    "list of ranges": "{% for i in range(99999) %}{% set x = range(99999) | list %}{% endfor %}",
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
