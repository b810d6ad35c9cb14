"""Every arm is an ordinary run, apart from what it is compared in."""

from __future__ import annotations

from pathlib import Path

import pytest

from pennyweight.compare.arms import Arm, arms_of, differences, refuse_useless, run_of
from pennyweight.config import CompareConfig, RunConfig, load_run, to_yaml
from pennyweight.errors import ConfigError


def described(**settings: object) -> RunConfig:
    return RunConfig.model_validate({"train": {"max_steps": 40}, **settings})


def run(config: RunConfig, arm: Arm, **told: object) -> RunConfig:
    given = {"seed": 1, "learning_rate": 1e-3, "output_dir": "out", **told}
    return run_of(config, arm, **given)  # type: ignore[arg-type]


def test_arms_are_methods_by_rank() -> None:
    config = described(compare={"ranks": [16, 4, 16], "arms": ["qlora", "full"]})
    assert [arm.name for arm in arms_of(config)] == ["full", "qlora-r4", "qlora-r16"]
    assert [arm.label for arm in arms_of(described(adapter={"r": 8}))] == [
        "full",
        "LoRA r 8",
        "QLoRA r 8",
    ]


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_any_description_gives_all_arms_and_each_can_be_written_as_yaml(
    method: str, tmp_path: Path
) -> None:
    config = described(train={"method": method, "epochs": 2, "early_stopping_patience": 3})
    held = {}
    for arm in arms_of(config):
        made = run(config, arm)
        held[arm.method] = (made.base.quantization, made.base.double_quantization)
        path = tmp_path / f"{arm.name}.yaml"
        path.write_text(to_yaml(made, commented=False))
        assert differences(made, load_run(path).config) == []
        assert load_run(path).config.compare == CompareConfig()
    assert held == {"full": ("none", False), "lora": ("none", False), "qlora": ("nf4", True)}


def test_the_last_step_is_measured_not_the_best_on_the_rows_that_judge() -> None:
    made = run(described(train={"max_steps": 40, "eval_steps": 5}), Arm("lora", 16))
    assert made.train.eval_steps == made.train.max_steps
    assert made.train.early_stopping_patience is None


def test_seeds_train_on_the_same_rows() -> None:
    config = described(seed=7)
    made = [run(config, Arm("lora", 16), seed=seed) for seed in (0, 1)]
    assert [each.seed for each in made] == [0, 1]
    assert {each.data.split_seed for each in made} == {7}


def test_alpha_goes_along_with_the_rank_but_for_rslora() -> None:
    plain = run(described(adapter={"r": 16, "lora_alpha": 32}), Arm("lora", 4)).adapter
    assert (plain.r, plain.lora_alpha) == (4, 8)
    stable = described(adapter={"r": 16, "lora_alpha": 32, "use_rslora": True})
    assert run(stable, Arm("lora", 4)).adapter.lora_alpha == 32


def test_a_rate_is_given_to_an_arm_or_to_its_method() -> None:
    rates = {"lora": 1e-3, "lora-r8": 2e-3}
    found = [Arm("lora", 8), Arm("lora", 4), Arm("full", None)]
    assert [arm.given_rate(rates) for arm in found] == [2e-3, 1e-3, None]


def test_what_may_differ_and_what_may_not() -> None:
    one = run(described(), Arm("lora", 16))
    assert (
        differences(
            one,
            run(
                described(train={"max_steps": 40, "save_steps": 3}), Arm("lora", 16), output_dir="b"
            ),
        )
        == []
    )
    changed = run(described(train={"max_steps": 41}), Arm("lora", 16), learning_rate=2e-3)
    assert differences(one, changed) == [
        "train.eval_steps: 40 then, 41 now",
        "train.learning_rate: 0.001 then, 0.002 now",
        "train.max_steps: 40 then, 41 now",
    ]


def test_without_held_out_rows_there_is_nothing_to_judge_by() -> None:
    with pytest.raises(ConfigError, match="judged on held-out rows"):
        refuse_useless(described(data={"eval_fraction": 0}))
