"""Generated answers against their references: exact match, ROUGE-L, or the task's own check."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pennyweight.errors import DataError
from pennyweight.evaluate.intervals import Difference, bootstrap, wilson
from pennyweight.generate import Request, generate
from pennyweight.model import BaseModel

__all__ = ["AnswerReport", "evaluate_answers", "exact_match", "paired_answers", "rouge_l"]


@dataclass(frozen=True, slots=True)
class AnswerReport:
    """Generated answers beside their references, judged one by one.

    `correct`: what the task's own check said, or None where it has none. `cut`: answers that
    reached the longest length without a stop token.
    """

    answers: tuple[str, ...]
    references: tuple[str, ...]
    exact: tuple[bool, ...]
    rouge_l: tuple[float, ...]
    correct: tuple[bool, ...] | None
    cut: int

    @property
    def count(self) -> int:
        return len(self.answers)

    @property
    def exact_match(self) -> float:
        return sum(self.exact) / self.count

    @property
    def mean_rouge_l(self) -> float:
        return sum(self.rouge_l) / self.count

    @property
    def share_correct(self) -> float | None:
        return None if self.correct is None else sum(self.correct) / self.count

    def to_dict(self) -> dict[str, Any]:
        """The figures with their intervals; the texts stay in the value."""
        figures: dict[str, Any] = {
            "exact_match": self.exact_match,
            "exact_match_interval_95": wilson(sum(self.exact), self.count),
            "rouge_l": self.mean_rouge_l,
            "rouge_l_interval_95": bootstrap(self.rouge_l),
            "answers": self.count,
            "answers_cut": self.cut,
        }
        if self.correct is not None:
            figures["correct"] = self.share_correct
            figures["correct_interval_95"] = wilson(sum(self.correct), self.count)
        return figures


def evaluate_answers(
    base: BaseModel,
    requests: Sequence[Request],
    references: Sequence[str],
    *,
    is_correct: Callable[[str, str], bool] | None = None,
    batch_size: int = 16,
) -> AnswerReport:
    """Answer every request and hold the text against its reference.

    `is_correct(answer, reference)` is the task's own check, where it has one.
    """
    assert len(requests) == len(references), "one reference for each request"
    if not requests:
        raise DataError("no held-out rows to answer; raise `evaluate.generate_rows` above 0")
    completions = generate(base, requests, batch_size=batch_size)
    answers = [
        str(base.tokenizer.decode(list(c.ids), skip_special_tokens=True)) for c in completions
    ]
    pairs = list(zip(answers, references, strict=True))
    return AnswerReport(
        answers=tuple(answers),
        references=tuple(references),
        exact=tuple(exact_match(answer, reference) for answer, reference in pairs),
        rouge_l=tuple(rouge_l(answer, reference) for answer, reference in pairs),
        correct=None if is_correct is None else tuple(bool(is_correct(*pair)) for pair in pairs),
        cut=sum(c.stop_reason == "length" for c in completions),
    )


def paired_answers(before: AnswerReport, after: AnswerReport) -> Difference:
    """Difference in the share of right answers: by the task's check, or exact match without one."""
    if before.references != after.references:
        raise DataError("the two sets of answers have different references; answer the same rows")
    old = before.exact if before.correct is None else before.correct
    new = after.exact if after.correct is None else after.correct
    changes = [float(b) - float(a) for a, b in zip(old, new, strict=True)]
    return Difference(math.fsum(changes) / len(changes), bootstrap(changes), len(changes))


def exact_match(answer: str, reference: str) -> bool:
    """Equal but for white space at either end."""
    return answer.strip() == reference.strip()


def rouge_l(answer: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words (Lin 2004, section 3.1, beta 1).

    Words are runs of letters and digits in lower case, without stemming: on ASCII text as
    `rouge_score` counts them, and letters of other scripts are letters too.
    """
    said, meant = _words(answer), _words(reference)
    if not said or not meant:
        return 0.0
    return 2 * _common_subsequence(said, meant) / (len(said) + len(meant))


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _common_subsequence(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence, a column of the table in one integer
    (Hyyro 2004): bit i is 0 where the length grows at word i of `first`."""
    at: dict[str, int] = {}
    for i, word in enumerate(first):
        at[word] = at.get(word, 0) | 1 << i
    everything = (1 << len(first)) - 1
    row = everything
    for word in second:
        match = row & at.get(word, 0)
        row = ((row + match) | (row - match)) & everything
    return len(first) - row.bit_count()
