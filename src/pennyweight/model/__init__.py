"""A resident base model and its tokenizer: the only room that knows transformers' model classes."""

from pennyweight.model.folder import (
    find_folder,
    fingerprint,
    license_of,
    load_tokenizer,
    read_config,
    weight_files,
)
from pennyweight.model.load import load_base, resolve_device, resolve_dtype, stop_ids
from pennyweight.model.outline import shapes
from pennyweight.model.resident import BaseModel, Head

__all__ = [
    "BaseModel",
    "Head",
    "find_folder",
    "fingerprint",
    "license_of",
    "load_base",
    "load_tokenizer",
    "read_config",
    "resolve_device",
    "resolve_dtype",
    "shapes",
    "stop_ids",
    "weight_files",
]
