"""A job's request as the description of a run: what is auto is settled, and written down.

What was settled once is read back when a job resumes, so that other defaults of a later server, or
another count of rows, cannot change a run on its way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pennyweight.config import RunConfig, resolve
from pennyweight.errors import DataError, DiskError
from pennyweight.files import make_folder, whole
from pennyweight.serve.jobs.asked import CreateJob, Hyperparameters, settings_of
from pennyweight.serve.settings import ServeSettings

__all__ = ["count_rows", "described", "keep", "kept"]

DESCRIPTION = "job.json"
_BLOCK = 1 << 20
# Rows in a step where the batch size is auto: a fiftieth of all, within these.
FEWEST_ROWS, MOST_ROWS, SHARE = 1, 16, 50


def described(
    asked: CreateJob,
    *,
    rows: int,
    train: Path,
    held_out: Path | None,
    seed: int,
    output_dir: Path,
    settings: ServeSettings,
    max_positions: int,
) -> tuple[RunConfig, dict[str, Any]]:
    """The run of a job, and its hyperparameters as numbers. ConfigError: they do not go together."""
    hyper = _numbers(asked.settled(), rows, settings)
    given = settings_of(asked, max_rank=settings.jobs.max_rank)
    base = settings.base.model_dump(exclude_unset=True)
    data: dict[str, Any] = {
        "train": str(train),
        "max_length": min(settings.jobs.max_length, max_positions),
        "packing": False,
        **given["data"],
    }
    if held_out is not None:
        data["eval"] = str(held_out)
        data.pop("eval_fraction", None)
    else:
        data.setdefault("eval_fraction", 0.0)
    training: dict[str, Any] = {
        "method": "lora" if settings.base.quantization == "none" else "qlora",
        "learning_rate": settings.jobs.learning_rate * hyper["learning_rate_multiplier"],
        "batch_size": hyper["batch_size"],
        **given["train"],
    }
    if "max_steps" not in training:
        training["epochs"] = float(hyper["n_epochs"])
    run = RunConfig.model_validate(
        {
            "base": base,
            "adapter": {**settings.jobs.adapter.model_dump(exclude_unset=True), **given["lora"]},
            "data": data,
            "train": training,
            "evaluate": {"generate_rows": 0},
            "output_dir": str(output_dir),
            "seed": seed,
        }
    )
    resolve(run)
    return run, hyper


def _numbers(hyper: Hyperparameters, rows: int, settings: ServeSettings) -> dict[str, Any]:
    auto = min(MOST_ROWS, max(FEWEST_ROWS, math.ceil(rows / SHARE)))
    epochs, batch, rate = hyper.n_epochs, hyper.batch_size, hyper.learning_rate_multiplier
    return {
        "n_epochs": settings.jobs.epochs if epochs == "auto" else epochs,
        "batch_size": auto if batch == "auto" else batch,
        "learning_rate_multiplier": 1.0 if rate == "auto" else rate,
    }


def count_rows(path: Path) -> int:
    """Lines that hold something. DataError: the file is gone."""
    rows, rest = 0, b""
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                lines = (rest + block).split(b"\n")
                rest = b"." if lines.pop().strip() else b""
                rows += sum(1 for line in lines if line.strip())
    except OSError as fault:
        raise DataError(
            f"{path.name}: cannot be read ({fault.strerror}); upload it again"
        ) from None
    return rows + bool(rest.strip())


def keep(run: RunConfig) -> None:
    """Write the description down, durable; `kept` is the inverse."""
    folder = Path(run.output_dir)
    make_folder(folder)
    with whole(folder / DESCRIPTION) as partial:
        partial.write_text(run.model_dump_json(exclude_unset=True), encoding="utf-8")


def kept(folder: Path) -> RunConfig:
    """The description of a job that was settled before."""
    try:
        found: Mapping[str, Any] | str = (folder / DESCRIPTION).read_text(encoding="utf-8")
        return RunConfig.model_validate_json(str(found))
    except (OSError, ValueError) as fault:
        raise DiskError(
            f"{folder / DESCRIPTION}: gone or changed ({fault}); create the job again"
        ) from None
