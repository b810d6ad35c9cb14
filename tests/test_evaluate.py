"""Losses against transformers' own, text scores against their definitions, intervals against tables."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pennyweight.config import BaseConfig
from pennyweight.data.batch import Batch
from pennyweight.errors import AdapterError, DataError, DivergedError, MemoryExhausted
from pennyweight.evaluate import (
    LossReport,
    bootstrap,
    evaluate_answers,
    evaluate_loss,
    paired,
    paired_answers,
    read_by,
    rouge_l,
    student,
    wilson,
)
from pennyweight.generate import Request
from pennyweight.model import BaseModel, load_base


@pytest.fixture(scope="module")
def base(tiny_llama_folder: Path) -> BaseModel:
    return load_base(BaseConfig(model=str(tiny_llama_folder), quantization="none", device="cpu"))


def batch(*lengths: int, source: str = "held-out.jsonl") -> Batch:
    ends = np.cumsum(lengths)
    return Batch(
        ids=torch.randint(5, 288, (int(ends[-1]),)),
        trained=torch.rand(int(ends[-1])) < 0.6,
        positions=torch.cat([torch.arange(length) for length in lengths]),
        boundaries=(0, *map(int, ends)),
        adapters=(None,) * len(lengths),
        sources=tuple(f"{source}:{i + 1}" for i in range(len(lengths))),
    )


def test_where_memory_does_not_do_smaller_parts_give_the_same(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pennyweight.evaluate import losses

    batches = [batch(9, 14, 3, 20), batch(20, 4, source="more.jsonl")]
    whole = evaluate_loss(base, batches)
    assert whole.limit_tokens is None
    real, tried = losses._document_losses, []

    def tight(base: BaseModel, part: Batch) -> tuple[int, list[float], list[int]]:
        tried.append(part.tokens)
        if part.tokens > 20:
            raise torch.OutOfMemoryError("injected")
        return real(base, part)

    monkeypatch.setattr(losses, "_document_losses", tight)
    found = evaluate_loss(base, batches)
    # Half of 46 is still too much for 9 + 14; half of that leaves the two shortest together.
    assert tried == [46, 23, 9, 14, 3, 20, 20, 4]
    assert found.limit_tokens is not None
    assert found.sources == whole.sources
    assert (found.count, found.correct) == (whole.count, whole.correct)
    assert found.document_losses == pytest.approx(whole.document_losses, rel=1e-6)
    with pytest.raises(MemoryExhausted, match=r"held-out.jsonl:1: one held-out row of 21 tokens"):
        evaluate_loss(base, [batch(21)])


def test_loss_is_transformers_loss_of_each_row(base: BaseModel, tiny_llama_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    batches = [batch(9, 14, 3), batch(20, source="more.jsonl")]
    report = evaluate_loss(base, batches)
    sums, counts, right = [], [], 0
    for each in batches:
        ends = torch.tensor(each.boundaries[1:-1], dtype=torch.long)
        pairs = zip(each.ids.tensor_split(ends), each.trained.tensor_split(ends), strict=True)
        for ids, trained in pairs:
            labels = torch.where(trained, ids, -100)
            with torch.no_grad():
                out = reference(ids[None], labels=labels[None])
            count = int(trained[1:].sum())
            counts.append(count)
            sums.append(float(out.loss) * count if count else 0.0)
            right += int(((out.logits[0, :-1].argmax(-1) == ids[1:]) & trained[1:]).sum())
    assert report.document_counts == tuple(counts)
    assert report.document_losses == pytest.approx(sums, rel=1e-4)
    assert report.loss == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    assert report.perplexity == pytest.approx(math.exp(report.loss))
    assert report.token_accuracy == right / sum(counts)
    assert report.sources[-1] == "more.jsonl:1"
    low, high = report.interval or (0.0, 0.0)
    assert low < report.loss < high
    json.dumps(report.to_dict(), allow_nan=False)


def test_chunks_of_logits_change_nothing(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [batch(9, 14, 3)]
    whole = evaluate_loss(base, batches)
    monkeypatch.setattr("pennyweight.loss.MOST_LOGITS", 2 * base.vocab_size)
    chunked = evaluate_loss(base, batches)
    assert chunked.count == whole.count
    assert chunked.document_losses == pytest.approx(whole.document_losses, rel=1e-6)


def test_rows_that_train_nothing_are_refused(base: BaseModel) -> None:
    one = batch(5, 6)
    with pytest.raises(DataError, match="2 held-out rows train no token"):
        evaluate_loss(base, [replace(one, trained=torch.zeros_like(one.trained))])
    with pytest.raises(DataError, match="0 held-out rows"):
        evaluate_loss(base, [])


def test_a_loss_that_is_not_finite_names_its_row(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = base.hidden
    monkeypatch.setattr(
        base,
        "hidden",
        lambda ids, at: hidden(ids, at).index_fill(0, torch.tensor([6, 7]), math.nan),
    )
    one = batch(5, 6)
    with pytest.raises(DivergedError, match=r"held-out.jsonl:2: the loss .* is nan"):
        evaluate_loss(base, [replace(one, trained=torch.ones_like(one.trained))])


def test_an_adapter_that_is_not_there_is_no_bare_base(base: BaseModel) -> None:
    with pytest.raises(AdapterError, match="adapter 'sql', which is not attached; attached: none"):
        evaluate_loss(base, read_by([batch(3, 4)], "sql"))


def test_read_by_names_the_adapter_for_every_row() -> None:
    assert [b.adapters for b in read_by([batch(3, 4)], "sql")] == [("sql", "sql")]


def test_pairs_are_compared_row_by_row() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(50, 20, 200)
    counts = tuple(int(n) for n in rng.integers(5, 30, 200))
    sources = tuple(map(str, range(200)))

    def report(losses: np.ndarray) -> LossReport:
        return LossReport(float(losses.sum()), sum(counts), 0, sources, tuple(losses), counts)

    before, after = report(hard), report(hard - 0.1 * np.array(counts) + rng.normal(0, 0.1, 200))
    change = paired(before, after)
    low, high = change.interval or (0.0, 0.0)
    assert change.mean == pytest.approx(after.loss - before.loss)
    assert low < -0.1 < high < 0
    assert high - low < 0.01, "what is hard for both cancels"
    assert paired(before, before).interval == (0.0, 0.0)
    with pytest.raises(DataError, match="different rows"):
        paired(before, replace(after, sources=(*sources[:-1], "other")))


def test_answers_are_judged_by_text_and_by_the_tasks_own_check(base: BaseModel) -> None:
    requests = [Request((5, 7, 9), max_new_tokens=6), Request((44, 12), max_new_tokens=6)]
    said = evaluate_answers(base, requests, ["x", "y"]).answers
    report = evaluate_answers(
        base,
        requests,
        [f" {said[0]}\n", "no such words"],
        is_correct=lambda a, r: r.startswith("no"),
    )
    assert report.answers == said
    assert report.exact == (True, False)
    assert report.exact_match == 0.5
    assert report.correct == (False, True)
    assert report.count == 2
    figures = report.to_dict()
    assert figures["correct"] == 0.5
    assert figures["exact_match_interval_95"] == wilson(1, 2)
    json.dumps(figures, allow_nan=False)
    change = paired_answers(report, replace(report, correct=(True, True)))
    assert change.mean == 0.5
    with pytest.raises(DataError, match="no held-out rows"):
        evaluate_answers(base, [], [])


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("the cat was under the bed", "The cat was found, under the bed.", 12 / 13),
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("snake_case 3.5", "snake case 3 5", 1.0),
        ("Äpfel", "äpfel", 1.0),
        ("", "words", 0.0),
        ("...", "...", 0.0),
    ],
)
def test_rouge_l_by_its_definition(answer: str, reference: str, score: float) -> None:
    assert rouge_l(answer, reference) == pytest.approx(score)


def test_rouge_l_is_the_table_of_the_longest_common_subsequence() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        first, second = (rng.integers(0, 6, rng.integers(1, 90)).tolist() for _ in range(2))
        table = np.zeros((len(first) + 1, len(second) + 1), dtype=int)
        for i, a in enumerate(first):
            for j, b in enumerate(second):
                table[i + 1, j + 1] = (
                    table[i, j] + 1 if a == b else max(table[i, j + 1], table[i + 1, j])
                )
        found = rouge_l(" ".join(map(str, first)), " ".join(map(str, second)))
        assert found == pytest.approx(2 * table[-1, -1] / (len(first) + len(second)))


def test_wilson_by_published_values() -> None:
    """Newcombe 1998, table I, method 3: 81/263, 15/148, 0/20, 1/29."""
    for successes, trials, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_bootstrap_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for trial in range(60):
        interval = bootstrap(rng.normal(3, 1, 60).tolist(), seed=trial)
        assert interval is not None
        hits += interval[0] < 3 < interval[1]
    assert 50 <= hits <= 60
    assert bootstrap([1.0]) is None
    assert bootstrap([2.0, 6.0], [1, 3]) == (2.0, 2.0)
    assert bootstrap([1.0, 2.0, 4.0]) == bootstrap([1.0, 2.0, 4.0])


@pytest.mark.parametrize(
    ("folder", "quantization", "key"),
    [
        ("stories260k", "none", "fp32"),
        ("stories260k-bnb-nf4", "nf4", "nf4"),
        ("stories260k-bnb-nf4-dq", "nf4", "nf4_dq"),
    ],
)
def test_real_models_have_their_known_losses(
    shared_data: Path, folder: str, quantization: str, key: str
) -> None:
    models = shared_data / "models"
    base = load_base(
        BaseConfig.model_validate(
            {"model": str(models / folder), "quantization": quantization, "device": "cpu"}
        )
    )
    stories = shared_data / "text" / "tinystories" / "tinystories_1000.json"
    texts = json.loads(stories.read_text(encoding="utf-8"))[:20]
    rows = [[1, *base.tokenizer(text, add_special_tokens=False).input_ids][:400] for text in texts]
    ends = np.cumsum([len(row) for row in rows])
    packed = Batch(
        ids=torch.tensor([token for row in rows for token in row]),
        trained=torch.ones(int(ends[-1]), dtype=torch.bool),
        positions=torch.cat([torch.arange(len(row)) for row in rows]),
        boundaries=(0, *map(int, ends)),
        adapters=(None,) * len(rows),
        sources=tuple(f"{stories.name}:{i}" for i in range(len(rows))),
    )
    golden = json.loads((models / "GOLDEN_bnb_losses.json").read_text(encoding="utf-8"))
    assert evaluate_loss(base, [packed]).loss == pytest.approx(golden["stories260k"][key], abs=1e-5)


@pytest.mark.parametrize(
    ("count", "quantile"), [(2, 12.706), (3, 4.303), (9, 2.306), (10, 2.262), (31, 2.042)]
)
def test_student_is_the_table(count: int, quantile: float) -> None:
    values = [float(i) for i in range(count)]
    spread = np.std(values, ddof=1) / math.sqrt(count)
    between = student(values)
    assert between is not None
    assert (between[1] - between[0]) / 2 == pytest.approx(quantile * spread, rel=3e-4)
    assert sum(between) / 2 == pytest.approx((count - 1) / 2)
    assert student([1.0]) is None


def test_a_bootstrap_over_ratios_takes_any_weights() -> None:
    """As for the share of one gain in another, both summed over the same documents."""
    between = bootstrap([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert between == pytest.approx((0.5, 0.5))
    assert bootstrap([1.0, -1.0], [0.5, -0.5]) is not None
