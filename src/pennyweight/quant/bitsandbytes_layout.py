"""Stored weights as the tensors of a bitsandbytes checkpoint, and back.

Written after what transformers and bitsandbytes put into a folder's safetensors: the codes under
`weight`, its scales and tables beside it, and everything that is not a tensor as JSON bytes in
`weight.quant_state.bitsandbytes__nf4` (or `__fp4`); for LLM.int8(), `weight`, `SCB` and
`weight_format`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from pennyweight.errors import ModelError
from pennyweight.quant.blockwise import BLOCK_SIZES, NestedScales, Quantized4Bit
from pennyweight.quant.formats import DYNAMIC_8BIT, FourBit, levels_of
from pennyweight.quant.intake import WEIGHT_DTYPES
from pennyweight.quant.rowwise import Quantized8Bit

__all__ = ["from_bitsandbytes", "to_bitsandbytes"]

_STATE: Final = "weight.quant_state.bitsandbytes__"
_PLAIN_KEYS: Final = ("weight.absmax", "weight.quant_map")
_NESTED_KEYS: Final = ("weight.nested_absmax", "weight.nested_quant_map")
_STATE_ENTRIES: Final = (
    "quant_type",
    "blocksize",
    "dtype",
    "shape",
    "nested_blocksize",
    "nested_dtype",
    "nested_offset",
)
_ROW_MAJOR: Final = 0
# The 8-bit table of bitsandbytes varies by this much with the processor it was made on.
_TABLE_TOLERANCE: Final = 2.0**-22
_DTYPES: Final = {str(dtype).removeprefix("torch."): dtype for dtype in WEIGHT_DTYPES}


def to_bitsandbytes(
    value: Quantized4Bit | Quantized8Bit, prefix_name: str = ""
) -> dict[str, Tensor]:
    """The checkpoint tensors of one layer, named under `prefix_name`, such as `model.layers.0.up`.

    The codes and scales are shared with the value, not copied.
    """
    prefix = _prefix(prefix_name)
    if isinstance(value, Quantized8Bit):
        tensors = {
            "weight": value.codes,
            "SCB": value.scale,
            "weight_format": torch.tensor(_ROW_MAJOR, dtype=torch.uint8),
        }
        return {prefix + name: tensor for name, tensor in tensors.items()}
    device, nested = value.codes.device, value.absmax
    state: dict[str, Any] = {
        "quant_type": value.format,
        "blocksize": value.block_size,
        "dtype": str(value.dtype).removeprefix("torch."),
        "shape": list(value.shape),
    }
    tensors = {
        "weight": value.codes.unsqueeze(1),
        "weight.quant_map": levels_of(value.format).to(device, copy=True),
    }
    if isinstance(nested, NestedScales):
        tensors["weight.absmax"] = nested.codes
        tensors["weight.nested_absmax"] = nested.absmax
        tensors["weight.nested_quant_map"] = DYNAMIC_8BIT.to(device, copy=True)
        state["nested_blocksize"] = nested.block_size
        state["nested_dtype"] = "float32"
        state["nested_offset"] = nested.offset.item()
    else:
        tensors["weight.absmax"] = nested
    packed = list(json.dumps(state).encode())
    tensors[_STATE + value.format] = torch.tensor(packed, dtype=torch.uint8, device=device)
    return {prefix + name: tensor for name, tensor in tensors.items()}


def from_bitsandbytes(
    tensors: Mapping[str, Tensor], prefix_name: str = ""
) -> Quantized4Bit | Quantized8Bit:
    """The stored weight of the layer `prefix_name`; the inverse of `to_bitsandbytes`.

    Tensors of other layers and this layer's bias are passed over. Raises ModelError that names
    every fault: a key missing or unknown, a wrong size or dtype, another table of levels, a scale
    that is not finite, a state that cannot be read.
    """
    prefix = _prefix(prefix_name)
    own = {k[len(prefix) :]: t for k, t in tensors.items() if k.startswith(prefix)}
    own = {k: t for k, t in own.items() if k.startswith("weight") or k == "SCB"}
    faults: list[str] = []
    value = _read_8bit(own, faults) if "SCB" in own else _read_4bit(own, faults)
    if value is None:
        raise ModelError.all(f"{prefix}{fault}" for fault in faults)
    return value


@dataclass(frozen=True, slots=True)
class _State:
    """What `weight.quant_state` says beside the tensors."""

    format: FourBit
    block_size: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    nested_block_size: int | None
    nested_offset: float


def _read_8bit(own: Mapping[str, Tensor], faults: list[str]) -> Quantized8Bit | None:
    _only(own, ("weight", "SCB", "weight_format"), faults)
    codes, rows = own.get("weight"), None
    if codes is None or codes.ndim != 2 or codes.dtype != torch.int8:
        faults.append(f"weight: {_seen(codes)}, not int8 [rows, columns]")
    else:
        rows = codes.shape[0]
    scale = _scales(own, "SCB", rows, faults)
    layout = own.get("weight_format")
    if layout is not None and (layout.numel() != 1 or layout.item() != _ROW_MAJOR):
        faults.append(f"weight_format: {layout.tolist()}, not {_ROW_MAJOR} (row-major)")
    if faults or codes is None or scale is None:
        return None
    return Quantized8Bit(codes=codes, scale=scale)


def _read_4bit(own: Mapping[str, Tensor], faults: list[str]) -> Quantized4Bit | None:
    keys = [key for key in own if key.startswith("weight.quant_state.")]
    if len(keys) != 1 or keys[0] not in (_STATE + "nf4", _STATE + "fp4"):
        found = ", ".join(keys) or "none"
        faults.append(f"weight.quant_state: needs one of {_STATE}nf4, {_STATE}fp4; found {found}")
        return None
    state = _read_state(own[keys[0]], keys[0], faults)
    if state is None:
        return None
    nested = state.nested_block_size is not None
    _only(own, ("weight", keys[0], *_PLAIN_KEYS, *(_NESTED_KEYS if nested else ())), faults)
    _table(own, "weight.quant_map", levels_of(state.format), 0.0, faults)
    count = math.prod(state.shape)
    blocks = -(-count // state.block_size)
    codes = _codes(own, "weight", -(-count // 2), faults, any_dtype=True)
    absmax: Tensor | NestedScales | None
    if state.nested_block_size is None:
        absmax = _scales(own, "weight.absmax", blocks, faults)
    else:
        absmax = _read_nested(own, blocks, state.nested_block_size, state.nested_offset, faults)
    if faults or codes is None or absmax is None:
        return None
    return Quantized4Bit(
        codes=codes,
        absmax=absmax,
        shape=state.shape,
        dtype=state.dtype,
        format=state.format,
        block_size=state.block_size,
    )


def _read_nested(
    own: Mapping[str, Tensor], blocks: int, block_size: int, offset: float, faults: list[str]
) -> NestedScales | None:
    codes = _codes(own, "weight.absmax", blocks, faults)
    absmax = _scales(own, "weight.nested_absmax", -(-blocks // block_size), faults)
    _table(own, "weight.nested_quant_map", DYNAMIC_8BIT, _TABLE_TOLERANCE, faults)
    if codes is None or absmax is None:
        return None
    return NestedScales(
        codes=codes,
        absmax=absmax,
        offset=torch.tensor(offset, dtype=torch.float32, device=absmax.device),
        block_size=block_size,
    )


def _read_state(packed: Tensor, key: str, faults: list[str]) -> _State | None:
    """The JSON of a quant state; None, and a fault for each entry that is wrong."""
    try:
        entries = json.loads(bytes(packed.cpu().to(torch.uint8).tolist()))
    except ValueError as error:
        faults.append(f"{key}: not JSON ({error})")
        return None
    if not isinstance(entries, dict):
        faults.append(f"{key}: not a JSON object")
        return None
    wrong: list[str] = []

    def entry(name: str, fits: Callable[[Any], bool], wanted: str) -> Any:
        found = entries.get(name)
        if name not in entries or not fits(found):
            wrong.append(f"{key}: {name} is {json.dumps(found)}; it must be {wanted}")
        return found

    kind: FourBit = "nf4" if key.endswith("nf4") else "fp4"
    entry("quant_type", lambda v: v == kind, f'"{kind}"')
    block_size = entry("blocksize", lambda v: v in BLOCK_SIZES, f"one of {BLOCK_SIZES}")
    dtype = entry("dtype", lambda v: v in tuple(_DTYPES), f"one of {tuple(_DTYPES)}")
    shape = entry("shape", _is_shape, "a list of positive whole numbers")
    nested_block_size, offset = None, 0.0
    if any(name.startswith("nested_") for name in entries):
        nested_block_size = entry("nested_blocksize", _is_positive, "a positive whole number")
        entry("nested_dtype", lambda v: v == "float32", '"float32"')
        offset = entry("nested_offset", _is_finite, "a finite number")
    wrong += [f"{key}: unknown entry {name!r}" for name in entries if name not in _STATE_ENTRIES]
    faults += wrong
    if wrong:
        return None
    return _State(
        format=kind,
        block_size=block_size,
        dtype=_DTYPES[dtype],
        shape=tuple(shape),
        nested_block_size=nested_block_size,
        nested_offset=float(offset),
    )


def _codes(
    own: Mapping[str, Tensor],
    name: str,
    count: int,
    faults: list[str],
    *,
    any_dtype: bool = False,
) -> Tensor | None:
    """A flat uint8 tensor of `count` bytes; `any_dtype` reads bytes that are stored as another."""
    found = own.get(name)
    fits = found is not None and (any_dtype or found.dtype == torch.uint8)
    if found is None or not fits or found.nbytes != count:
        faults.append(f"{name}: {_seen(found)}, not {count} bytes of codes")
        return None
    return found.contiguous().view(torch.uint8).view(-1)


def _scales(
    own: Mapping[str, Tensor], name: str, count: int | None, faults: list[str]
) -> Tensor | None:
    """A flat float32 tensor of `count` finite numbers, none below zero."""
    found = own.get(name)
    if found is None or found.dtype != torch.float32 or count not in (None, found.numel()):
        wanted = "a float32 scale for every row" if count is None else f"{count} float32 scales"
        faults.append(f"{name}: {_seen(found)}, not {wanted}")
        return None
    bad = (found.isfinite() & (found >= 0)).logical_not_().view(-1)
    if bad.any():
        first = int(bad.nonzero()[0])
        faults.append(
            f"{name}: {int(bad.sum())} scales are negative or not finite; the first is "
            f"{found.view(-1)[first].item()} at {first}"
        )
        return None
    return found.contiguous().view(-1)


def _table(
    own: Mapping[str, Tensor], name: str, levels: Tensor, tolerance: float, faults: list[str]
) -> None:
    found = own.get(name)
    if found is None or found.dtype != torch.float32 or found.numel() != levels.numel():
        faults.append(f"{name}: {_seen(found)}, not {levels.numel()} float32 levels")
        return
    differs = (found.cpu().view(-1) - levels).abs() > tolerance * levels.abs()
    if differs.any() or not found.isfinite().all():
        faults.append(f"{name}: {int(differs.sum())} levels are not those of the format")


def _only(own: Mapping[str, Tensor], known: tuple[str, ...], faults: list[str]) -> None:
    faults += [f"{name}: not part of this layout" for name in own if name not in known]


def _seen(tensor: Tensor | None) -> str:
    if tensor is None:
        return "missing"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _is_positive(value: object) -> bool:
    return type(value) is int and value > 0


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(_is_positive, value))


def _is_finite(value: object) -> bool:
    return isinstance(value, float | int) and type(value) is not bool and math.isfinite(value)


def _prefix(name: str) -> str:
    return name if not name or name.endswith(".") else name + "."
