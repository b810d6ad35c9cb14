"""Fold an adapter into its base, tensor by tensor, and measure what the folding lost.

A QLoRA adapter was trained beside the dequantized base. `as-trained` folds it into those very
weights; `original` into the 16-bit weights of the base's files, which is a different model.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pennyweight.config import BaseConfig
from pennyweight.errors import AdapterError, ConfigError, ModelError
from pennyweight.lora import Adapter
from pennyweight.lora.layer import AdaptedModule
from pennyweight.model import BaseModel, load_base, weight_files
from pennyweight.quant import QuantizedLinear

__all__ = ["Agreement", "MergeReport", "agreement", "merge"]

Onto = Literal["as-trained", "original"]
KEPT_AT_LEAST = 0.5


@dataclass(frozen=True, slots=True)
class Agreement:
    """How close two models' logits are on the same rows: largest difference, KL (nats a token), top-1 share."""

    tokens: int
    max_logit_difference: float
    mean_kl: float
    top1_agreement: float


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What was written, and what of the update survived rounding.

    `update_kept` is <W' - W, D> / <D, D> over all folded weights, 1 when nothing was lost; D is the
    adapter's update.
    """

    folder: str
    onto: Onto
    dtype: str
    modules: int
    update_kept: float
    agreement: Agreement | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(slots=True)
class _Tally:
    """Inner products that tell how much of the update arrived."""

    arrived: float = 0.0
    meant: float = 0.0
    folded: int = 0

    def add(self, before: Tensor, after: Tensor, delta: Tensor) -> None:
        self.arrived += float(((after.float() - before.float()).double() * delta.double()).sum())
        self.meant += float(delta.double().square().sum())
        self.folded += 1


def merge(
    base: BaseModel,
    adapter: Adapter,
    out: Path | str,
    *,
    onto: Onto = "as-trained",
    dtype: torch.dtype | None = None,
    rows: Sequence[Sequence[int]] = (),
    name: str = "default",
) -> MergeReport:
    """Write a plain Hugging Face folder of the base with the adapter folded in.

    `base` is resident as it was in training, with the adapter attached as `name` if `rows` (token
    ids of held-out documents) are given to compare logits on. `dtype` None keeps each tensor's
    stored type. Refused: an update of zeros, one that rounding lost, an `out` that holds files.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists and is not an empty folder; name another --out")
    if not any(b.any() for _, b in adapter.factors.values()) and not adapter.saved:
        raise AdapterError(
            "this adapter's update is zero everywhere: merging it would change nothing; was it trained?"
        )
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        tally = _Tally()
        written: dict[str, str] = {}
        left = set(adapter.factors) | set(adapter.saved)
        for path in weight_files(base.folder):
            tensors = _fold_file(path, base, adapter, onto, dtype, tally, left)
            save_file(tensors, partial / path.name, metadata={"format": "pt"})
            written |= dict.fromkeys(tensors, path.name)
        _check_folded(base, left, tally)
        _write_companions(base, partial, written, dtype)
        if out.exists():
            out.rmdir()
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return MergeReport(
        folder=str(out),
        onto=onto,
        dtype=str(dtype or "as stored").removeprefix("torch."),
        modules=tally.folded,
        update_kept=tally.arrived / tally.meant if tally.meant else 1.0,
        agreement=agreement(base, out, rows, name=name) if rows else None,
    )


def agreement(
    base: BaseModel, folder: Path | str, rows: Sequence[Sequence[int]], *, name: str | None
) -> Agreement:
    """Compare the attached model's logits with those of a merged folder, on rows of token ids."""
    merged = load_base(
        BaseConfig(model=str(folder), quantization="none", device=str(base.device), dtype="float32")
    )
    tokens, worst, divergence, agreed = 0, 0.0, 0.0, 0
    for row in rows:
        ids = torch.tensor(list(row), device=base.device)
        positions = torch.arange(len(ids), device=base.device)
        with torch.inference_mode():
            with base.route.over((0, len(ids)), (name,)):
                attached = base.logits(base.hidden(ids, positions))
            with merged.route.over((0, len(ids)), (None,)):
                folded = merged.logits(merged.hidden(ids, positions))
        worst = max(worst, float((attached - folded).abs().max()))
        p, q = attached.log_softmax(-1), folded.log_softmax(-1)
        divergence += float((p.exp() * (p - q)).sum())
        agreed += int((attached.argmax(-1) == folded.argmax(-1)).sum())
        tokens += len(ids)
    return Agreement(tokens, worst, divergence / tokens, agreed / tokens)


