"""`adapter_model.safetensors`: PEFT's keys, to and from factors and whole weights by module.

A file is judged by its header before a byte of a tensor is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pennyweight.config import LoraConfig
from pennyweight.errors import AdapterError
from pennyweight.foreign import ForeignError, StoredTensor, file_in, stored_tensors
from pennyweight.lora.targets import rank_of

__all__ = ["TENSORS", "product_fault", "read_tensors", "tensors_of"]

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# PEFT writes the base's own embedding or head along when factors stand beside it.
ALONG = ".base_layer"
LARGEST_DIMENSION = 2**22
LARGEST_VALUE = 3e38  # float32's
LONGEST_KEY, MOST_FAULTS = 300, 20
HEADER_LIMIT_BYTES = 5 * 2**20  # of some 40,000 tensors
FLOATING = ("F16", "BF16", "F32", "F64")
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin")

Place = tuple[str, str]
"""`A`, `B`, `saved` or `along`, and the name of the module or parameter."""


def tensors_of(
    factors: Mapping[str, tuple[Tensor, Tensor]],
    saved: Mapping[str, Tensor],
    along: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The content of adapter_model.safetensors; `read_tensors` is the inverse.

    Of what goes along only biases of modules trained whole are written: PEFT asks for them.
    """
    tensors = {}
    for path, (a, b) in factors.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = a.detach().cpu().contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = b.detach().cpu().contiguous()
    for path, weight in saved.items():
        tensors[f"{PREFIX}{path}.weight"] = weight.detach().cpu().clone().contiguous()
    for name, value in along.items():
        if name.removesuffix(".bias") in saved:
            tensors[f"{PREFIX}{name}"] = value.detach().cpu().clone().contiguous()
    return tensors


def read_tensors(
    folder: Path, config: LoraConfig | None
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Factors by module, whole weights by module, what goes along by parameter, the faults found.

    `config`: what the settings say of ranks, None where they could not be read.
    """
    try:
        path = file_in(folder, TENSORS)
        stored = stored_tensors(path, HEADER_LIMIT_BYTES)
    except FileNotFoundError:
        raise AdapterError(f"{folder}: no {TENSORS}{_pickled(folder)}") from None
    except ForeignError as fault:
        raise AdapterError(str(fault)) from fault
    faults: list[str] = []
    places = _placed(stored, faults)
    for module in dict.fromkeys(name for kind, name in places if kind in "AB"):
        shapes = [stored[places[kind, module]].shape for kind in "AB" if (kind, module) in places]
        faults += _pair_faults(module, shapes, ("A", module) in places, config)
    if not places and not faults:
        faults.append(f"{path}: holds no factors at all")
    if faults:
        return {}, {}, {}, faults
    held = _read(path, places, faults)
    pairs = {n: (a, held["B", n]) for (kind, n), a in held.items() if kind == "A"}
    saved = {n: tensor for (kind, n), tensor in held.items() if kind == "saved"}
    along = {n: tensor for (kind, n), tensor in held.items() if kind == "along"}
    return pairs, saved, along, faults


def _pickled(folder: Path) -> str:
    found = next((name for name in PICKLES if (folder / name).is_file()), None)
    if found is None:
        return ""
    return (
        f"; {found} is a pickle, which can run code and is never read: ask whoever made it for "
        "safetensors"
    )


def _placed(stored: Mapping[str, StoredTensor], faults: list[str]) -> dict[Place, str]:
    """The key of each place in an adapter; what has none is a fault."""
    places: dict[Place, str] = {}
    for key, entry in stored.items():
        if len(faults) > MOST_FAULTS:
            break
        place = _place_of(key)
        if place is None or len(key) > LONGEST_KEY:
            faults.append(f"{key[:LONGEST_KEY]}: a tensor with no place in a LoRA adapter")
        elif place in places:
            faults.append(f"{key}: stands for the same weight as {places[place]}; keep one")
        elif entry.dtype not in FLOATING:
            faults.append(f"{key}: holds {entry.dtype}, factors are floating point")
        elif any(not 0 < size <= LARGEST_DIMENSION for size in entry.shape) or not entry.shape:
            faults.append(f"{key}: shape {entry.shape} is not one of a weight")
        else:
            places[place] = key
    return places


def _place_of(key: str) -> Place | None:
    if not key.startswith(PREFIX):
        return None
    name = key.removeprefix(PREFIX)
    if match := re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", name):
        return match[2], match[1]
    name = name.replace(".modules_to_save", "")
    if "lora_" in name:
        return None
    if name.endswith((f"{ALONG}.weight", ".bias")):
        return "along", name.replace(ALONG, "")
    module = name.removesuffix(".weight")
    return ("saved", module) if module != name and module else None


def _pair_faults(
    module: str, shapes: list[tuple[int, ...]], has_a: bool, config: LoraConfig | None
) -> list[str]:
    """What is wrong with A `[r, in]` and B `[out, r]` of one module."""
    if len(shapes) < 2:
        return [f"{module}: only {'A' if has_a else 'B'} is there, the other factor is missing"]
    a, b = shapes
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        return [f"{module}: factors of shape {a} and {b} do not multiply"]
    want = a[0] if config is None else rank_of(module, config)
    return [] if a[0] == want else [f"{module}: factors of rank {a[0]}, the config says {want}"]


def _read(path: Path, places: Mapping[Place, str], faults: list[str]) -> dict[Place, Tensor]:
    held = {}
    try:
        with safe_open(path, framework="pt") as file:
            for place, key in places.items():
                held[place] = file.get_tensor(key)
                if not torch.isfinite(held[place]).all():
                    faults.append(f"{key}: holds NaN or infinity")
    except (SafetensorError, OSError, MemoryError, RuntimeError) as fault:
        raise AdapterError(f"{path}: not a whole safetensors file ({fault})") from fault
    return held


def product_fault(module: str, pair: tuple[Tensor, Tensor], scaling: float) -> str | None:
    """Whether the update of one module is past what float32 holds: each number may be finite, and
    their product not."""
    a, b = (float(factor.abs().max()) for factor in pair)
    if a * b * scaling * pair[0].shape[0] < LARGEST_VALUE:
        return None
    return f"{module}: factors up to {a:.3g} and {b:.3g} multiply to infinity"
