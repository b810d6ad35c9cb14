"""Speech: whole characters, no stop text, and the same text however it comes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pennyweight.data.chat import Renderer
from pennyweight.serve.speech import Speech


@pytest.fixture(scope="module")
def renderer(tiny_tokenizer: Any) -> Renderer:
    return Renderer(tiny_tokenizer)


texts = st.text(alphabet="the answer ÄÖ€😀\n", max_size=40)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=texts, stops=st.lists(st.text("the a😀\n", min_size=1, max_size=4), max_size=3))
@example(text=" aa", stops=["a", " aa"])  # the shorter is whole first
@example(text=" a", stops=["a", " a"])  # both at once: the longer
def test_what_is_told_is_the_text_up_to_the_first_stop(
    renderer: Renderer, text: str, stops: list[str]
) -> None:
    ids = renderer._codec.ids(text)
    speech, told = Speech(renderer, stops), []
    for token in ids:
        if speech.stopped:
            break
        told.append(speech.add([token]))
        assert "\N{REPLACEMENT CHARACTER}" not in told[-1]
    told.append(speech.end())
    ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    assert "".join(told) == (text[: min(ends)[1]] if ends else text)
    assert speech.stopped == bool(ends)


def test_bytes_that_are_no_character_are_told_at_the_end(renderer: Renderer) -> None:
    (first, *_) = renderer._codec.ids("😀")
    speech = Speech(renderer)
    assert speech.add([first]) == ""
    assert speech.end() == "\N{REPLACEMENT CHARACTER}"
