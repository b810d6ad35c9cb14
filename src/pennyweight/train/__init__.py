"""Training as a loop that yields steps, checkpoints written whole or not at all, and memory policy."""

from pennyweight.train.checkpoint import (
    CheckpointState,
    glimpse,
    load_latest,
    load_step,
    require_same,
    retire,
    save,
    tidy,
)
from pennyweight.train.learner import learner, warmup_steps
from pennyweight.train.lock import RunLock
from pennyweight.train.loop import Due, MicroBatch, StopRequest, pieces, planned_steps, train
from pennyweight.train.memory import (
    is_out_of_memory,
    peak_memory_bytes,
    release_cached,
    restart_peak,
    saved_bytes,
)
from pennyweight.train.random_state import random_tensors, restore_random
from pennyweight.train.recompute import Recompute, disable_checkpointing, enable_checkpointing
from pennyweight.train.together import Together, forward_backward_together
from pennyweight.train.trainee import Step, Trainee

__all__ = [
    "CheckpointState",
    "Due",
    "MicroBatch",
    "Recompute",
    "RunLock",
    "Step",
    "StopRequest",
    "Together",
    "Trainee",
    "disable_checkpointing",
    "enable_checkpointing",
    "forward_backward_together",
    "glimpse",
    "is_out_of_memory",
    "learner",
    "load_latest",
    "load_step",
    "peak_memory_bytes",
    "pieces",
    "planned_steps",
    "random_tensors",
    "release_cached",
    "require_same",
    "restart_peak",
    "restore_random",
    "retire",
    "save",
    "saved_bytes",
    "tidy",
    "train",
    "warmup_steps",
]
