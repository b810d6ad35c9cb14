"""The arms of a comparison, and the ordinary run that each of them is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pennyweight.config import CompareConfig, LoraConfig, Method, RunConfig, resolve
from pennyweight.errors import ConfigError
from pennyweight.finetune.shaping import shaping

__all__ = ["Arm", "arms_of", "differences", "refuse_useless", "run_of", "unquantized"]

NEVER = 10**9


@dataclass(frozen=True, slots=True)
class Arm:
    """One method, and for an adapter its rank."""

    method: Method
    rank: int | None

    @property
    def name(self) -> str:
        """`full`, `lora-r16`: what its folder is called."""
        return self.method if self.rank is None else f"{self.method}-r{self.rank}"

    @property
    def label(self) -> str:
        """`full`, `LoRA r 16`: what people read."""
        if self.rank is None:
            return "full"
        return f"{'QLoRA' if self.method == 'qlora' else 'LoRA'} r {self.rank}"

    def given_rate(self, rates: Mapping[str, float]) -> float | None:
        """The learning rate given for this arm, or for its method."""
        return rates.get(self.name, rates.get(self.method))


def arms_of(config: RunConfig) -> tuple[Arm, ...]:
    """Full first, then the adapters by rank; what is named twice is one arm."""
    ranks = sorted(set(config.compare.ranks or (config.adapter.r,)))
    methods = dict.fromkeys(config.compare.arms)
    adapters = [Arm(m, r) for m in ("lora", "qlora") for r in ranks if m in methods]
    return (*([Arm("full", None)] if "full" in methods else []), *adapters)


def run_of(
    config: RunConfig, arm: Arm, *, seed: int, learning_rate: float | None, output_dir: str
) -> RunConfig:
    """The ordinary run that an arm with a seed is.

    Its weights are those after the last step: to keep the best on the rows that judge it would be
    to tune on them, and would end arms after different numbers of tokens.
    """
    train = {
        "method": arm.method,
        "learning_rate": learning_rate,
        "eval_steps": config.train.max_steps or NEVER,
        "save_steps": config.train.save_steps or max(1, (config.train.max_steps or 400) // 4),
        "early_stopping_patience": None,
    }
    split_seed = config.seed if config.data.split_seed is None else config.data.split_seed
    return resolve(
        config.model_copy(
            update={
                "base": config.base.model_copy(update=_storage(config, arm)),
                "adapter": _adapter(config, arm),
                "data": config.data.model_copy(update={"split_seed": split_seed}),
                "train": config.train.model_copy(update=train),
                "compare": CompareConfig(),
                "output_dir": output_dir,
                "seed": seed,
            }
        )
    )


def unquantized(config: RunConfig) -> RunConfig:
    """The same description with its base as it is stored, for measuring the base itself."""
    return run_of(config, Arm("lora", None), seed=config.seed, learning_rate=None, output_dir=".")


def differences(then: RunConfig, now: RunConfig) -> list[str]:
    """`train.max_steps: 400 then, 200 now` for each setting that shapes a run and has changed."""
    old, new = shaping(then), shaping(now)
    return [
        f"{key}: {old.get(key)} then, {new.get(key)} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _storage(config: RunConfig, arm: Arm) -> dict[str, Any]:
    """How the base is held. A description of method lora or full names no storage for QLoRA."""
    if arm.method != "qlora":
        return {"quantization": "none", "double_quantization": False}
    if config.base.quantization != "none":
        return {}
    return {"quantization": "nf4", "double_quantization": True}


def _adapter(config: RunConfig, arm: Arm) -> LoraConfig:
    """The adapter at this rank. alpha goes along with r, so that alpha / r is the same in every arm;
    with rsLoRA alpha stays, for alpha / sqrt(r) is what it is there for."""
    if arm.method == "full":
        return LoraConfig()
    own = config.adapter
    if arm.rank is None or arm.rank == own.r:
        return own
    alpha = own.lora_alpha if own.use_rslora else own.lora_alpha * arm.rank / own.r
    return own.model_copy(update={"r": arm.rank, "lora_alpha": alpha})


def refuse_useless(config: RunConfig) -> None:
    """ConfigError for a comparison that could judge nothing."""
    if config.data.eval is None and config.data.eval_fraction == 0:
        raise ConfigError(
            "data.eval_fraction: a comparison is judged on held-out rows; give data.eval, or a "
            "data.eval_fraction above 0"
        )
