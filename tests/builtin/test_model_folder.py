"""The shipped model: small, complete, and with a chat template that renders stably."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pennyweight.builtin import model_folder

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "def f(a, b=1):\n    return a"},
    {"role": "assistant", "content": '{"x": ["a_b"]}'},
    {"role": "user", "content": "And 'self.data'?"},
    {"role": "assistant", "content": "Yes — naïvely."},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(model_folder())


def _render(tokenizer: Any, messages: list[dict[str, str]], prompt: bool = False) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_the_folder_is_whole_and_small() -> None:
    files = {path.name: path.stat().st_size for path in model_folder().iterdir()}
    assert set(files) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) <= 16 * 2**20


def test_one_bos_at_the_start_from_the_template_and_none_from_the_tokenizer(tokenizer: Any) -> None:
    ids = _render(tokenizer, CHAT)
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(tokenizer.eos_token_id) == len(CHAT)
    assert tokenizer("f")["input_ids"][:1] != [tokenizer.bos_token_id]


def test_rendering_some_messages_is_a_prefix_of_rendering_more(tokenizer: Any) -> None:
    whole = _render(tokenizer, CHAT)
    for count in range(1, len(CHAT) + 1):
        part = _render(tokenizer, CHAT[:count])
        assert whole[: len(part)] == part
    prompt = _render(tokenizer, CHAT[:2], prompt=True)
    assert whole[: len(prompt)] == prompt


def test_special_tokens_are_four_different_ones(tokenizer: Any) -> None:
    names = ["<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 3]
    assert [tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token] == [
        names[0],
        names[1],
        names[3],
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n\t x",
        "def f(a_b, *, c=' d'):\n    return __name__",
        "naïve — 日本語 🎈",
        "a\r\nb\x00",
    ],
)
def test_text_survives_encoding_and_decoding(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_an_identifier_is_the_same_tokens_wherever_it_stands(tokenizer: Any) -> None:
    name = tokenizer("follow_symlinks")["input_ids"]
    for text in (" follow_symlinks", '"follow_symlinks"', "(follow_symlinks=", "\nfollow_symlinks"):
        ids = tokenizer(text)["input_ids"]
        assert any(ids[i : i + len(name)] == name for i in range(len(ids)))


def test_the_model_loads_and_knows_python(tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder())
    assert model.dtype == torch.bfloat16
    assert model.config.tie_word_embeddings
    linear = [m for n, m in model.named_modules() if n.endswith("_proj")]
    assert all(side % 64 == 0 for m in linear for side in m.weight.shape)
    ids = _render(tokenizer, CHAT[1:2])[:1] + tokenizer("import os\nimport sys\n")["input_ids"]
    with torch.no_grad():
        loss = model.float()(torch.tensor([ids]), labels=torch.tensor([ids])).loss
    assert loss < 5.0  # a uniform guess over the vocabulary is 8.3
