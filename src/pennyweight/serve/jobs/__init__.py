"""Fine-tuning jobs: asked for, settled, trained in turns, told and billed."""

from pennyweight.serve.jobs.asked import CreateJob
from pennyweight.serve.jobs.foreman import Foreman
from pennyweight.serve.jobs.orders import Orders

__all__ = ["CreateJob", "Foreman", "Orders"]
