"""W + D for every weight an adapter changes, one at a time, and how much of D rounding left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pennyweight.errors import AdapterError, ModelError
from pennyweight.lora import Adapter
from pennyweight.lora.layer import AdaptedModule
from pennyweight.model import BaseModel, weight_files
from pennyweight.model.writing import Entry, is_companion, module_of, torch_dtype
from pennyweight.quant import QuantizedLinear

__all__ = ["Fold", "refuse_no_change"]

KEPT_AT_LEAST: Final = 0.5


class Fold:
    """One merge under way: what is folded into what, and what has arrived so far."""

    def __init__(
        self,
        base: BaseModel,
        adapter: Adapter,
        *,
        onto: str,
        dtype: torch.dtype | None,
        packed_dtype: torch.dtype,
    ) -> None:
        self.base, self.adapter, self.onto = base, adapter, onto
        self.dtype, self.packed_dtype = dtype, packed_dtype
        self.modules = dict(base.module.named_modules())
        self.keys = _stored_keys(base.folder)
        self.left = set(adapter.factors) | set(adapter.saved)
        self.tied = _tied_paths(base, self.modules)
        self.untied = bool(self.tied) and not _changed_alike(adapter, self.tied)
        self.folded, self.arrived, self.meant = 0, 0.0, 0.0

    @property
    def kept(self) -> float:
        return self.arrived / self.meant if self.meant else 1.0

    def entries(self, file: Any) -> dict[str, Entry]:
        """The tensors of one merged file, to be made one by one from the base's `file`."""
        found: dict[str, Entry] = {}
        for key in file.keys():  # noqa: SIM118
            if is_companion(key):
                continue
            path = module_of(self.base, key, self.modules)
            found[key] = self._entry(file, key, path)
            self.left.discard(path or "")
            twin = next((t for t in self.tied if path in self.tied and t != path), None)
            if twin is None or f"{twin}.weight" in self.keys:
                continue
            self.left.discard(twin)
            if self.untied:
                found[f"{twin}.weight"] = self._entry(file, key, twin)
        return found

    def check(self) -> None:
        """Every change of the adapter must have found its tensor, and have outlived rounding."""
        if self.left:
            some = ", ".join(sorted(self.left)[:3])
            raise ModelError(
                f"{self.base.folder}: its files have no weight for {some}, which the adapter changes"
            )
        if self.kept < KEPT_AT_LEAST:
            raise AdapterError(
                f"only {self.kept:.0%} of the update survives rounding to the merged type; "
                "merge with --dtype float32, or keep the adapter apart"
            )

    def _entry(self, file: Any, key: str, path: str | None) -> Entry:
        lazy = file.get_slice(key)
        layer = _plain(self.modules[path]) if path is not None else None
        packed = f"{key}.absmax" in self.keys or f"{key.removesuffix('weight')}SCB" in self.keys
        shape = _weight_shape(layer) if packed and layer is not None else tuple(lazy.get_shape())
        kept = self.packed_dtype if packed else torch_dtype(lazy.get_dtype(), key)
        out = (self.dtype or kept) if kept.is_floating_point else kept
        if path is not None and path in self.adapter.saved:
            copy = self.adapter.saved[path].detach()
            return Entry(out, shape, lambda: _rounded(copy.cpu(), out, key))
        source = partial(self._source, file, key, layer, packed)
        if layer is not None and path is not None and path in self.adapter.factors:
            return Entry(out, shape, partial(self._folded, path, layer, source, out))
        return Entry(out, shape, lambda: _rounded(source(), out, key))

    def _source(self, file: Any, key: str, layer: nn.Module | None, packed: bool) -> Tensor:
        """The weight to fold into, as files hold it: their own, or what the layer computes with."""
        if isinstance(layer, QuantizedLinear) and (packed or self.onto == "as-trained"):
            dense = layer.dequantize(torch.float32).cpu()
            return dense.T if _transposed(layer) else dense
        if packed:
            assert layer is not None, f"{key} is stored quantized and belongs to no layer"
            return cast(Tensor, layer.weight).detach().cpu()
        return cast(Tensor, file.get_tensor(key))

    def _folded(
        self, path: str, layer: nn.Module, source: Callable[[], Tensor], out: torch.dtype
    ) -> Tensor:
        """W + D, rounded once; the inner products tell how much of D arrived."""
        weight, delta = source().float(), self.adapter.delta(path).cpu()
        delta = delta.T if _transposed(layer) else delta
        after = _rounded(weight + delta, out, path)
        moved = after.float() - weight.to(out).float()
        self.arrived += float((moved * delta).sum())
        self.meant += float(delta.square().sum())
        self.folded += 1
        return after


def refuse_no_change(base: BaseModel, adapter: Adapter) -> None:
    """AdapterError if merging `adapter` would leave every weight as it is."""
    changed = any(bool(a.any()) and bool(b.any()) for a, b in adapter.factors.values())
    for path, copy in adapter.saved.items():
        weight = cast(Tensor, _plain(base.module.get_submodule(path)).weight)
        changed = changed or not torch.equal(copy.detach().to(weight), weight)
    if not changed:
        raise AdapterError(
            "this adapter's update is zero everywhere: merging it would change nothing; was it trained?"
        )


def _rounded(weight: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """The weight in the type to be written; AdapterError where that type cannot hold it."""
    after = weight.to(dtype)
    if after.is_floating_point() and not bool(after.isfinite().all()):
        held = "is not finite" if not bool(weight.isfinite().all()) else "is beyond what it holds"
        name = str(dtype).removeprefix("torch.")
        raise AdapterError(
            f"{where}: a merged weight {held} ({name}): merge with --dtype bfloat16 or float32"
        )
    return after


def _stored_keys(folder: Path) -> frozenset[str]:
    keys: set[str] = set()
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            keys.update(file.keys())
    return frozenset(keys)


def _tied_paths(base: BaseModel, modules: dict[str, nn.Module]) -> tuple[str, ...]:
    """Embedding and head, where they are one weight; of which files usually hold only one."""
    module: Any = base.module
    pair = (module.get_input_embeddings(), module.get_output_embeddings())
    weights = [cast(Tensor, _plain(module).weight) for module in pair]
    if weights[0].data_ptr() != weights[1].data_ptr():
        return ()
    return tuple(next(path for path, found in modules.items() if found is part) for part in pair)


def _changed_alike(adapter: Adapter, tied: Sequence[str]) -> bool:
    """Whether tied weights are still one after the merge."""
    if any(path in adapter.factors for path in tied):
        return False
    copies = [adapter.saved[path] for path in tied if path in adapter.saved]
    return not copies or (len(copies) == len(tied) and torch.equal(*copies))


def _plain(layer: nn.Module) -> nn.Module:
    return layer.base_layer if isinstance(layer, AdaptedModule) else layer


def _transposed(layer: nn.Module) -> bool:
    return type(layer).__name__ == "Conv1D" or bool(getattr(layer, "fan_in_fan_out", False))


def _weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """The shape in which plain files hold the layer's weight."""
    if not isinstance(layer, QuantizedLinear):
        return tuple(cast(Tensor, layer.weight).shape)
    shape = (layer.out_features, layer.in_features)
    return shape[::-1] if _transposed(layer) else shape
