"""Expressions over module names: `re`'s answer, in a time that no expression can draw out."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.errors import AdapterError
from pennyweight.patterns import Pattern

ATOMS = (
    "a", "b", ".", r"\.", r"\d", r"\w", r"\W", "[ab]", "[^a]", "[a-c]", "[]a]", r"[\d.-]",
    "(a|b)", "(?:a|)", "(a*)", "(?=a)", "(?!b)", "(a|ab)", "(b+)?", "x|", r"\b", "^", "$", "",
)  # fmt: skip
REPEATS = ("", "*", "+", "?", "{2}", "{1,}", "{0,2}", "{,2}", "*?", "+?", "??", "{a}", "{")

atoms = st.sampled_from(ATOMS).flatmap(
    lambda atom: (
        st.just(atom)
        if atom.endswith(("?", "|")) or atom in ("", "^", "$", r"\b")
        else st.sampled_from(REPEATS).map(lambda repeat: atom + repeat)
    )
)


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(atoms, max_size=4),
    outer=st.sampled_from(REPEATS),
    name=st.text("ab.1x", max_size=8),
)
def test_the_answer_is_that_of_re(parts: list[str], outer: str, name: str) -> None:
    for text in ("".join(parts), f"({''.join(parts)}){outer}"):
        try:
            expected = re.fullmatch(text, name) is not None
        except re.error:
            with pytest.raises(AdapterError):
                Pattern(text)
        else:
            assert Pattern(text).fullmatch(name) == expected


MODULES = [f"model.layers.{i}.{part}" for i in range(40) for part in ("self_attn.q_proj", "mlp.up")]


@pytest.mark.parametrize(
    "text",
    [
        r".*\.(q|k|v)_proj",
        r"model\.layers\.(1[0-9]|[2-9])\.mlp\..*",
        r"^(?!.*vision).*(?:q_proj|v_proj)$",
        r"(?:.*?(?:language|text|model).*?(?:self_attn|mlp).*?(?:q_proj|up).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.(?:up))",
    ],
)
def test_what_people_write(text: str) -> None:
    expected = [name for name in MODULES if re.fullmatch(text, name)]
    wanted = Pattern(text)
    assert expected
    assert [name for name in MODULES if wanted.fullmatch(name)] == expected


@pytest.mark.parametrize(
    "text",
    [
        "(a+)+b",
        "((a*)*)*b",
        "a?" * 30 + "a" * 30,
        "(.*)*(.*)*(.*)*x",
        "(a|a|a|a)*" * 300 + "b",
        "(.*.*.*.*.*.*)*" * 100 + "b",
        "(a{1,100000000}){1,100000000}b",
        "a{999999999}",
        "(" * 5000,
        "a" * 9000,
        "(?<=a)b",
        r"(a)\1",
        "(?i)a",
        "[",
        "a{99999999999999}",
    ],
)
def test_no_expression_takes_long(text: str) -> None:
    began = time.thread_time()
    try:
        wanted = Pattern(text)
        for name in ["a" * 60, *MODULES]:
            wanted.fullmatch(name)
    except AdapterError as fault:
        assert len(str(fault)) < 200  # noqa: PT017 - some are matched in time
    assert time.thread_time() - began < 1
