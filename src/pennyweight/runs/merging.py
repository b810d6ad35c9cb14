"""Merging from a run's folder alone, measured on the rows kept beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from pennyweight.errors import ConfigError
from pennyweight.lora import Adapter
from pennyweight.merge import MergeReport, merge
from pennyweight.runs.folder import RunFolder

__all__ = ["merge_run"]

ROWS_COMPARED = 16


def merge_run(
    folder: Path | str,
    out: Path | str,
    *,
    base: Literal["as-trained", "original"] = "as-trained",
    dtype: str | None = None,
) -> MergeReport:
    """Fold the run's adapter into its base and write a plain Hugging Face folder to `out`.

    `dtype` is `float32`, `bfloat16`, `float16`, or None to keep each tensor's stored type. The
    report compares logits with the attached model on up to 16 held-out rows.
    """
    run = RunFolder(Path(folder))
    config = run.config()
    if config.train.method == "full":
        raise ConfigError(
            f"{run.path}: method full tunes the whole model; it stands in {run.model}"
        )
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype {dtype}: use float32, bfloat16 or float16")
    _, resident = run.open()
    rows = run.read_held_out().rows
    return merge(
        resident,
        Adapter.load(run.adapter),
        out,
        onto=base,
        dtype=None if dtype is None else getattr(torch, dtype),
        rows=[rows[i].ids.tolist() for i in range(min(ROWS_COMPARED, len(rows)))],
    )
