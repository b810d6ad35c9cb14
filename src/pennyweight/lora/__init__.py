"""Low-rank adapters: the formula, the layer, the value, and their place beside a base."""

from pennyweight.lora.adapter import Adapter, content_hash
from pennyweight.lora.binding import (
    adapter_of,
    attach,
    attached,
    check_name,
    described,
    detach,
    is_attached,
    trained_parameters,
)
from pennyweight.lora.fit import check_fit
from pennyweight.lora.layer import LoraLinear, lora_delta
from pennyweight.lora.uniform import uniform

__all__ = [
    "Adapter",
    "LoraLinear",
    "adapter_of",
    "attach",
    "attached",
    "check_fit",
    "check_name",
    "content_hash",
    "described",
    "detach",
    "is_attached",
    "lora_delta",
    "trained_parameters",
    "uniform",
]
