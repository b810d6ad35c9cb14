"""Which merge is kept and which refused: measured on rows, whatever went wrong in the folding."""

from __future__ import annotations

import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pennyweight.data.conversation import Example
from pennyweight.errors import AdapterError, DataError, DiskError, MemoryExhausted, ModelError
from pennyweight.evaluate import LossReport, paired
from pennyweight.export import export_bitsandbytes
from pennyweight.generate import Request, generate
from pennyweight.lora import Adapter, attach
from pennyweight.merge import Agreement, agreement, fold
from pennyweight.model import BaseModel
from pennyweight.runs import candidates
from pennyweight.runs.candidates import Arm, Attempt, Trial, closest, trial, ways
from tests.conftest import build_model_folder
from tests.test_merge import base_of, logits, opened, tuned


def rows_of(count: int = 6, tokens: int = 24, *, seed: int = 0) -> list[Example]:
    draw = np.random.default_rng(seed)
    ids = [draw.integers(5, 280, tokens, dtype=np.int32) for _ in range(count)]
    trained = np.arange(tokens) >= tokens // 2
    return [Example(row, trained, f"row {i}", tokens) for i, row in enumerate(ids)]


def answered_by(base: BaseModel, count: int = 8, *, name: str | None = "default") -> list[Example]:
    """Rows whose answers are what `name` finds likeliest, so that it is best on them."""
    rows = rows_of(count)
    asked = [
        Request(tuple(map(int, row.ids[:12])), max_new_tokens=12, stop_ids=(), adapter=name)
        for row in rows
    ]
    answers = [completion.ids for completion in generate(base, asked)]
    return [
        Example(np.array([*row.ids[:12], *ids]), row.trained, row.source, 24)
        for row, ids in zip(rows, answers, strict=True)
    ]


def tried(
    base: BaseModel, adapter: Adapter, folder: Path, rows: list[Example] | None = None, **asked: Any
) -> Trial:
    folder.mkdir(exist_ok=True)
    asked = {"bases": ways(base, "auto"), "dtype": None, "say": lambda line: None, **asked}
    return trial(base, adapter, folder, rows or rows_of(), **asked)


def test_the_closer_one_is_kept_and_opens_with_the_adapters_logits(tiny_llama_folder, tmp_path):
    base = base_of(tiny_llama_folder, "nf4")
    adapter = tuned(base)
    found = tried(base, adapter, tmp_path / "m", answered_by(base))
    trained, original = found.attempts
    assert (trained.onto, original.onto) == ("as-trained", "original")
    assert found.kept is trained
    assert "closest" in found.why
    assert trained.arm.agreement.mean_kl < 1e-9 < 1e-3 < original.arm.agreement.mean_kl
    assert trained.arm.tuning_kept == pytest.approx(1, abs=1e-5)
    assert trained.arm.difference.mean == pytest.approx(0, abs=1e-5)
    assert found.base.difference.mean > 1
    assert found.base.agreement.mean_kl > original.arm.agreement.mean_kl
    assert found.adapter.agreement.mean_kl == 0
    torch.testing.assert_close(opened(tmp_path / "m"), logits(base), rtol=1e-4, atol=1e-4)
    assert not any(path.is_dir() for path in (tmp_path / "m").iterdir())


def test_the_figures_are_those_of_whole_logits(tiny_llama_folder, tmp_path, monkeypatch):
    """Against softmax, KL and loss as they are defined, on all logits at once."""
    monkeypatch.setattr("pennyweight.loss.MOST_LOGITS", 5 * 304)
    base = base_of(tiny_llama_folder, "nf4")
    adapter = tuned(base)
    rows = rows_of(3)
    arm = tried(base, adapter, tmp_path / "m", rows).base
    kl, same, right, losses, largest = [], [], [], [], []
    for row in rows:
        ids = torch.from_numpy(row.ids.astype(np.int64))
        at = torch.from_numpy(np.flatnonzero(row.trained)) - 1
        p, q = (logits(base, name, ids).double()[at] for name in ("default", None))
        largest.append(float((p - q).abs().max()))
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
        right += (q.argmax(-1) == ids[at + 1]).tolist()
        losses.append(float(torch.nn.functional.cross_entropy(q, ids[at + 1], reduction="sum")))
        p, q = p.softmax(-1), q.softmax(-1)
        kl += (p * (p / q).log()).sum(-1).tolist()
    assert arm.agreement.tokens == len(kl) == 36
    assert arm.agreement.mean_kl == pytest.approx(np.mean(kl), rel=1e-4)
    assert arm.agreement.top1_agreement == np.mean(same)
    assert arm.agreement.max_logit_difference == pytest.approx(max(largest), rel=1e-3)
    assert arm.losses.document_losses == pytest.approx(losses, rel=1e-4)
    assert arm.losses.correct == sum(right)


