"""`receipt.json`: what was run, on what, and what it came to; nothing in it is private.

Paths are cut to file names and secrets taken out (`config.public`), so that it can be published with
the weights. Within a schema version keys are only added.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch

from pennyweight import __version__
from pennyweight.config import (
    RunConfig,
    Source,
    is_hub_id,
    named_paths,
    public,
    public_config,
    public_name,
    to_yaml,
)
from pennyweight.config.keys import KEYS, value_at
from pennyweight.data.prepare import Prepared
from pennyweight.evaluate import Difference, LossReport
from pennyweight.lora import attached
from pennyweight.model import BaseModel, license_of
from pennyweight.plan import Plan
from pennyweight.report import plain

__all__ = ["SCHEMA_VERSION", "Outcome", "receipt_of", "versions"]

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to, over all its processes.

    `became`: what settings left to the run were settled to. `before` and `after`: the bare base and
    what was kept, on the held-out rows; None where none were held out.
    """

    result: Mapping[str, Any]
    tokens: int
    resumed_after: tuple[int, ...]
    became: Mapping[str, Any]
    before: LossReport | None
    after: LossReport | None
    difference: Difference | None


def receipt_of(
    config: RunConfig,
    origin: Mapping[str, str],
    base: BaseModel,
    data: Prepared,
    predicted: Plan,
    outcome: Outcome,
) -> dict[str, Any]:
    """The receipt as plain values; `origin` says where each setting's value comes from."""
    shown = public_config(config)
    receipt = {
        "schema_version": SCHEMA_VERSION,
        "name": public_name(config.output_dir),
        "method": config.train.method,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": _machine(base),
        "seed": config.seed,
        "base": _base(config, base),
        "adapter": _adapter(config, base),
        "data": _data(config, data),
        "configuration": _configuration(shown, origin, outcome.became),
        "yaml": to_yaml(shown, commented=False),
        "held_out": _held_out(outcome),
        "plan": predicted.to_dict(),
        "plan_against_measured": _against(predicted, outcome),
        "result": {**outcome.result, "output_dir": public_name(config.output_dir)},
        "resumed_after": list(outcome.resumed_after),
        "notices": list(outcome.result["notices"]),
    }
    found: dict[str, Any] = public(plain(receipt), named_paths(config))
    return found


def versions() -> dict[str, str]:
    """Versions a reader needs to repeat a run."""
    names = ("torch", "transformers", "tokenizers", "safetensors")
    ours = {"python": platform.python_version(), "pennyweight": __version__}
    return ours | {name: version(name) for name in names}


def _machine(base: BaseModel) -> dict[str, Any]:
    on_card = base.device.type == "cuda"
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "device": str(base.device),
        "device_name": torch.cuda.get_device_name(base.device) if on_card else "",
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
    }


def _base(config: RunConfig, base: BaseModel) -> dict[str, Any]:
    return {
        "model": config.base.model,
        "hub_id": config.base.model if is_hub_id(config.base.model) else None,
        "fingerprint": base.fingerprint,
        "quantization": config.base.quantization,
        "double_quantization": config.base.double_quantization,
        "dtype": str(base.dtype).removeprefix("torch."),
        **license_of(base.folder),
    }


def _adapter(config: RunConfig, base: BaseModel) -> dict[str, Any] | None:
    if not attached(base):
        return None
    asked = config.adapter
    return {
        "r": asked.r,
        "lora_alpha": asked.lora_alpha,
        "use_rslora": asked.use_rslora,
        "target_modules": asked.target_modules,
        "patterned": bool(asked.rank_pattern or asked.alpha_pattern),
        "trained_whole": asked.modules_to_save,
    }


def _data(config: RunConfig, data: Prepared) -> dict[str, Any]:
    sources = {name: _paths(getattr(config.data, name)) for name in ("train", "eval")}
    rendering = {
        **data.renderer.describe(),
        "exported": data.renderer.exported_template() is not None,
        "system_message": config.data.system is not None,
    }
    return {
        "fingerprint": data.fingerprint,
        "train": [public_name(path) for path in sources["train"]],
        "eval": [public_name(path) for path in sources["eval"]],
        "hub_ids": [path for each in sources.values() for path in each if is_hub_id(path)],
        "rows": data.ledger.summary("train"),
        "held_out_rows": data.ledger.summary("eval"),
        "notes": list(data.ledger.notes),
        "rendering": rendering,
    }


def _paths(rows: Any) -> list[str]:
    listed = rows if isinstance(rows, tuple) else () if rows is None else (rows,)
    return [row.path if isinstance(row, Source) else row for row in listed]


def _configuration(
    shown: RunConfig, origin: Mapping[str, str], became: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Each setting with its value, where that comes from, and what `auto` or nothing became."""
    told: dict[str, dict[str, Any]] = {}
    for key in KEYS:
        value = value_at(shown, key)
        told[key] = {"value": _json(value), "from": origin.get(key, "default")}
        if key in became and became[key] != value:
            told[key]["became"] = became[key]
    return told


def _json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_json(each) for each in value]
    return value.model_dump(mode="json") if isinstance(value, Source) else value


def _held_out(outcome: Outcome) -> dict[str, Any] | None:
    if outcome.after is None:
        return None
    return {
        "rows": len(outcome.after.sources),
        "before": None if outcome.before is None else outcome.before.to_dict(),
        "after": outcome.after.to_dict(),
        "difference": None if outcome.difference is None else outcome.difference.to_dict(),
    }


def _against(predicted: Plan, outcome: Outcome) -> list[dict[str, Any]]:
    """What was predicted beside what was measured, as this device's own counter shows it."""
    result, cost = outcome.result, predicted.cost
    pairs = (
        ("peak memory", "bytes", predicted.counted_peak_bytes, result["peak_memory_bytes"]),
        ("training time", "seconds", cost.seconds, result["train_seconds"]),
        ("steps", "steps", cost.steps, result["steps"]),
        ("tokens", "tokens", cost.tokens, outcome.tokens),
    )
    return [
        {"what": what, "unit": unit, "planned": planned, "measured": measured}
        for what, unit, planned, measured in pairs
    ]
