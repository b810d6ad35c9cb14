"""A run's description as text for people and editors: one key explained, a schema, a commented YAML."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Container, Mapping
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from pennyweight.config.document import read_document
from pennyweight.config.keys import GROUPS, KEYS, accepts, names_in, nearest_key, value_at
from pennyweight.config.rules import RULES, broken_rules, resolve
from pennyweight.config.schema import RunConfig, Source
from pennyweight.config.sources import SOURCES
from pennyweight.errors import ConfigError
from pennyweight.files import disk_faults, whole

__all__ = ["explain", "json_schema", "starter", "to_yaml", "write_schema"]

_FIRST_GRID = {"adapter.r": [8, 32], "train.learning_rate": [1e-4, 3e-4]}
# What a first run is likely to change; `to_yaml` writes these whatever their value.
_STARTERS = (
    "base.model",
    "base.quantization",
    "adapter.r",
    "adapter.lora_alpha",
    "adapter.lora_dropout",
    "adapter.target_modules",
    "data.train",
    "data.eval_fraction",
    "data.format",
    "data.max_length",
    "data.packing",
    "data.train_on",
    "train.method",
    "train.learning_rate",
    "train.epochs",
    "train.batch_size",
    "train.gradient_accumulation_steps",
    "train.lr_scheduler_type",
    "output_dir",
    "seed",
)


def explain(key: str) -> str:
    """What a setting does, takes, defaults to and needs; for a group, its settings.

    Raises ConfigError naming the nearest key.
    """
    if not key:
        return (
            "\n".join(f"{name:12} {GROUPS[name].description}" for name in GROUPS)
            + "\n"
            + ("\n".join(f"{name:12} {KEYS[name].description}" for name in ("output_dir", "seed")))
        )
    if key in GROUPS:
        lines = [f"{key}: {GROUPS[key].description}", ""]
        return "\n".join(lines + [_line(f"{key}.{name}") for name in names_in(key)])
    of_source = re.fullmatch(r"(data\.(?:train|eval))(?:\[\])?\.(\w+)", key)
    if of_source and of_source[2] in Source.model_fields:
        named = f"{of_source[1]}[].{of_source[2]}"
        return "\n".join(_explained(named, Source.model_fields[of_source[2]]))
    if key not in KEYS:
        whole = [known for known in KEYS if known.rsplit(".", 1)[-1] == key]
        if len(whole) != 1:
            meant = whole[0] if whole else nearest_key(key)
            mend = f"did you mean {meant}?" if meant else f"groups: {', '.join(names_in(''))}"
            raise ConfigError(f"{key}: no such setting; {mend}")
        key = whole[0]
    return "\n".join(_explained(key, KEYS[key]))


def _explained(key: str, field: FieldInfo) -> list[str]:
    lines = [
        key,
        textwrap.fill(field.description or "", 96, initial_indent="  ", subsequent_indent="  "),
        f"  accepts  {accepts(field)}",
        f"  default  {written(field.default)}",
    ]
    if key in SOURCES:
        lines.append(textwrap.fill(f"  source   {SOURCES[key]}", 96, subsequent_indent=" " * 11))
    for rule in RULES:
        if key in rule.keys:
            lines.append(textwrap.fill(f"  needs    {rule.needs}", 96, subsequent_indent=" " * 11))
    return lines


def _line(key: str) -> str:
    first = (KEYS[key].description or "").split(". ")[0].rstrip(".")
    return f"  {key:36} {written(KEYS[key].default):14} {first}"


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a run's YAML, for editors."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **RunConfig.model_json_schema(),
    }


def write_schema(path: Path) -> None:
    """Write the schema for editors. What is there is replaced only where it is an older schema."""
    text = json.dumps(json_schema(), indent=2) + "\n"
    with disk_faults(path, "name another file"):
        if path.exists() and '"RunConfig"' not in path.read_text(
            encoding="utf-8", errors="replace"
        ):
            raise ConfigError(f"{path}: exists and is no schema of a run; name another file")
        with whole(path) as partial:
            partial.write_text(text, encoding="utf-8")


def to_yaml(
    config: RunConfig, *, commented: bool = True, beside: Mapping[str, str] = MappingProxyType({})
) -> str:
    """YAML that `load_run` reads back as the same run: what differs from the defaults, and the
    settings a first run is likely to change, each under its explanation. The settings in `beside`
    are written whatever their value, with that remark after them."""
    keys = _worth_writing(config, beside)
    lines: list[str] = []
    for group in (*GROUPS, ""):
        named = [key for key in keys if (key in GROUPS or "." not in key) == (not group)]
        if group:
            named = [key for key in named if key.startswith(group + ".")]
        if not named:
            continue
        lines += ["", f"{group}:"] if group else [""]
        indent = "  " if group else ""
        for key in named:
            if commented:
                mark = f"{indent}# "
                lines += textwrap.wrap(_about(key), 96, initial_indent=mark, subsequent_indent=mark)
            remark = f"  # {beside[key]}" if key in beside else ""
            lines += _setting(indent, key.rsplit(".", 1)[-1], value_at(config, key), remark)
    head = "# pennyweight explain KEY says more; keys that are left out keep their defaults."
    return "\n".join(([head] if commented else []) + lines).lstrip("\n") + "\n"


def _setting(indent: str, name: str, value: Any, remark: str) -> list[str]:
    """`name: value`; tables in a list stand one a line."""
    several = _plain(value)
    if isinstance(several, list) and any(isinstance(each, dict) for each in several):
        head = f"{indent}{name}:{remark}"
        return [head, *(f"{indent}  - {written(each)}" for each in several)]
    return [f"{indent}{name}: {written(value)}{remark}"]


def _about(key: str) -> str:
    """A setting's explanation, with its choices where the words do not name them already."""
    said, choices = KEYS[key].description or "", accepts(KEYS[key])
    if choices.startswith("one of ") and not all(
        word in said for word in choices.removeprefix("one of ").split(", ")
    ):
        return f"{said} {choices.capitalize()}."
    return said


