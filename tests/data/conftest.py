"""Tokenizers with real vocabularies, and templates dressed for them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

_MARKS = re.compile(
    r"<[|\uff5c][^<>\s'\"{}]{1,40}[|\uff5c]>|<[a-z_]{1,20}\|>|<\|[a-z_]{1,20}>|</?s>|\[/?[A-Z_]{3,30}\]"
    r"|\[\|?[a-z]{3,12}\|?\]|</?(?:start|end|think|tool)[a-z_]*>"
)


def dressed(sources: list[Path], tokenizer_file: Path) -> Any:
    """A real tokenizer that knows the marks these templates print, as the models' own ones would.

    Set its `chat_template` to one of them.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(tokenizer_file)), bos_token="<s>", eos_token="</s>"
    )
    texts = [path.read_text(encoding="utf-8") for path in sources]
    marks = {mark for text in texts for mark in _MARKS.findall(text)} - {"<s>", "</s>"}
    tokenizer.add_tokens(sorted(marks), special_tokens=True)
    tokenizer.chat_template = texts[0]
    return tokenizer


def templates(shared_data: Path) -> list[Path]:
    return sorted((shared_data / "templates").glob("*/*.jinja"))


@pytest.fixture(scope="session")
def stories_tokenizer(shared_data: Path) -> Any:
    return stories(shared_data)


@pytest.fixture(scope="session")
def gpt2_tokenizer(shared_data: Path) -> Any:
    return gpt2(shared_data)


def stories(shared_data: Path) -> Any:
    """SentencePiece's way: a space before the first word, BOS added by itself."""
    folder = shared_data / "models" / "stories260k"
    return PreTrainedTokenizerFast.from_pretrained(folder)


def gpt2(shared_data: Path) -> Any:
    """GPT-2's: no chat template, pad and EOS and BOS are one token, nothing added by itself."""
    raw = Tokenizer.from_file(str(shared_data / "tokenizers" / "gpt2" / "tokenizer.json"))
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=end, eos_token=end, pad_token=end
    )
