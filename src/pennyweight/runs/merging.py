"""Merging from a run's folder, or from an adapter's alone: both bases tried, measured, written down."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from pennyweight.config import (
    BaseConfig,
    DataConfig,
    Quantization,
    is_hub_id,
    public,
    public_name,
)
from pennyweight.data.chat import Renderer
from pennyweight.data.conversation import Example
from pennyweight.data.prepare import prepare
from pennyweight.errors import ConfigError
from pennyweight.generate import Request, generate
from pennyweight.lora import Adapter, attach
from pennyweight.merge import Agreement, Onto
from pennyweight.model import BaseModel, license_of, load_base
from pennyweight.model.writing import refuse_taken, whole_folder
from pennyweight.report import plain
from pennyweight.runs.candidates import Trial, trial, ways
from pennyweight.runs.card import merged_card
from pennyweight.runs.dressing import dress
from pennyweight.runs.folder import RECEIPT, RunFolder
from pennyweight.runs.receipt import versions

__all__ = ["MeasuredMerge", "base_of", "merge_adapter", "merge_folder", "merge_run"]

MERGE_FILE = "merge.json"
SCHEMA_VERSION = 1
ROWS_COMPARED = 100
OWN_TEXTS, OWN_TOKENS = 8, 64
SLOT = "default"
Bases = Literal["auto", "as-trained", "original"]


@dataclass(frozen=True, slots=True)
class MeasuredMerge:
    """What was written to `folder`, and how every way to write it measured.

    `models`: the unmerged adapter, each candidate and the bare base, each with its figures on the
    same `rows`, which are `measured_on`. `why`: the reason that `onto` was kept.
    """

    folder: str
    onto: Onto
    why: str
    dtype: str
    modules: int
    untied: bool
    update_kept: float
    rows: int
    measured_on: str
    agreement: Agreement
    models: tuple[dict[str, Any], ...]
    notices: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Asked:
    """How to merge, checked."""

    bases: Bases
    dtype: torch.dtype | None
    say: Callable[[str], None]

    @classmethod
    def of(cls, bases: Bases, dtype: str | None, say: Callable[[str], None] | None) -> _Asked:
        if dtype not in (None, "float32", "bfloat16", "float16"):
            raise ConfigError(f"--dtype {dtype}: use float32, bfloat16 or float16")
        return cls(bases, None if dtype is None else getattr(torch, dtype), say or _to_stderr)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows to compare on, and what they are."""

    examples: Sequence[Example]
    are: str


@dataclass(frozen=True, slots=True)
class _Trained:
    """What a run knows of its adapter beside the weights: the rendering, which the merged folder then
    speaks by, and the receipt."""

    renderer: Renderer
    receipt: Mapping[str, Any] | None


def merge_run(
    folder: Path | str,
    out: Path | str,
    *,
    base: Bases = "auto",
    dtype: str | None = None,
    data: Path | str | None = None,
    rows: int = ROWS_COMPARED,
    say: Callable[[str], None] | None = None,
) -> MeasuredMerge:
    """Fold the run's adapter into its base and write a plain Hugging Face folder to `out`.

    `base` auto tries the weights that the adapter was trained beside and those of the base's files,
    and keeps the closer one (`candidates` has the rule). `dtype` is `float32`, `bfloat16`,
    `float16`, or None to keep each tensor's stored type. Compared are up to `rows` rows of `data`,
    by default those that the run held out. `say` takes lines of progress, by default to stderr.

    AdapterError: every candidate lost the tuning or changed nothing, with the figures. Nothing is
    left behind then.
    """
    asked = _Asked.of(base, dtype, say)
    refuse_taken(out)  # not only when the base was read
    run = RunFolder(Path(folder))
    config = run.config()
    if config.train.method == "full":
        raise ConfigError(
            f"{run.path}: method full tunes the whole model; it stands in {run.model}"
        )
    _, resident = run.open()
    trained = _Trained(run.renderer(resident.tokenizer), run.receipt())
    held = run.read_held_out()
    if data is None:
        found = _Rows(held.rows[:rows], "held-out rows of the run")
    else:
        like, day = run.rendering(config.data), held.rendering.get("day")
        found = _rows_of(data, resident, rows, like=like, day=day)
    return _merge(resident, Adapter.load(run.adapter), out, found, asked, trained)


def merge_adapter(
    folder: Path | str,
    out: Path | str,
    *,
    model: str | None = None,
    quantization: str | None = None,
    base: Bases = "auto",
    dtype: str | None = None,
    data: Path | str | None = None,
    rows: int = ROWS_COMPARED,
    say: Callable[[str], None] | None = None,
) -> MeasuredMerge:
    """Fold an adapter in PEFT's layout into its base, without the run that made it.

    `model` is the base, by default the one that the adapter names; `quantization` how the base was
    held in training, by default as the adapter says, else not at all. Compared are up to `rows`
    rows of `data`, a file in any format that training takes; without it, texts that the adapter
    writes itself. The rest is as in `merge_run`.
    """
    asked = _Asked.of(base, dtype, say)
    refuse_taken(out)  # not only when the base was read
    adapter = Adapter.load(folder)
    resident = load_base(base_of(Path(folder), adapter, model, quantization))
    attach(resident, adapter, trainable=False)
    if data is None:
        found = _Rows((), "")
    else:
        longest = min(DataConfig().max_length, resident.max_positions)
        found = _rows_of(data, resident, rows, like=DataConfig(max_length=longest))
    return _merge(resident, adapter, out, found, asked)


