"""Law 8: a mixed-adapter generation = each row alone; greedy = transformers' greedy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from pennyweight.config import BaseConfig, LoraConfig
from pennyweight.generate import Request, generate
from pennyweight.model import BaseModel, load_base

FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "stablelm",
    "stablelm_12b",
    "gemma2",
    "gemma3",
    "gpt2",
)
NEW_TOKENS = 16


def tiny_base(folder: Path) -> BaseModel:
    return load_base(BaseConfig(model=str(folder), quantization="none", device="cpu"))


def prompts(lengths: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(torch.randint(5, 288, (length,)).tolist()) for length in lengths]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_greedy_in_transformers(
    family: str, tiny_model_folder: Callable[[str], Path]
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model_folder(family)
    base = tiny_base(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    # Shorter and longer than the families' windows of 8 tokens; more rows than go at once.
    asked = prompts((3, 30, 1, 12, 7))
    found = generate(base, [Request(ids, max_new_tokens=NEW_TOKENS) for ids in asked], batch_size=3)
    for ids, completion in zip(asked, found, strict=True):
        prompt = torch.tensor([ids])
        expected = reference.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=list(base.stop_ids),
            pad_token_id=0,
        )[0, len(ids) :].tolist()
        if completion.stop_reason == "stop":
            assert expected.pop() in base.stop_ids
        assert list(completion.ids) == expected


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_mixed_adapters_are_each_row_alone(
    family: str, tiny_model_folder: Callable[[str], Path]
) -> None:
    from pennyweight.lora import attach

    base = tiny_base(tiny_model_folder(family))
    for seed, name in enumerate(("sql", "poems")):
        attach(base, LoraConfig(r=4), name=name, seed=seed)
    for name, parameter in base.module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapters = ("sql", None, "poems", "sql", None, "poems")
    requests = [
        Request(
            ids, max_new_tokens=12, adapter=name, temperature=temperature, seed=seed, stop_ids=()
        )
        for seed, (ids, name, temperature) in enumerate(
            zip(
                prompts((9, 4, 17, 3, 11, 6)), adapters, (0.0, 0.0, 0.0, 0.8, 0.8, 0.8), strict=True
            )
        )
    ]
    together = generate(base, requests, batch_size=4)
    alone = [generate(base, [request])[0] for request in requests]
    for row, single in zip(together, alone, strict=True):
        assert row.ids == single.ids
        assert row.logprobs == pytest.approx(single.logprobs, abs=1e-4)
    bare = generate(base, [Request(r.prompt_ids, max_new_tokens=12, stop_ids=()) for r in requests])
    assert bare[0].ids != together[0].ids, "the adapter must have been read"
    assert bare[1].ids == together[1].ids
