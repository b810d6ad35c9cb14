"""What a model is worth on held-out rows: losses and answers, each with its count and interval.

Sums and counts travel together and are divided once, when asked.
"""

from pennyweight.evaluate.answers import (
    AnswerReport,
    evaluate_answers,
    exact_match,
    paired_answers,
    rouge_l,
)
from pennyweight.evaluate.intervals import Difference, Interval, bootstrap, student, wilson
from pennyweight.evaluate.losses import (
    LossReport,
    evaluate_loss,
    in_batches,
    loss_by_batch,
    paired,
    read_by,
)

__all__ = [
    "AnswerReport",
    "Difference",
    "Interval",
    "LossReport",
    "bootstrap",
    "evaluate_answers",
    "evaluate_loss",
    "exact_match",
    "in_batches",
    "loss_by_batch",
    "paired",
    "paired_answers",
    "read_by",
    "rouge_l",
    "student",
    "wilson",
]
