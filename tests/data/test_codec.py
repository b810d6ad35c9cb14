"""Where characters went: found from added tokens alone, as the tokenizer's own offsets have it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pennyweight.data.codec import Codec, Tokens

WORDS = ["<|a|>", "<|a|>b", "<|", "|>", "a", "b", " ", "\n", "é", "<", "xyz"]


def tokenizer_of(*added: AddedToken) -> Any:
    vocabulary = {word: i for i, word in enumerate(["<unk>", "a", "b", "xyz", "<", "|", ">"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    backend.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def places(codec: Codec, text: str, ends: int) -> list[Any]:
    (fast,) = codec.encode_batch([text])
    encoding = codec.encode_with_offsets(text)
    slow = Tokens(codec, text, encoding.ids, encoding)
    assert fast.ids.tolist() == slow.ids.tolist()
    return [
        (each.seam(chars), each.ending(chars)) for chars in range(1, ends) for each in (fast, slow)
    ]


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=12))
@pytest.mark.parametrize("normalized", [False, True])
def test_marks_answer_as_offsets_do(words: list[str], normalized: bool) -> None:
    """Added tokens within each other, unknown text, dropped spaces; every place asked for."""
    added = [AddedToken(t, normalized=normalized) for t in ("<|a|>", "<|a|>b", "\n")]
    codec, text = Codec(tokenizer_of(*added)), "".join(words)
    found = places(codec, text, len(text) + 1)
    assert found[::2] == found[1::2]


def test_real_templates_need_no_offsets(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = Codec(tiny_tokenizer)
    marked = codec.special_texts[-1]
    text = f"one{marked}two{marked}three{marked}"
    monkeypatch.setattr(Codec, "encode_with_offsets", None)
    (tokens,) = codec.encode_batch([text])
    assert tokens.ending(len(text)) == len(tokens.ids) - 1
    assert tokens._last_added(len(text) - 1) == (len(tokens.ids) - 1, len(text) - len(marked))


def test_tokens_found_in_another_way_take_offsets() -> None:
    for words in ({"lstrip": True}, {"rstrip": True}, {"single_word": True}):
        codec = Codec(tokenizer_of(AddedToken("<|a|>", **words)))
        (tokens,) = codec.encode_batch(["xyz <|a|> a"])
        assert codec.marks("xyz <|a|> a", tokens.ids) is None
        assert tokens.seam(11) is not None
