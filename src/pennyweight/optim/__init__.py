"""AdamW, its moments in 32 or 8 bits, on the device or in pages of host memory; schedules."""

from pennyweight.optim.adamw import Kind, adamw, load_state_tensors, state_tensors
from pennyweight.optim.paged import PagedAdamW
from pennyweight.optim.schedule import lr_at, set_learning_rate

__all__ = [
    "Kind",
    "PagedAdamW",
    "adamw",
    "load_state_tensors",
    "lr_at",
    "set_learning_rate",
    "state_tensors",
]
