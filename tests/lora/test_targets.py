"""What a target specification means, and what it says when it means nothing."""

from __future__ import annotations

import pytest
from torch import nn

from pennyweight.config import BaseConfig, LoraConfig
from pennyweight.errors import AdapterError
from pennyweight.lora.targets import alpha_of, linear_modules, rank_of, target_names, targets
from pennyweight.model import load_base

GPT2 = [
    f"transformer.h.{i}.{part}"
    for i in (0, 1)
    for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
]
EVERY = [*GPT2, "lm_head"]


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        ("all-linear", 8),
        ("attention", 4),
        ("mlp", 4),
        (["c_proj"], 4),
        (["attn.c_proj"], 2),
        ([".*" and "c_attn", "lm_head"], 3),
        (r".*\.0\..*", 4),
        ("lm_head", 1),
    ],
)
def test_specifications(spec, count):
    assert len(targets(EVERY, spec, head="lm_head")) == count


def test_a_target_that_matches_nothing_names_the_nearest():
    with pytest.raises(AdapterError, match="did you mean c_attn"):
        targets(EVERY, ["c_atn", "c_proj"], head="lm_head")
    with pytest.raises(AdapterError, match="matches no linear module"):
        targets(EVERY, "q_proj", head="lm_head")
    with pytest.raises(AdapterError, match="not a regular expression"):
        targets(EVERY, "(", head="lm_head")
    with pytest.raises(AdapterError) as both:
        targets(EVERY, ["c_atn", "fc"], head="lm_head")
    assert len(str(both.value).splitlines()) == 2


def test_short_names_are_used_only_where_they_mean_the_same():
    assert target_names([n for n in EVERY if n.endswith("c_proj")], EVERY) == ["c_proj"]
    attention = [n for n in EVERY if ".attn." in n]
    assert target_names(attention, EVERY) == sorted(attention)


def test_patterns_give_ranks_and_alphas():
    config = LoraConfig(
        r=8, lora_alpha=16, rank_pattern={"c_proj": 4, r"h\.1\.mlp.*": 2}, alpha_pattern={"c_fc": 1}
    )
    assert rank_of("transformer.h.0.attn.c_attn", config) == 8
    assert rank_of("transformer.h.1.mlp.c_proj", config) == 4
    assert rank_of("transformer.h.1.mlp.c_fc", config) == 2
    assert alpha_of("transformer.h.1.mlp.c_fc", config) == 1
    assert alpha_of("transformer.h.1.mlp.c_proj", config) == 16


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_linear_modules_of_real_families(tiny_model_folder, quantization):
    for family, inside in (("llama", 14), ("phi3", 8), ("gpt2", 8)):
        base = load_base(
            BaseConfig(
                model=str(tiny_model_folder(family)), quantization=quantization, device="cpu"
            )
        )
        assert len(targets(linear_modules(base.module), "all-linear", head="lm_head")) == inside
        assert isinstance(base.module.lm_head, nn.Linear)
