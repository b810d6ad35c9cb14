"""The controlled experiment: base, LoRA, QLoRA and full fine-tuning on the same rows and tokens.

Each arm and seed is an ordinary run in a process of its own, so that its peak memory is its own;
learning rates are tuned on training rows set apart, never on the rows that the arms are judged by.
"""

from pennyweight.compare.experiment import Launch, compare
from pennyweight.compare.outcome import Comparison
from pennyweight.compare.page import notes, tables
from pennyweight.compare.parts import run_part

__all__ = ["Comparison", "Launch", "compare", "notes", "run_part", "tables"]