def test_which_bases_are_tried(tiny_llama_folder, tmp_path):
    assert ways(base_of(tiny_llama_folder), "auto") == ("as-trained",)
    assert ways(base_of(tiny_llama_folder), "original") == ("original",)
    base = base_of(tiny_llama_folder, "nf4")
    assert ways(base, "auto") == ("as-trained", "original")
    stored = base_of(export_bitsandbytes(base, tmp_path / "q"), "nf4")
    assert ways(stored, "auto") == ("as-trained",)
    with pytest.raises(ModelError, match="no original"):
        tried(stored, tuned(stored), tmp_path / "m", bases=("original",))


def shrunk(adapter: Adapter, by: float) -> Adapter:
    small = {path: (a.detach(), b.detach() * by) for path, (a, b) in adapter.factors.items()}
    return Adapter(adapter.config, small)


@pytest.mark.parametrize("by", [0.0, 0.3])
def test_a_merge_that_lost_the_tuning_is_refused_with_the_figures(
    tiny_llama_folder, tmp_path, monkeypatch, by
):
    """The update is folded in too small, or not at all: a wrong scale, a forgotten module."""
    base = base_of(tiny_llama_folder)
    adapter = tuned(base)
    rows, delta = answered_by(base), Adapter.delta
    monkeypatch.setattr(Adapter, "delta", lambda self, module: delta(self, module) * by)
    with pytest.raises(
        AdapterError, match=r"as-trained: lost the tuning.*of that gain; at least 90%"
    ):
        tried(base, adapter, tmp_path / "m", rows)
    with pytest.raises(AdapterError, match=r"nats a token \(KL\) from the adapter's"):
        tried(base, adapter, tmp_path / "again", rows_of(1))
    assert list((tmp_path / "m").iterdir()) == []


