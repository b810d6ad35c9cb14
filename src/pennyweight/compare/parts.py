"""The parts of a comparison that run in processes of their own. A job is plain JSON, and so is its
answer; the training of an arm is no part of ours but `pennyweight train`.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pennyweight.compare.folder import read_answer, write_answer
from pennyweight.compare.general import general_examples
from pennyweight.compare.range_test import RangeTest, best_rate, grid, shortened, walked
from pennyweight.compare.spectrum import spectra
from pennyweight.config import EvaluateConfig, RunConfig
from pennyweight.data.examples import Examples, load_folder, save_folder
from pennyweight.data.prepare import prepare
from pennyweight.errors import DiskError, MemoryExhausted
from pennyweight.evaluate import LossReport, evaluate_loss, in_batches, read_by
from pennyweight.finetune.run import data_size
from pennyweight.lora import Adapter, attach
from pennyweight.model import (
    BaseModel,
    find_folder,
    fingerprint,
    load_base,
    load_tokenizer,
    read_config,
    stop_ids,
)
from pennyweight.plan import plan
from pennyweight.runs import HeldOut, RunFolder, adapter_slot, measure
from pennyweight.train.memory import is_out_of_memory

__all__ = ["PARTS", "run_part"]

Job = Mapping[str, Any]
GENERAL = "general"
LEAST_GENERAL_LENGTH = 512


def run_part(name: str, job: Job) -> dict[str, Any]:
    """Do one part; memory that runs out is MemoryExhausted, wherever it was asked for."""
    try:
        return PARTS[name](job)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        first = next(iter(str(error).splitlines()), "")
        raise MemoryExhausted(f"out of memory: {first}") from error


def groundwork(job: Job) -> dict[str, Any]:
    """Prepare the rows all arms share, keep those they are judged on, and plan every arm.

    Job: `config`; `arms`, a run by name; `folder`, where the held-out rows and the general text go.
    """
    config, folder = RunConfig.model_validate(job["config"]), Path(job["folder"])
    tokenizer = load_tokenizer(config.base.model)
    ends = stop_ids(config.base.model, tokenizer)
    stop_id = ends[0] if ends else None
    data = prepare(config.data, tokenizer, seed=config.seed, stop_id=stop_id)
    folder.mkdir(parents=True, exist_ok=True)
    RunFolder(folder).keep_held_out(data, config.evaluate.max_rows)
    general = general_examples(
        config.compare.general_text,
        config.compare.general_rows,
        tokenizer,
        max_length=_general_length(config),
        stop_id=stop_id,
        folder=folder,
    )
    shutil.rmtree(folder / GENERAL, ignore_errors=True)
    save_folder(folder / GENERAL, {GENERAL: general}, {"named": config.compare.general_text})
    size = data_size(data)
    plans = {
        name: plan(RunConfig.model_validate(run), rows=size) for name, run in job["arms"].items()
    }
    return {
        "data": data.fingerprint,
        "base": fingerprint(find_folder(config.base.model)),
        "lines": data.ledger.lines(),
        "train_rows": size.rows,
        "train_tokens": size.tokens,
        "test_rows": min(len(data.eval), config.evaluate.max_rows),
        "general_documents": len(general),
        "general": hashlib.sha256(b"".join(e.ids.tobytes() for e in general)).hexdigest(),
        "plans": {
            name: {
                "fits": said.fits,
                "sentence": said.sentence(),
                "peak_bytes": said.counted_peak_bytes,
                "recompute": said.recompute,
            }
            for name, said in plans.items()
        },
    }


def range_test(job: Job) -> dict[str, Any]:
    """The best learning rate of one arm, with the curve it was read from.

    Job: `config`, the arm's run; `from`, `to`, `points`, `steps`, `rows`; `recompute`; `file`, where
    each rate is kept as soon as it is known; `identity`, what a kept one must have been made with.
    """
    config = shortened(RunConfig.model_validate(job["config"]), job["steps"])
    tokenizer = load_tokenizer(config.base.model)
    ends = stop_ids(config.base.model, tokenizer)
    data = prepare(config.data, tokenizer, seed=config.seed, stop_id=ends[0] if ends else None)
    test = RangeTest(config, data.train, job["rows"], recompute=job["recompute"])
    file = Path(job["file"])
    kept = read_answer(file, job["identity"]) or {"tried": {}}
    known = dict(kept["tried"])

    def tried(rate: float) -> Mapping[str, Any]:
        if f"{rate:g}" not in known:
            known[f"{rate:g}"] = test.tried(rate)
            write_answer(file, {"tried": known}, job["identity"])
            loss = known[f"{rate:g}"]["loss"]
            told = "diverged" if loss is None else f"loss {loss:.4f}"
            print(f"  lr {rate:.2e}  {told}")
        return known[f"{rate:g}"]

    points = walked(grid(job["from"], job["to"], job["points"]), tried)
    best = best_rate(points)
    answer = {
        "tried": known,
        "chosen": None if best is None else points[best]["learning_rate"],
        "before": test.before.loss,
        "rows": len(test.judged),
        "steps": job["steps"],
    }
    write_answer(file, answer, job["identity"])
    return answer


def measured(job: Job) -> dict[str, Any]:
    """What tuned models are worth on the rows kept, on the general text, and of what rank they are.

    Job: `config`, a run of the arm; `runs`, folders of finished ones; `folder`, where the held-out
    rows and the general text stand; `base`, whether the untuned base is measured too. An answer for
    each run by its folder, the base's under `base`.
    """
    config, folder = RunConfig.model_validate(job["config"]), Path(job["folder"])
    held, general = RunFolder(folder).read_held_out(), _general(folder)
    answers: dict[str, Any] = {}
    base: BaseModel | None = None
    slot = adapter_slot(config)
    if job["base"] or (slot is not None and job["runs"]):
        base = load_base(config.base)
    if job["base"]:
        assert base is not None
        answers["base"] = _figures(base, None, held, general, folder, config.evaluate)
    for number, run in enumerate(job["runs"]):
        if slot is None:
            _, tuned = RunFolder(Path(run)).open()
            answers[run] = _figures(tuned, None, held, general, folder, config.evaluate)
            answers[run]["bytes"] = _size(RunFolder(Path(run)).model)
            continue
        assert base is not None
        adapter = Adapter.load(RunFolder(Path(run)).adapter)
        name = f"run-{number}"
        attach(base, adapter, name=name, trainable=False)
        answers[run] = _figures(base, name, held, general, folder, config.evaluate)
        answers[run]["bytes"] = _size(RunFolder(Path(run)).adapter)
        answers[run]["spectra"] = spectra(adapter)
    return answers


PARTS: Mapping[str, Callable[[Job], dict[str, Any]]] = {
    "groundwork": groundwork,
    "range_test": range_test,
    "measured": measured,
}


def _figures(
    base: BaseModel,
    adapter: str | None,
    held: HeldOut,
    general: Examples,
    folder: Path,
    settings: EvaluateConfig,
) -> dict[str, Any]:
    """One model's sums and counts, document by document, on both texts; and its answers, judged."""
    ends = RunFolder(folder).renderer(base.tokenizer).stop_ids
    test = measure(base, held, settings, adapter=adapter, stop_ids=ends)
    told = {
        "test": _documents(test.losses),
        "general": _documents(evaluate_loss(base, read_by(in_batches(general), adapter))),
        "answers": None,
    }
    if test.answers is not None:
        right = test.answers.exact if test.answers.correct is None else test.answers.correct
        told["answers"] = {
            "judged": "exact match" if test.answers.correct is None else "correct",
            "right": [float(each) for each in right],
        }
    return told


def _general_length(config: RunConfig) -> int:
    """Tokens of a general document: as long as the run's rows, and long enough to be prose."""
    told = read_config(find_folder(config.base.model, weights=False)).get_text_config(decoder=True)
    most = int(getattr(told, "max_position_embeddings", None) or LEAST_GENERAL_LENGTH)
    return min(most, max(config.data.max_length, LEAST_GENERAL_LENGTH))


def _documents(report: LossReport) -> dict[str, Any]:
    return {"losses": report.document_losses, "counts": report.document_counts}


def _general(folder: Path) -> Examples:
    found = load_folder(folder / GENERAL)
    if found is None:
        raise DiskError(f"{folder / GENERAL}: missing or changed; the same command makes it again")
    return found.parts[GENERAL]


def _size(folder: Path) -> int:
    """Bytes of weights in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
