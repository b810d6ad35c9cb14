"""The compiled library: found, held against its sources, tried, and the variant that runs here."""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from dataclasses import dataclass
from typing import Any, Final

import torch

from pennyweight.quant.kernels.build import LIBRARY, built_from, variants

__all__ = ["SWITCH", "Library", "chosen", "why_none"]

SWITCH: Final = "PENNYWEIGHT_KERNELS"
_BF16: Final = (
    *("attend_bf16", "attend_back_bf16", "multiply_bf16"),
    *("adapted_bf16", "adapted_back_bf16"),
)
_MEND: Final = "python -m pennyweight.quant.kernels"


@dataclass(frozen=True, slots=True)
class Library:
    """The functions of one variant; `cpu` says what each takes."""

    variant: str
    quantize: Any
    nest: Any
    dequantize: Any
    forward: Any
    backward: Any
    attend: Any
    attend_back: Any
    norm: Any
    gate: Any
    rotate: Any
    softmax: Any
    adapted: Any
    adapted_back: Any
    decoder_layer_bytes: Any
    decoder_layer: Any
    decoder_layer_back: Any
    # None where the processor has no products of bf16.
    attend_bf16: Any
    attend_back_bf16: Any
    multiply_bf16: Any
    adapted_bf16: Any
    adapted_back_bf16: Any


def chosen() -> Library | None:
    """The variant that serves in this process; None where pure torch does."""
    # A graph under construction is made of torch's own operations.
    if torch.compiler.is_compiling():
        return None
    found = _chosen(os.environ.get(SWITCH, "").strip().lower())
    return None if isinstance(found, str) else found


def why_none() -> str:
    """Why pure torch serves on this CPU, and what would change it; empty where a kernel does."""
    found = _chosen(os.environ.get(SWITCH, "").strip().lower())
    return found if isinstance(found, str) else ""


@functools.cache
def _chosen(switch: str) -> Library | str:
    if switch == "off":
        return f"{SWITCH} is off"
    if not LIBRARY.is_file():
        return f"they are not built: {_MEND}"
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
        loaded.pennyweight_built_from.restype = ctypes.c_char_p
        stamp = loaded.pennyweight_built_from().decode()
    except (OSError, AttributeError) as error:
        return f"the library does not load ({error}): {_MEND}"
    if stamp != built_from():
        return f"the library was built from other sources: {_MEND}"
    loaded.pennyweight_runs.restype = ctypes.c_bool
    # A variant that the compiler did not know is not in the library.
    built = [name for name in variants() if hasattr(loaded, f"pennyweight_{name}_forward")]
    here = [name for name in built if loaded.pennyweight_runs(name.encode())]
    if switch and switch not in here:
        return f"{SWITCH}={switch} is not one of those for this processor: off, {', '.join(here)}"
    return _tried(_variant(loaded, switch or here[0]))


def _variant(loaded: ctypes.CDLL, name: str) -> Library:
    p, i32, i64, f32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float
    takes = {
        "quantize": (p, i32, i64, i64, p, p, p, p, i32),
        "nest": (p, i64, f32, i64, p, i64, p, p),
        "dequantize": (p, p, ctypes.c_bool, i32),
        "forward": (p, p, i64, p, p, i32),
        "backward": (p, p, i64, p, i32),
        "attend": (p, i32),
        "attend_back": (p, i32),
        "attend_bf16": (p, i32),
        "attend_back_bf16": (p, i32),
        "norm": (p, i32, i32),
        "gate": (p, i32, i32),
        "rotate": (p, i32, i32),
        "softmax": (p, i32, i32),
        "adapted": (p, i64, p, i64, i32),
        "adapted_back": (p, i64, p, i64, p, p, i32),
        "decoder_layer_bytes": (p, i64, p),
        "decoder_layer": (p, p),
        "decoder_layer_back": (p, p),
        "multiply_bf16": (p, p, i64, p, ctypes.c_bool, p, i32),
        "adapted_bf16": (p, i64, p, i64, i32),
        "adapted_back_bf16": (p, i64, p, i64, p, i32),
    }
    functions: dict[str, Any] = {}
    for function, arguments in takes.items():
        found = getattr(loaded, f"pennyweight_{name}_{function}", None)
        assert found is not None or function in _BF16, function
        if found is not None:
            found.argtypes, found.restype = arguments, None
        functions[function] = found
    return Library(name, **functions)


def _tried(found: Library) -> Library | str:
    """The library after a trial, or, in words, what it got wrong: told once and never used."""
    from pennyweight.quant.kernels.cpu import agrees_with_torch

    if agrees_with_torch(found):
        return found
    why = f"the {found.variant} kernels give other values than pure torch on this processor"
    warnings.warn(f"{why}, which does their work; {SWITCH}=off silences this", stacklevel=2)
    return why
