"""Many adapters over one resident base in one process: trained, compared in one table, losers stopped."""

from pennyweight.sweep.outcome import Sweep, Trained
from pennyweight.sweep.sizes import WORTH_SHARING, Sizes, sizes
from pennyweight.sweep.sweep import sweep

__all__ = ["WORTH_SHARING", "Sizes", "Sweep", "Trained", "sizes", "sweep"]
