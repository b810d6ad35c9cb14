"""A resident base model and its tokenizer: the only room that knows transformers' model classes."""

from pennyweight.model.exhausted import is_out_of_memory, release_cached
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
    "is_out_of_memory",
    "license_of",
    "load_base",
    "load_tokenizer",
    "read_config",
    "release_cached",
    "resolve_device",
    "resolve_dtype",
    "shapes",
    "stop_ids",
    "weight_files",
]
