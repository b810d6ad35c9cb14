"""Fold an adapter into its base, tensor by tensor, and measure what the folding lost.

A QLoRA adapter was trained beside the dequantized base. `as-trained` folds it into those very
weights; `original` into the 16-bit weights of the base's files, which is a different model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open

from pennyweight.data.batch import collate
from pennyweight.data.conversation import Example
from pennyweight.errors import ModelError
from pennyweight.lora import Adapter, check_fit
from pennyweight.merge.agreement import Agreement, Reader, Reference, beside
from pennyweight.merge.fold import Fold, refuse_no_change
from pennyweight.model import BaseModel, weight_files
from pennyweight.model.folder import read_settings
from pennyweight.model.writing import (
    Entry,
    copy_companions,
    whole_folder,
    write_index,
    write_safetensors,
    write_settings,
)

__all__ = ["Folded", "MergeReport", "Onto", "fold_into", "is_stored_quantized", "merge"]

Onto = Literal["as-trained", "original"]


@dataclass(frozen=True, slots=True)
class Folded:
    """What was written, and what of the update survived rounding.

    `update_kept` is <W' - W, D> / <D, D> over all folded weights, 1 when nothing was lost: D is
    the adapter's update, W' the weight written, W what would have been written without D.
    `untied` says that head and embedding share a weight in the base and no longer do.
    """

    onto: Onto
    dtype: str
    modules: int
    update_kept: float
    untied: bool


@dataclass(frozen=True, slots=True)
class MergeReport:
    """A merged folder, and its agreement with the attached adapter where rows were given."""

    folder: str
    onto: Onto
    dtype: str
    modules: int
    update_kept: float
    agreement: Agreement | None
    untied: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def merge(
    base: BaseModel,
    adapter: Adapter,
    out: Path | str,
    *,
    onto: Onto = "as-trained",
    dtype: torch.dtype | None = None,
    rows: Sequence[Sequence[int]] = (),
    name: str | None = "default",
) -> MergeReport:
    """Write a plain Hugging Face folder of the base with the adapter folded in, onto one base.

    `base` is resident as it was in training, with the adapter attached as `name` if `rows` (token
    ids of documents) are given to compare predictions on. `runs.merge_run` and `merge_adapter` try
    both bases, measure them and write the model card; this is the folding alone.

    Errors as of `fold_into`; ConfigError: `out` holds something. Nothing is left behind then.
    """
    with whole_folder(out) as folder:
        folded = fold_into(base, adapter, folder, onto=onto, dtype=dtype)
        agreed = _agreement(base, folder, rows, name) if rows else None
    return MergeReport(folder=str(out), agreement=agreed, **asdict(folded))


def fold_into(
    base: BaseModel,
    adapter: Adapter,
    folder: Path,
    *,
    onto: Onto = "as-trained",
    dtype: torch.dtype | None = None,
) -> Folded:
    """Write weights, config and tokenizer of the merged model into an empty folder.

    `dtype` None keeps each tensor's stored type; of weights stored quantized, the type their
    config names. One tensor at a time stands in memory beside the base.

    AdapterError: the adapter does not fit this base, changes nothing, or rounding loses it;
    ModelError: `original` of a base stored quantized.
    """
    check_fit(base, adapter)
    refuse_no_change(base, adapter)
    settings = read_settings(base.folder)
    if onto == "original" and is_stored_quantized(base):
        raise ModelError(
            f"{base.folder}: its weights are stored quantized, there is no original to merge onto; "
            "use as-trained, or name the unquantized model as base"
        )
    with torch.no_grad():
        fold = Fold(
            base, adapter, onto=onto, dtype=dtype, packed_dtype=_packed_dtype(settings, base)
        )
        files: dict[str, dict[str, Entry]] = {}
        for path in weight_files(base.folder):
            with safe_open(path, framework="pt") as file:
                files[path.name] = fold.entries(file)
                write_safetensors(folder / path.name, files[path.name])
    fold.check()
    write_index(folder, files)
    write_settings(folder, _plain_settings(settings, dtype, untied=fold.untied))
    copy_companions(base.folder, folder)
    return Folded(
        onto=onto,
        dtype=str(dtype or "as stored").removeprefix("torch."),
        modules=fold.folded,
        update_kept=fold.kept,
        untied=fold.untied,
    )


def is_stored_quantized(base: BaseModel) -> bool:
    """Whether the base's own files hold codes, so that there are no 16-bit weights to merge onto."""
    return "quantization_config" in read_settings(base.folder)


def _agreement(
    base: BaseModel, folder: Path, rows: Sequence[Sequence[int]], name: str | None
) -> Agreement:
    examples = [_document(row, number) for number, row in enumerate(rows) if len(row) > 1]
    assert examples, "rows of at least two token ids to compare on"
    reference = Reference(Reader(base, name), (collate([each]) for each in examples))
    return reference.compare(Reader(beside(base, folder))).agreement


def _document(row: Sequence[int], number: int) -> Example:
    """Token ids as a document of which every token is looked at."""
    trained = np.ones(len(row), dtype=bool)
    trained[0] = False
    return Example(np.asarray(row, dtype=np.int32), trained, f"row {number + 1}", len(row))


def _packed_dtype(settings: dict[str, Any], base: BaseModel) -> torch.dtype:
    """The type that weights stored quantized are written in: the one their config names."""
    named = getattr(torch, str(settings.get("dtype") or settings.get("torch_dtype")), None)
    return named if isinstance(named, torch.dtype) else base.dtype


def _plain_settings(
    settings: dict[str, Any], dtype: torch.dtype | None, *, untied: bool
) -> dict[str, Any]:
    """config.json without quantization, with the type written and the tie that is left."""
    plain = {k: v for k, v in settings.items() if k != "quantization_config"}
    if dtype is not None:
        plain.pop("torch_dtype", None)
        plain["dtype"] = str(dtype).removeprefix("torch.")
    if untied:
        plain["tie_word_embeddings"] = False
    return plain