def test_an_update_that_rounding_loses_is_refused_for_each_base(tiny_llama_folder, tmp_path):
    folder = build_model_folder("llama", tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    halves = {key: value.bfloat16() for key, value in tensors.items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    base = base_of(folder, "nf4")
    adapter = shrunk(tuned(base), 1e-5)
    attach(base, adapter, name="small")
    with pytest.raises(AdapterError, match=r"original: only 1% of the update survives rounding"):
        tried(base, adapter, tmp_path / "m", name="small", bases=("original",))
    found = tried(base, adapter, tmp_path / "n", name="small", dtype=torch.float32)
    assert [each.refused is None for each in found.attempts] == [True, False]
    assert "lost the tuning" in found.notices[-1]


def test_an_adapter_that_does_nothing_is_refused(tiny_llama_folder, tmp_path):
    base = base_of(tiny_llama_folder)
    adapter = shrunk(tuned(base), 1e-9)
    attach(base, adapter, name="nothing")
    with pytest.raises(AdapterError, match=r"predicts what the bare base does.*was it trained"):
        tried(base, adapter, tmp_path / "m", name="nothing")


def test_what_float16_cannot_hold_is_refused_by_name(tmp_path):
    folder = build_model_folder("llama", tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    base = base_of(folder)
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.up_proj.*--dtype bfloat16 or float32"):
        tried(base, tuned(base), tmp_path / "m", dtype=torch.float16)


def test_another_base_is_refused_and_an_unmarked_one_is_said(tiny_llama_folder, tmp_path):
    base = base_of(tiny_llama_folder)
    adapter = tuned(base)
    other = base_of(build_model_folder("llama", tmp_path / "other", seed=1))
    with pytest.raises(AdapterError, match="was trained beside"):
        tried(other, adapter, tmp_path / "m")
    unmarked = Adapter(adapter.config, adapter.factors)  # as PEFT saves: no fingerprint
    attach(other, unmarked)
    # Rows on which the other base is at home; the strange adapter disturbs it.
    found = tried(other, unmarked, tmp_path / "n", answered_by(other, name=None))
    assert "the adapter is worse than its bare base" in found.notices[0]
    assert "the base it was trained on?" in found.notices[0]


def test_a_refused_candidate_leaves_the_other_and_is_said(tiny_llama_folder, tmp_path, monkeypatch):
    base = base_of(tiny_llama_folder, "nf4")
    adapter = tuned(base)
    source = fold.Fold._source
    monkeypatch.setattr(
        fold.Fold,
        "_source",
        lambda self, *args: source(self, *args) * (0.01 if self.onto == "as-trained" else 1),
    )
    found = tried(base, adapter, tmp_path / "m", answered_by(base))
    assert found.kept.onto == "original"
    assert found.why == "the other one is refused"
    assert found.notices[0].startswith("as-trained was refused: lost the tuning")
    plain = base_of(tiny_llama_folder)
    attach(plain, Adapter(adapter.config, adapter.factors))
    torch.testing.assert_close(opened(tmp_path / "m"), logits(plain), rtol=1e-4, atol=1e-4)


def attempt(onto: str, kl: list[float], losses: list[float]) -> Attempt:
    counts = (10,) * len(kl)
    report = LossReport(
        sum(losses), sum(counts), 0, tuple(map(str, range(len(kl)))), tuple(losses), counts
    )
    agreed = Agreement(sum(counts), 0.0, sum(kl) / sum(counts), 1.0)
    return Attempt(
        onto, None, Arm(onto, report, agreed, tuple(kl), paired(report, report), 1.0), None
    )


def test_the_rule_and_its_tie():
    near, far = [0.1, 0.2, 0.1, 0.2], [0.3, 0.5, 0.4, 0.4]
    low, high = [10.0, 11.0, 12.0, 13.0], [20.0, 21.0, 22.0, 23.0]
    first, second = attempt("as-trained", far, high), attempt("original", near, high)
    assert closest([first, second])[0] is second
    assert closest([second, first])[0] is second
    mixed = attempt("original", [0.2, 0.1, 0.2, 0.1], high)
    kept, why = closest([attempt("as-trained", near, high), mixed])
    assert kept.onto == "as-trained"
    assert why.startswith("a tie")
    alone = [attempt("as-trained", [0.5], [1.0]), attempt("original", [0.1], [1.0])]
    assert closest(alone)[0].onto == "original"
    assert closest([alone[0], attempt("original", [0.5], [1.0])])[1].startswith("a tie")
    # A lower loss is said and not taken.
    closer, better = attempt("as-trained", near, high), attempt("original", far, low)
    (notice,) = candidates._notices(closer, [closer, better])
    assert "original has the lower held-out loss (-1" in notice
    assert "--base original" in notice
    assert candidates._notices(closer, [closer, attempt("original", far, high)]) == ()


def test_one_candidate_in_memory_at_a_time(tiny_llama_folder, tmp_path, monkeypatch):
    base = base_of(tiny_llama_folder, "nf4")
    adapter = tuned(base)
    alive: list[weakref.ref] = []
    beside = candidates.beside

    def watched(*args: Any) -> BaseModel:
        assert [each() for each in alive] == [None] * len(alive)
        merged = beside(*args)
        alive.append(weakref.ref(merged.module))
        return merged

    monkeypatch.setattr(candidates, "beside", watched)
    tried(base, adapter, tmp_path / "m")
    assert len(alive) == 2
    assert [each() for each in alive] == [None, None]


def test_where_the_device_is_full_the_candidate_stands_on_the_cpu(tiny_llama_folder, monkeypatch):
    base, asked = base_of(tiny_llama_folder), []

    def load(config: Any) -> BaseModel:
        asked.append(config.device)
        if config.device == "cuda:0":
            raise MemoryExhausted("full")
        return base

    monkeypatch.setattr(agreement, "load_base", load)
    monkeypatch.setattr(BaseModel, "device", torch.device("cuda:0"))
    assert agreement.beside(base, tiny_llama_folder) is base
    assert asked == ["cuda:0", "cpu"]


def test_a_device_that_is_full_is_said_as_such(tiny_llama_folder, monkeypatch):
    from transformers import LlamaForCausalLM

    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", full)
    with pytest.raises(MemoryExhausted, match=r"do not fit cpu.*Tried to allocate"):
        base_of(tiny_llama_folder)


def test_predictions_that_are_not_finite_are_refused(tiny_llama_folder, tmp_path, monkeypatch):
    base = base_of(tiny_llama_folder)
    adapter = tuned(base)
    beside = candidates.beside

    def broken(*args: Any) -> BaseModel:
        merged = beside(*args)
        with torch.no_grad():
            next(merged.module.parameters()).fill_(math.nan)
        return merged

    monkeypatch.setattr(candidates, "beside", broken)
    with pytest.raises(AdapterError, match="predictions are not finite"):
        tried(base, adapter, tmp_path / "m")


def test_rows_that_train_nothing_are_refused(tiny_llama_folder, tmp_path):
    base = base_of(tiny_llama_folder)
    adapter = tuned(base)
    blank = [Example(r.ids, np.zeros(24, bool), r.source, 24) for r in rows_of()]
    with pytest.raises(DataError, match="train no token"):
        tried(base, adapter, tmp_path / "m", blank)


def test_a_full_disk_at_the_second_candidate_leaves_nothing(
    tiny_llama_folder, tmp_path, monkeypatch
):
    from pennyweight.merge import folder as writing
    from pennyweight.model.writing import whole_folder

    base = base_of(tiny_llama_folder, "nf4")
    adapter = tuned(base)
    written, copy = [], writing.copy_companions

    def fails(source: Path, to: Path) -> None:
        written.append(to.name)
        if to.name == "original":
            raise OSError(28, "No space left on device")
        copy(source, to)

    monkeypatch.setattr(writing, "copy_companions", fails)
    with pytest.raises(DiskError, match="No space"), whole_folder(tmp_path / "m") as folder:
        tried(base, adapter, folder)
    assert written == ["as-trained", "original"]
    assert list(tmp_path.iterdir()) == []