def _fold_file(
    path: Path,
    base: BaseModel,
    adapter: Adapter,
    onto: Onto,
    dtype: torch.dtype | None,
    tally: _Tally,
    left: set[str],
) -> dict[str, Tensor]:
    """The tensors of one file, with every update that belongs there folded in; ticks them off `left`."""
    modules = dict(base.module.named_modules())
    tensors: dict[str, Tensor] = {}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            if ".weight." in key or key.endswith((".SCB", ".weight_format")):
                continue
            module_path = _module_of(key, base)
            layer = modules.get(module_path or "")
            weight = _weight(file, key, layer, onto, base)
            if module_path in adapter.saved:
                tensors[key] = adapter.saved[module_path].detach().cpu().to(dtype or weight.dtype)
                left.discard(module_path)
            elif module_path in adapter.factors and key.endswith(".weight"):
                delta = adapter.delta(module_path).cpu()
                delta = delta.T if _transposed(layer) else delta
                after = (weight.float() + delta).to(dtype or weight.dtype)
                tally.add(weight.to(after.dtype), after, delta)
                tensors[key] = after.contiguous()
                left.discard(module_path)
            else:
                tensors[key] = weight.to(dtype or weight.dtype).contiguous()
    _tick_tied(base, adapter, left)
    return tensors


def _weight(file: Any, key: str, layer: nn.Module | None, onto: Onto, base: BaseModel) -> Tensor:
    """The weight to fold into: the file's own, or what the quantized layer computes with."""
    stored = file.get_tensor(key)
    plain = layer.base_layer if isinstance(layer, AdaptedModule) else layer
    if not isinstance(plain, QuantizedLinear) or not key.endswith(".weight"):
        return stored
    if onto == "original":
        if not stored.is_floating_point():
            raise ModelError(
                f"{base.folder}: its weights are stored quantized, there is no original to merge onto; "
                "use as-trained, or name the unquantized model as base"
            )
        return stored
    dense = plain.dequantize(torch.float32).cpu()
    dense = dense.T if _transposed(layer) else dense
    return dense if not stored.is_floating_point() else dense.to(stored.dtype)


def _module_of(key: str, base: BaseModel) -> str | None:
    """The module path of a file's `….weight` key; files may leave out or add the model's prefix."""
    path = key.removesuffix(".weight").removesuffix(".bias")
    prefix = base.module.base_model_prefix + "."
    modules = {n.replace(".base_layer", "") for n, _ in base.module.named_modules()}
    return next((p for p in (path, prefix + path, path.removeprefix(prefix)) if p in modules), None)


def _transposed(layer: nn.Module | None) -> bool:
    plain = layer.base_layer if isinstance(layer, AdaptedModule) else layer
    return type(plain).__name__ == "Conv1D" or bool(getattr(plain, "fan_in_fan_out", False))


def _tick_tied(base: BaseModel, adapter: Adapter, left: set[str]) -> None:
    """Of tied weights only one stands in the files; both places are done when it is."""
    pointers = {}
    for path in adapter.saved:
        layer = base.module.get_submodule(path)
        plain = layer.base_layer if isinstance(layer, AdaptedModule) else layer
        pointers.setdefault(plain.weight.data_ptr(), []).append(path)
    for paths in pointers.values():
        if any(p not in left for p in paths):
            left.difference_update(paths)


def _check_folded(base: BaseModel, left: set[str], tally: _Tally) -> None:
    if left:
        some = ", ".join(sorted(left)[:3])
        raise ModelError(
            f"{base.folder}: its files have no weight for {some}, which the adapter changes"
        )
    if tally.meant and tally.arrived / tally.meant < KEPT_AT_LEAST:
        raise AdapterError(
            f"only {tally.arrived / tally.meant:.0%} of the update survives rounding to the merged type; "
            "merge with --dtype float32, or keep the adapter apart"
        )


def _write_companions(
    base: BaseModel, folder: Path, written: dict[str, str], dtype: torch.dtype | None
) -> None:
    """Config without quantization, the weight index, and the tokenizer's files as they were."""
    config = json.loads((base.folder / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if len(set(written.values())) > 1:
        size = sum((folder / name).stat().st_size for name in set(written.values()))
        index = {"metadata": {"total_size": size}, "weight_map": written}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )
    for path in base.folder.iterdir():
        wanted = path.suffix in (".json", ".jinja", ".model", ".txt")
        if (
            path.is_file()
            and wanted
            and not path.name.endswith(".index.json")
            and path.name != "config.json"
        ):
            shutil.copyfile(path, folder / path.name)
