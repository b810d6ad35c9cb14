"""Every key of a run's description: what it accepts, and which one a mistyped key meant."""

from __future__ import annotations

import difflib
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pennyweight.config.schema import RunConfig, Source

__all__ = ["GROUPS", "KEYS", "accepts", "names_in", "nearest_key", "value_at"]

# What other tools call our settings, so that a habit is answered with our name for it.
_ELSEWHERE = {
    "alpha": "adapter.lora_alpha",
    "base_model": "base.model",
    "bf16": "base.dtype",
    "cutoff_len": "data.max_length",
    "dataset": "data.train",
    "datasets": "data.train",
    "dropout": "adapter.lora_dropout",
    "eval_dataset": "data.eval",
    "fp16": "base.dtype",
    "lr": "train.learning_rate",
    "load_in_4bit": "base.quantization",
    "load_in_8bit": "base.quantization",
    "lora_r": "adapter.r",
    "lora_rank": "adapter.r",
    "lora_target": "adapter.target_modules",
    "lora_target_modules": "adapter.target_modules",
    "max_seq_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "micro_batch_size": "train.batch_size",
    "model_id": "base.model",
    "model_name_or_path": "base.model",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "output": "output_dir",
    "per_device_train_batch_size": "train.batch_size",
    "rank": "adapter.r",
    "sample_packing": "data.packing",
    "scheduler": "train.lr_scheduler_type",
    "sequence_len": "data.max_length",
    "steps": "train.max_steps",
    "target": "adapter.target_modules",
    "total_steps": "train.max_steps",
    "use_double_quant": "base.double_quantization",
    "val_set_size": "data.eval_fraction",
}


def _walk(model: type[BaseModel], prefix: str) -> dict[str, FieldInfo]:
    keys: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys |= _walk(field.annotation, f"{prefix}{name}.")
        else:
            keys[prefix + name] = field
    return keys


KEYS: dict[str, FieldInfo] = _walk(RunConfig, "")
"""`train.learning_rate` and its like, each with its field."""

GROUPS: dict[str, FieldInfo] = {
    name: field for name, field in RunConfig.model_fields.items() if name not in KEYS
}
"""`train` and its like."""


def value_at(run: RunConfig, key: str) -> Any:
    """The value of a key of KEYS."""
    value: Any = run
    for name in key.split("."):
        value = getattr(value, name)
    return value


def names_in(group: str) -> list[str]:
    """The settings of a group, `""` for the top: `["method", "learning_rate", ...]`."""
    if not group:
        return list(RunConfig.model_fields)
    if group.startswith(("data.train", "data.eval")):
        return list(Source.model_fields)
    return [key.removeprefix(group + ".") for key in KEYS if key.startswith(group + ".")]


def nearest_key(name: str, group: str = "") -> str | None:
    """The key that `name`, written inside `group`, most likely meant.

    Looked for in the group, then under the same name elsewhere, then among the names other tools
    use, then among all that is spelt alike.
    """
    inside = f"{group}." if group else ""
    last = name.rsplit(".", 1)[-1]
    if close := difflib.get_close_matches(last, names_in(group), 1, cutoff=0.7):
        return inside + close[0]
    spelt = {key.rsplit(".", 1)[-1]: key for key in reversed(KEYS)}
    known = {**_ELSEWHERE, **spelt}
    if close := difflib.get_close_matches(last.lower(), known, 1, cutoff=0.75):
        return known[close[0]]
    if close := difflib.get_close_matches(name, [*KEYS, *GROUPS], 1, cutoff=0.7):
        return close[0]
    return None


def accepts(field: FieldInfo) -> str:
    """What a field takes, in words: `a number above 0 and below 10, or null`."""
    return _phrase(field.annotation, list(field.metadata))


def _phrase(annotation: Any, bounds: list[Any]) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _phrase(parts[0], [*_unwrapped(parts[1:]), *bounds])
    if origin in (Union, types.UnionType):
        phrases = dict.fromkeys(_phrase(part, bounds) for part in parts)
        return ", or ".join(phrases)
    if origin is Literal:
        choices = ", ".join(str(part) for part in parts)
        return choices if len(parts) == 1 else f"one of {choices}"
    if annotation is Any:
        return "any value"
    if origin is tuple:
        return f"a list, each {_phrase(parts[0], [])}"
    if origin is dict:
        return f"a table of names, each with {_phrase(parts[1], [])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a table of {', '.join(annotation.model_fields)}"
    if annotation in (int, float):
        return ("a whole number" if annotation is int else "a number") + _range(bounds)
    return {bool: "true or false", str: "text"}.get(annotation, "null")


def _unwrapped(metadata: tuple[Any, ...]) -> list[Any]:
    return [bound for each in metadata for bound in getattr(each, "metadata", None) or [each]]


def _range(bounds: list[Any]) -> str:
    words = []
    for bound in bounds:
        match bound:
            case Ge(ge=least):
                words.append(f"of {least} or more")
            case Gt(gt=least):
                words.append(f"above {least}")
            case Le(le=most):
                words.append(f"at most {most}")
            case Lt(lt=most):
                words.append(f"below {most}")
            case MinLen():
                pass
    return " " + " and ".join(words) if words else ""