def _worth_writing(config: RunConfig, also: Container[str]) -> list[str]:
    """Keys to write. A starter that keeps its default is left out where giving it breaks a rule."""
    changed = [key for key in KEYS if value_at(config, key) != KEYS[key].default or key in also]
    starters = [
        key for key in _STARTERS if key not in changed and value_at(config, key) is not None
    ]
    tree: dict[str, Any] = {}
    for key in (*changed, *starters):
        *groups, name = key.split(".")
        inside = tree.setdefault(groups[0], {}) if groups else tree
        inside[name] = _plain(value_at(config, key))
    for rule in broken_rules(RunConfig.model_validate(tree)):
        starters = [key for key in starters if not _implicated(key, rule.keys)]
    return [key for key in KEYS if key in changed or key in starters]


def _implicated(key: str, keys: tuple[str, ...]) -> bool:
    return key in keys or key.split(".")[0] in keys


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(exclude_defaults=True)
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return value


_BARE = re.compile(r"[A-Za-z0-9_./@~+-][A-Za-z0-9_./@~+=-]*( [A-Za-z0-9_./@~+=-]+)*")


def written(value: Any) -> str:
    """A value as one line of YAML: `[q_proj, v_proj]`, `{prompt: mr}`, `0.0002`, `"no"`."""
    value = _plain(value)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(written(each) for each in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{written(k)}: {written(v)}" for k, v in value.items()) + "}"
    if isinstance(value, str):
        same = _BARE.fullmatch(value) and value not in _SAID_OTHERWISE
        return value if same and read_document(value).tree == value else _quoted(value)
    if isinstance(value, float) and 0 < abs(value) < 1e-3:
        return f"{Decimal(repr(value)):e}"
    return repr(value)


# Text to us, but truth values to other YAML readers.
_SAID_OTHERWISE = {"yes", "no", "on", "off", "Yes", "No", "On", "Off", "YES", "NO", "ON", "OFF"}


def _quoted(text: str) -> str:
    """A double-quoted YAML scalar: JSON's, with all that YAML would not print escaped."""
    body = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in body)


def starter(*, model: str, data: str, method: str, output_dir: str, sweep: bool = False) -> str:
    """A commented YAML to begin with; with `sweep` for four adapters, two ranks by two learning
    rates. Raises ConfigError for what no run could be."""
    try:
        config = RunConfig.model_validate(
            {
                "base": {"model": model},
                "data": {"train": data},
                "train": {"method": method},
                "output_dir": output_dir,
                **({"adapters": {"grid": _FIRST_GRID}} if sweep else {}),
            }
        )
    except ValidationError as error:
        raise ConfigError.all(
            f"{'.'.join(map(str, each['loc'][:2]))}: found {each['input']!r}; {each['msg']}"
            for each in error.errors()
        ) from None
    return to_yaml(resolve(config))
