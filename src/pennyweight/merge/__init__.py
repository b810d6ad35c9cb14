"""Fold an adapter into its base, and measure what the folding lost."""

from pennyweight.merge.agreement import Agreement, Comparison, Reader, Reference, beside
from pennyweight.merge.folder import (
    Folded,
    MergeReport,
    Onto,
    fold_into,
    is_stored_quantized,
    merge,
)

__all__ = [
    "Agreement",
    "Comparison",
    "Folded",
    "MergeReport",
    "Onto",
    "Reader",
    "Reference",
    "beside",
    "fold_into",
    "is_stored_quantized",
    "merge",
]