def merge_folder(
    folder: Path | str,
    out: Path | str,
    *,
    model: str | None = None,
    quantization: str | None = None,
    **asked: Any,
) -> MeasuredMerge:
    """`merge_adapter` for the folder of an adapter, `merge_run` for that of a run."""
    if (Path(folder) / "adapter_config.json").is_file():
        return merge_adapter(folder, out, model=model, quantization=quantization, **asked)
    if model is not None or quantization is not None:
        raise ConfigError(
            f"{folder}: a run knows its base; --model and --quantization are for an adapter's folder"
        )
    return merge_run(folder, out, **asked)


def base_of(
    folder: Path, adapter: Adapter, model: str | None, quantization: str | None
) -> BaseConfig:
    """The base that the adapter was trained beside, as far as it says so itself."""
    held = quantization or adapter.about.get("base_quantization") or "none"
    named = model or adapter.base_name
    known = get_args(Quantization)
    if held not in known:
        raise ConfigError(f"{folder}: its base was held as {held!r}; known are {', '.join(known)}")
    if not named:
        raise ConfigError(f"{folder}: the adapter names no base; give --model")
    settings: dict[str, Any] = {"model": named, "quantization": held}
    if held in ("nf4", "fp4"):
        twice = adapter.about.get("base_double_quantization")
        settings["double_quantization"] = twice is not False
    return BaseConfig.model_validate(settings)


def _rows_of(
    data: Path | str, base: BaseModel, most: int, *, like: DataConfig, day: str | None = None
) -> _Rows:
    """The first rows of a file, rendered as `like` says; `day` is what templates take for today."""
    config = like.model_copy(update={"train": str(data), "eval": None, "eval_fraction": 0.0})
    stop_id = base.stop_ids[0] if base.stop_ids else None
    # Nothing is trained on them, so the limits of training data do not hold.
    prepared = prepare(config, base.tokenizer, seed=0, stop_id=stop_id, limited=False, day=day)
    rows = prepared.train
    return _Rows(rows[:most], f"rows of {Path(data).name}")


def _own_words(base: BaseModel) -> _Rows:
    """Texts drawn from the adapter at temperature 1: where nothing is held out, its own words tell
    two models apart as well."""
    start = base.tokenizer.bos_token_id
    if start is None:
        start = base.stop_ids[0] if base.stop_ids else 0
    most = min(OWN_TOKENS, base.max_positions - 1)
    requests = [
        Request(
            (start,), max_new_tokens=most, temperature=1.0, seed=seed, stop_ids=(), adapter=SLOT
        )
        for seed in range(OWN_TEXTS)
    ]
    examples = []
    for number, completion in enumerate(generate(base, requests), 1):
        ids = np.array([start, *completion.ids], dtype=np.int32)
        trained = np.arange(len(ids)) > 0
        examples.append(Example(ids, trained, f"own text {number}", len(ids)))
    return _Rows(examples, "texts that the adapter wrote itself")


def _merge(
    base: BaseModel,
    adapter: Adapter,
    out: Path | str,
    rows: _Rows,
    asked: _Asked,
    trained: _Trained | None = None,
) -> MeasuredMerge:
    with whole_folder(out) as folder:
        if not len(rows.examples):
            asked.say("no rows to compare on: the adapter writes some itself")
            rows = _own_words(base)
        found = trial(
            base,
            adapter,
            folder,
            rows.examples,
            bases=ways(base, asked.bases),
            dtype=asked.dtype,
            say=asked.say,
        )
        if trained is not None:
            dress(folder, trained.renderer)
        report = _report(out, found, rows)
        _describe(folder, report, base, adapter, None if trained is None else trained.receipt)
    return report


def _describe(
    folder: Path,
    report: MeasuredMerge,
    base: BaseModel,
    adapter: Adapter,
    receipt: Mapping[str, Any] | None,
) -> None:
    """Write `merge.json`, the model card, and the run's receipt beside them; nothing private in any."""
    told: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        **public(plain(report.to_dict()), {base.name: public_name(base.name)}),
        "name": Path(report.folder).name,
        "versions": versions(),
        "base": {
            "model": public_name(base.name),
            "hub_id": base.name if is_hub_id(base.name) else None,
            "fingerprint": base.fingerprint,
            "quantization": base.quantization,
            **license_of(base.folder),
        },
        "adapter": {"r": adapter.config.r, "parameters": adapter.parameters},
    }
    del told["folder"]
    try:
        card = merged_card(told, receipt)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        # Of an earlier version, or changed by somebody: no reason to lose the merge.
        told["notices"] = [*told["notices"], "the run's receipt could not be read; it is left out"]
        card, receipt = merged_card(told, None), None
    written = {MERGE_FILE: _json(told), "README.md": card}
    if receipt is not None:
        written[RECEIPT] = _json(receipt)
    for name, text in written.items():
        (folder / name).write_text(text, encoding="utf-8")


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def _report(out: Path | str, found: Trial, rows: _Rows) -> MeasuredMerge:
    folded, arm = found.kept.folded, found.kept.arm
    assert folded is not None, "what was kept was written"
    assert arm is not None, "and measured"
    return MeasuredMerge(
        folder=str(out),
        onto=folded.onto,
        why=found.why,
        dtype=folded.dtype,
        modules=folded.modules,
        untied=folded.untied,
        update_kept=folded.update_kept,
        rows=len(rows.examples),
        measured_on=rows.are,
        agreement=arm.agreement,
        models=(
            found.adapter.to_dict(),
            *(attempt.to_dict() for attempt in found.attempts),
            found.base.to_dict(),
        ),
        notices=found.notices,
    )


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
