"""Fold an adapter into its base, and measure what the folding lost."""

from pennyweight.merge.agreement import Agreement, agreement
from pennyweight.merge.folder import MergeReport, merge

__all__ = ["Agreement", "MergeReport", "agreement", "merge"]
