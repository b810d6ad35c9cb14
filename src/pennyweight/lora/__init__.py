"""Low-rank adapters: the formula, the layer, the value, and their place beside a base."""

from pennyweight.lora.adapter import Adapter, content_hash
from pennyweight.lora.bank import AdapterBank
from pennyweight.lora.binding import (
    adapter_of,
    attach,
    attached,
    check_name,
    described,
    detach,
    is_attached,
    parameters_of,
    trained_parameters,
)
from pennyweight.lora.fit import check_fit
from pennyweight.lora.layer import LoraLinear, lora_delta
from pennyweight.lora.uniform import uniform

__all__ = [
    "Adapter",
    "AdapterBank",
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
    "parameters_of",
    "trained_parameters",
    "uniform",
]
