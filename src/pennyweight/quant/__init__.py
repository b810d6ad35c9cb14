"""Blockwise 4-bit and row-wise 8-bit storage of frozen weights, and the layer that computes with it."""

from pennyweight.quant.bitsandbytes_layout import from_bitsandbytes, to_bitsandbytes
from pennyweight.quant.blockwise import (
    BLOCK_SIZES,
    NestedScales,
    Quantized4Bit,
    block_scales,
    dequantize_4bit,
    dequantize_4bit_part,
    quantize_4bit,
    storage_bytes,
)
from pennyweight.quant.formats import DYNAMIC_8BIT, FP4_LEVELS, NF4_LEVELS, FourBit
from pennyweight.quant.linear import QuantizedLinear
from pennyweight.quant.rowwise import Quantized8Bit, dequantize_8bit, quantize_8bit

__all__ = [
    "BLOCK_SIZES",
    "DYNAMIC_8BIT",
    "FP4_LEVELS",
    "NF4_LEVELS",
    "FourBit",
    "NestedScales",
    "Quantized4Bit",
    "Quantized8Bit",
    "QuantizedLinear",
    "block_scales",
    "dequantize_4bit",
    "dequantize_4bit_part",
    "dequantize_8bit",
    "from_bitsandbytes",
    "quantize_4bit",
    "quantize_8bit",
    "storage_bytes",
    "to_bitsandbytes",
]
