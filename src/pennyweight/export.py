"""Other formats for a resident base: a folder of weights stored as bitsandbytes stores them.

Such a folder is a quarter of the size, opens in transformers with bitsandbytes, and is read back
here without being quantized again. An adapter is exported by merging it first.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from pennyweight.errors import ModelError
from pennyweight.lora.layer import AdaptedModule
from pennyweight.model import BaseModel, weight_files
from pennyweight.model.folder import read_settings
from pennyweight.model.writing import (
    Entry,
    copy_companions,
    is_companion,
    module_of,
    torch_dtype,
    whole_folder,
    write_index,
    write_safetensors,
    write_settings,
)
from pennyweight.quant import NestedScales, Quantized4Bit, QuantizedLinear, to_bitsandbytes

__all__ = ["export_bitsandbytes"]


def export_bitsandbytes(base: BaseModel, out: Path | str) -> Path:
    """Write the base as it is held, in 4 or 8 bits, in bitsandbytes' layout.

    Adapters beside the base are not part of it. One tensor at a time is copied. ModelError: the
    base is not held quantized; ConfigError: `out` holds something; DiskError. Nothing is left
    behind then.
    """
    modules = dict(base.module.named_modules())
    held = {n: m for n, m in modules.items() if isinstance(m, QuantizedLinear)}
    if not held:
        raise ModelError(
            f"{base.name} is held unquantized: load it with quantization nf4, fp4 or int8 to export that"
        )
    with whole_folder(out) as folder:
        files: dict[str, dict[str, Entry]] = {}
        for path in weight_files(base.folder):
            with safe_open(path, framework="pt") as file:
                files[path.name] = _entries(file, base, modules)
                write_safetensors(folder / path.name, files[path.name])
        write_index(folder, files)
        settings = read_settings(base.folder)
        settings["quantization_config"] = _quantization_config(base, next(iter(held.values())))
        write_settings(folder, settings)
        copy_companions(base.folder, folder)
    return Path(out)


def _entries(file: Any, base: BaseModel, modules: dict[str, nn.Module]) -> dict[str, Entry]:
    """The tensors of one file: weights held quantized in their packed form, the others as they are."""
    found: dict[str, Entry] = {}
    for key in file.keys():  # noqa: SIM118
        if is_companion(key):
            continue
        path = module_of(base, key, modules)
        layer = modules.get(path or "")
        plain = layer.base_layer if isinstance(layer, AdaptedModule) else layer
        if path is not None and isinstance(plain, QuantizedLinear):
            packed = to_bitsandbytes(plain.value, key.removesuffix(".weight"))
            found |= {name: _given(tensor) for name, tensor in packed.items()}
        else:
            lazy = file.get_slice(key)
            dtype = torch_dtype(lazy.get_dtype(), key)
            found[key] = Entry(dtype, tuple(lazy.get_shape()), partial(file.get_tensor, key))
    return found


def _given(tensor: Tensor) -> Entry:
    return Entry(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def _quantization_config(base: BaseModel, layer: QuantizedLinear) -> dict[str, Any]:
    """What transformers writes into config.json for such weights; the head is named as left out."""
    head = base.module.get_output_embeddings()
    four = layer.value if isinstance(layer.value, Quantized4Bit) else None
    left_out = [name for name, module in base.module.named_modules() if module is head]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four is not None,
        "load_in_8bit": four is None,
        "_load_in_4bit": four is not None,
        "_load_in_8bit": four is None,
        "bnb_4bit_compute_dtype": str(base.dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": four.format if four is not None else "fp4",
        "bnb_4bit_use_double_quant": four is not None and isinstance(four.absmax, NestedScales),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": left_out,
        "llm_int8_threshold": 6.0,
    }
