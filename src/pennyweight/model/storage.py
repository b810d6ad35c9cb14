"""Quantizing while reading: each linear weight is held in fewer bits the moment it arrives.

A quantizer at transformers' public extension point takes the weights from transformers' own
loader, which knows renamed keys, tied weights and buffers; so the full-precision model never
stands in memory whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pennyweight.errors import ModelError
from pennyweight.lora.layer import linear_shape
from pennyweight.quant import (
    FourBit,
    Quantized4Bit,
    Quantized8Bit,
    QuantizedLinear,
    dequantize_4bit,
    dequantize_8bit,
    from_bitsandbytes,
    quantize_4bit,
    quantize_8bit,
)

__all__ = ["Storage", "StreamConfig", "StreamQuantizer", "quantized_layers"]


class Storage:
    """Turns the weights of linear layers into what the run asked for, one at a time."""

    def __init__(self, quantization: str, double_quantization: bool, device: torch.device) -> None:
        self.quantization, self.double = quantization, double_quantization
        self.device = device
        self.stored: dict[str, Quantized4Bit | Quantized8Bit] = {}
        self.held: dict[str, Quantized4Bit | Quantized8Bit] = {}
        self.faults: list[str] = []
        self.from_cache = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Storage:
        """Itself: transformers copies the config that carries it, and values mapped from a cache
        would be copied with it."""
        return self

    def take_prequantized(
        self, tensors: dict[str, Any], transposed: Collection[str] = ()
    ) -> dict[str, Any]:
        """Fold bitsandbytes' companions of each weight (`weight.absmax`, ...) into values kept here.

        bitsandbytes stores every weight as `[out, in]`; the layers named `transposed` want theirs
        the other way round.
        """
        roots = {k.rpartition(".weight.")[0] for k in tensors if ".weight." in k}
        roots |= {k.removesuffix(".SCB") for k in tensors if k.endswith(".SCB")}
        plain = {}
        groups: dict[str, dict[str, Tensor]] = {root: {} for root in roots}
        for key, lazy in tensors.items():
            root = next((r for r in _parents(key) if r in groups), None)
            if root is None or key == f"{root}.bias":
                plain[key] = lazy
            else:
                groups[root][key.removeprefix(root + ".")] = (
                    lazy[...] if lazy.get_shape() else _scalar(lazy)
                )
        for root, parts in groups.items():
            value = from_bitsandbytes(parts)
            if self.quantization == "none":
                dense = _dense(value)
                plain[f"{root}.weight"] = dense.T.contiguous() if root in transposed else dense
            else:
                shape = tuple(value.shape)
                self.stored[f"{root}.weight"] = value
                plain[f"{root}.weight"] = torch.zeros(shape[::-1] if root in transposed else shape)
        return plain

    def take_kept(
        self,
        tensors: dict[str, Any],
        kept: Mapping[str, Quantized4Bit],
        *,
        prefix: str,
        dtype: torch.dtype,
    ) -> dict[str, Any]:
        """Let values quantized on an earlier start stand in for their weights, which are not read.

        A file may leave out the model's prefix; where a weight has another name still, all are read.
        """
        files = {key: _in_file(key, tensors, prefix) for key in kept}
        if not kept or None in files.values():
            return tensors
        stand_ins = {
            name: torch.zeros((), dtype=dtype).expand(tuple(tensors[name].get_shape()))
            for name in files.values()
            if name is not None
        }
        self.stored |= kept
        self.from_cache = True
        return tensors | stand_ins

    def hold(self, key: str, weight: Tensor, layer: nn.Module) -> None:
        """Keep the weight `[out, in]` named `key` in the storage asked for; faults are collected."""
        try:
            value = self.stored.pop(key, None) or self._quantized(weight.to(self.device))
        except ModelError as fault:
            self.faults.append(f"{key}: {fault}")
            return
        if tuple(value.shape) != linear_shape(layer):
            found, asked = tuple(value.shape), linear_shape(layer)
            self.faults.append(f"weight {key} has shape {found}, the config asks for {asked}")
        self.held[key] = value

    def take_held(self) -> Iterator[tuple[str, Quantized4Bit | Quantized8Bit]]:
        """Hand over each held value once, so that none stands twice."""
        while self.held:
            yield self.held.popitem()

    def _quantized(self, weight: Tensor) -> Quantized4Bit | Quantized8Bit:
        if self.quantization == "int8":
            return quantize_8bit(weight)
        four: FourBit = "fp4" if self.quantization == "fp4" else "nf4"
        return quantize_4bit(weight, format=four, double_quantization=self.double)


class StreamConfig(QuantizationConfigMixin):
    """Carries the storage through transformers' loader."""

    def __init__(self, store: Storage | None = None, **_: Any) -> None:
        self.quant_method = "pennyweight"
        self.store = store

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method}


