"""Benchmarks people quote, through lm-eval (extra `eval`), on the resident base and its adapters.

Nothing of lm-eval is imported before tasks are loaded.
"""

from pennyweight.evaluate.tasks.catalogue import Tasks, Wanted, load_tasks
from pennyweight.evaluate.tasks.measure import Score, TaskScores, differences, measure_tasks

__all__ = ["Score", "TaskScores", "Tasks", "Wanted", "differences", "load_tasks", "measure_tasks"]
