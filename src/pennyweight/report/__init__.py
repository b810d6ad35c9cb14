"""What a run says of itself: an append-only log, progress lines, optional sinks, a picture."""

from __future__ import annotations

from pennyweight.report.log import Report, metrics_of, plain, read_events
from pennyweight.report.plot import plot_losses, plot_many
from pennyweight.report.progress import duration, progress_line
from pennyweight.report.rows import plot_rows
from pennyweight.report.scores import plot_scores
from pennyweight.report.sinks import Sink, open_sinks

__all__ = [
    "Report",
    "Sink",
    "duration",
    "metrics_of",
    "open_sinks",
    "plain",
    "plot_losses",
    "plot_many",
    "plot_rows",
    "plot_scores",
    "progress_line",
    "read_events",
]
