"""What can be done with the folder a run left, and with nothing else: evaluate, chat, merge."""

from pennyweight.runs.benchmarks import benchmark
from pennyweight.runs.chat import ChatSession, open_chat
from pennyweight.runs.folder import HeldOut, RunFolder, adapter_slot
from pennyweight.runs.measure import evaluate_run, measure
from pennyweight.runs.merging import MeasuredMerge, merge_adapter, merge_folder, merge_run
from pennyweight.runs.parity.run import parity_of_run
from pennyweight.runs.receipt import Outcome, receipt_of, versions

__all__ = [
    "ChatSession",
    "HeldOut",
    "MeasuredMerge",
    "Outcome",
    "RunFolder",
    "adapter_slot",
    "benchmark",
    "evaluate_run",
    "measure",
    "merge_adapter",
    "merge_folder",
    "merge_run",
    "open_chat",
    "parity_of_run",
    "receipt_of",
    "versions",
]