class StreamQuantizer(HfQuantizer):
    """Quantizes each linear weight as transformers' loader hands it over, then drops it."""

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.targets: set[str] = set()
        self.shapes: dict[str, tuple[int, ...]] = {}

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        head = model.get_output_embeddings()
        self.targets = {
            f"{name}.weight"
            for name, layer in model.named_modules()
            if (isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D")
            and layer is not head
        }
        self.shapes = {
            name: tuple(parameter.shape)
            for name, parameter in model.named_parameters()
            if name not in self.targets
        }
        return model

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        return param_name in self.targets

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self.quantization_config.store)

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        store: Storage = self.quantization_config.store
        # The loader of transformers 5.3 compares no shapes where a quantizer is at work.
        store.faults += [
            f"weight {name} has shape {tuple(parameter.shape)}, the config asks for {asked}"
            for name, parameter in model.named_parameters()
            if (asked := self.shapes.get(name)) not in (None, tuple(parameter.shape))
        ]
        for key, value in store.take_held():
            path = key.removesuffix(".weight")
            layer = model.get_submodule(path)
            linear: Any = QuantizedLinear(value, layer.bias, compute_dtype=None)
            linear.fan_in_fan_out = type(layer).__name__ == "Conv1D"
            model.set_submodule(path, linear)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _Quantize(ConversionOps):
    """One weight in, its quantized value kept by the storage, an empty placeholder out.

    The layers themselves are replaced when all is read: until then transformers expects to find
    its own.
    """

    def __init__(self, store: Storage) -> None:
        self.store = store

    def convert(
        self, input_dict: dict[str, Any], model: nn.Module | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        assert model is not None
        empty: dict[str, Tensor] = {}
        for key, given in input_dict.items():
            weight = given[0] if isinstance(given, list) else given
            layer = model.get_submodule(key.removesuffix(".weight"))
            transposed = type(layer).__name__ == "Conv1D"
            self.store.hold(key, weight.T if transposed else weight, layer)
            empty[key] = nn.Parameter(weight.new_empty(0), requires_grad=False)
        return empty


def quantized_layers(module: nn.Module) -> dict[str, Quantized4Bit]:
    """The 4-bit weights of a model by name."""
    found = {
        f"{n}.weight": m.value for n, m in module.named_modules() if isinstance(m, QuantizedLinear)
    }
    return {name: value for name, value in found.items() if isinstance(value, Quantized4Bit)}


def _in_file(key: str, tensors: Collection[str], prefix: str) -> str | None:
    short = key.removeprefix(f"{prefix}.")
    return key if key in tensors else short if short in tensors else None


def _dense(value: Quantized4Bit | Quantized8Bit) -> Tensor:
    return dequantize_4bit(value) if isinstance(value, Quantized4Bit) else dequantize_8bit(value)


def _scalar(lazy: Any) -> Tensor:
    return lazy[()] if not hasattr(lazy, "get_dtype") else lazy[...]


def _parents(key: str) -> Iterator[str]:
    """`a.b.c` gives `a.b`, then `a`."""
    while "." in key:
        key = key.rpartition(".")[0]
        yield key
