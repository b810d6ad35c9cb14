"""What a client may ask of a fine-tuning job, in OpenAI's words and a few of ours.

`hyperparameters` stand at the top (as they used to) or inside `method`. `lora`, `train` and `data`
hold settings of a run's description by their own names; clients send them as `extra_body`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pennyweight.config import DataConfig, LoraConfig, TrainConfig
from pennyweight.data.limits import LIMITS
from pennyweight.data.read import nearest
from pennyweight.errors import AdapterError
from pennyweight.patterns import pattern
from pennyweight.serve.refusals import invalid

__all__ = ["PRIORITIES", "CreateJob", "Hyperparameters", "settings_of"]

PRIORITIES: dict[str, float] = {"low": 0.5, "normal": 1.0, "high": 2.0}
# Settings of a run that a client may choose; the others are the operator's.
OPEN = {
    "lora": tuple(LoraConfig.model_fields),
    "train": [
        "learning_rate",
        "max_steps",
        "gradient_accumulation_steps",
        "lr_scheduler_type",
        "warmup_steps",
        "warmup_ratio",
        "min_lr_ratio",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "max_grad_norm",
        "eval_steps",
        "save_steps",
        "early_stopping_patience",
    ],
    "data": [
        *("max_length", "overlong", "packing", "train_on", "system", "eval_fraction", "split_seed"),
        *LIMITS,
    ],
}
_MODELS: dict[str, type[BaseModel]] = {"lora": LoraConfig, "train": TrainConfig, "data": DataConfig}

Auto = Literal["auto"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Hyperparameters(_Frozen):
    """Each a number, or auto."""

    n_epochs: Auto | Annotated[int, Field(ge=1, le=1000)] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=4096)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=1e4)] = "auto"


class Supervised(_Frozen):
    hyperparameters: Hyperparameters | None = None


class Method(BaseModel):
    """Supervised is done here; the others are refused."""

    model_config = ConfigDict(frozen=True, extra="allow")
    type: Annotated[str, Field(max_length=64)]
    supervised: Supervised | None = None


Metadata = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]


class CreateJob(_Frozen):
    """A fine-tuning job."""

    model: Annotated[str, Field(min_length=1, max_length=300)]
    training_file: Annotated[str, Field(min_length=1, max_length=64)]
    validation_file: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    suffix: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    metadata: Metadata | None = None
    integrations: Annotated[list[dict[str, Any]], Field(max_length=16)] | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    priority: Literal["low", "normal", "high"] = "normal"
    lora: dict[str, Any] | None = None
    train: dict[str, Any] | None = None
    data: dict[str, Any] | None = None

    def settled(self) -> Hyperparameters:
        """The hyperparameters of either place. Refused where a method is not done here."""
        if self.integrations:
            raise invalid(
                "integrations: nothing is sent elsewhere from here; leave it out",
                param="integrations",
                code="unsupported_parameter",
            )
        if self.method is None:
            return self.hyperparameters or Hyperparameters()
        if self.method.type != "supervised":
            raise invalid(
                f"method.type {self.method.type[:40]!r}: only supervised fine-tuning is done here",
                param="method.type",
                code="unsupported_method",
            )
        inside = self.method.supervised and self.method.supervised.hyperparameters
        if inside and self.hyperparameters and inside != self.hyperparameters:
            raise invalid(
                "hyperparameters: given twice and not the same; give them inside method alone",
                param="hyperparameters",
            )
        return inside or self.hyperparameters or Hyperparameters()


def settings_of(asked: CreateJob, *, max_rank: int) -> dict[str, dict[str, Any]]:
    """`lora`, `train` and `data` as settings of a run. Refused names the key that cannot be."""
    given: dict[str, dict[str, Any]] = {}
    for group, model in _MODELS.items():
        values: Mapping[str, Any] = getattr(asked, group) or {}
        for key in values:
            if key not in OPEN[group]:
                raise invalid(
                    f"{group}.{key[:60]}: not a setting a job may choose{nearest(key, list(OPEN[group]))}",
                    param=f"{group}.{key[:60]}",
                    code="unknown_parameter",
                )
        try:
            # A list is read as it comes from JSON.
            model.model_validate({k: _tuples(v) for k, v in values.items()})
        except ValidationError as error:
            fault = error.errors(include_url=False, include_input=False)[0]
            where = ".".join([group, *(str(part) for part in fault["loc"][:1])])
            raise invalid(f"{where}: {fault['msg']}"[:300], param=where) from None
        given[group] = {k: _tuples(v) for k, v in values.items()}
    _require_modest(given["lora"], max_rank)
    return given


def _require_modest(lora: Mapping[str, Any], max_rank: int) -> None:
    ranks = [lora.get("r", 1), *lora.get("rank_pattern", {}).values()]
    if max(ranks) > max_rank:
        raise invalid(f"lora.r: at most {max_rank} here", param="lora.r")
    targets = lora.get("target_modules")
    if isinstance(targets, str):
        try:
            pattern(targets)
        except AdapterError as fault:
            raise invalid(
                f"lora.target_modules: {fault}"[:300], param="lora.target_modules"
            ) from None


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
