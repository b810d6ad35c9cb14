"""Llamas of any size with random weights, made in seconds and without their bytes on a disk.

The weights' file is written as a header and a hole, which most file systems keep as nothing and
read as zeros; so the ordinary loader runs in full, quantization as it streams included. Only
then does noise take the zeros' place, on the device where the weights stand.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["SHAPES", "LlamaShape", "fill_with_noise", "write_hollow"]


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """Sizes as a Llama's config.json names them."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 16384

    def config(self) -> dict[str, Any]:
        sizes = {name: getattr(self, name) for name in self.__slots__}
        return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes} | {
            "head_dim": self.hidden_size // self.num_attention_heads,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": "bfloat16",
        }


SHAPES = {
    # As Llama 3.2 1B and Llama 3.1 8B are published.
    "1B": LlamaShape(2048, 8192, 16, 32, 8, 128_256, tie_word_embeddings=True),
    "8B": LlamaShape(4096, 14_336, 32, 32, 8, 128_256),
    # As Llama 2 13B and Llama 3.1 70B are.
    "13B": LlamaShape(5120, 13_824, 40, 40, 40, 32_000),
    "70B": LlamaShape(8192, 28_672, 80, 64, 8, 128_256),
    # For a machine without a GPU: what runs is the same, how large it is says nothing.
    "tiny": LlamaShape(128, 352, 2, 4, 2, 4096),
}


def write_hollow(shape: LlamaShape, folder: Path) -> Path:
    """A model folder of that shape: config, the built-in tokenizer, and weights without bytes."""
    from transformers import AutoTokenizer

    from pennyweight.builtin import model_folder
    from pennyweight.model import shapes

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config()), encoding="utf-8")
    AutoTokenizer.from_pretrained(model_folder()).save_pretrained(folder)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for parameter in shapes(str(folder)).parameters:
        if parameter.tied_to:
            continue
        start, end = end, end + 2 * math.prod(parameter.shape)
        header[parameter.name] = {
            "dtype": "BF16",
            "shape": list(parameter.shape),
            "data_offsets": [start, end],
        }
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(written).to_bytes(8, "little") + written)
        file.truncate(8 + len(written) + end)
    return folder


def fill_with_noise(base: Any, *, seed: int) -> None:
    """Weights of a standard deviation near 0.01, quantized or not, in place; norms are ones."""
    import torch

    from pennyweight.quant import QuantizedLinear

    generator = torch.Generator(base.device).manual_seed(seed)
    with torch.no_grad():
        for parameter in base.module.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.01, generator=generator)
        for layer in base.module.modules():
            if isinstance(layer, QuantizedLinear):
                for name, tensor in layer.value.tensors().items():
                    if not tensor.is_floating_point():
                        tensor.random_(0, 256, generator=generator)
                    else:
                        # Of double quantization: scale = code / 127 * absmax + offset.
                        tensor.fill_(0.01 if name == "nested_absmax" else 0.02)
