"""The run described once: every setting, its default, where its value came from, what it needs."""

from __future__ import annotations

from pennyweight.config.explain import explain, json_schema, starter, to_yaml, write_schema
from pennyweight.config.load import LoadedRun, load_run, read_resolved
from pennyweight.config.public import (
    is_hub_id,
    named_paths,
    public,
    public_config,
    public_name,
)
from pennyweight.config.rules import origins, resolve
from pennyweight.config.schema import (
    AdaptersConfig,
    BaseConfig,
    CompareConfig,
    DataConfig,
    EvaluateConfig,
    Format,
    LoraConfig,
    Method,
    Quantization,
    RunConfig,
    Source,
    TrainConfig,
)
from pennyweight.config.variants import variants

__all__ = [
    "AdaptersConfig",
    "BaseConfig",
    "CompareConfig",
    "DataConfig",
    "EvaluateConfig",
    "Format",
    "LoadedRun",
    "LoraConfig",
    "Method",
    "Quantization",
    "RunConfig",
    "Source",
    "TrainConfig",
    "explain",
    "is_hub_id",
    "json_schema",
    "load_run",
    "named_paths",
    "origins",
    "public",
    "public_config",
    "public_name",
    "read_resolved",
    "resolve",
    "starter",
    "to_yaml",
    "variants",
    "write_schema",
]
