"""Token parity: everyone who reads a conversation reads it as the ids it was trained as.

Rows of every shape go through training, chat, evaluation, a server's messages and the template that
transformers applies, and their ids are compared one by one.
"""

from pennyweight.runs.parity.compare import compared
from pennyweight.runs.parity.outcome import CHECKS, Fault, Parity
from pennyweight.runs.parity.ways import Way, generation_eos, prepared_ways, through_transformers

__all__ = [
    "CHECKS",
    "Fault",
    "Parity",
    "Way",
    "compared",
    "generation_eos",
    "prepared_ways",
    "through_transformers",
]
