"""A run reduced to the numbers that memory and time depend on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from pennyweight.config import Quantization, RunConfig
from pennyweight.errors import ConfigError
from pennyweight.plan.devices import Device
from pennyweight.shapes import Parameter, Shapes

__all__ = ["POLICIES", "DataSize", "Recompute", "Setting"]

Recompute = Literal["none", "minimal", "full", "offloaded"]

POLICIES: tuple[Recompute, ...] = ("none", "minimal", "full", "offloaded")
"""From the fastest to the most sparing: see `pennyweight.plan.activations`."""


@dataclass(frozen=True, slots=True)
class DataSize:
    """How much there is to learn from: rows and their lengths in tokens, as they will be cut."""

    rows: int
    tokens: int
    longest: int
    exact: bool = True

    @property
    def mean(self) -> float:
        """Tokens of a row on average."""
        return self.tokens / max(1, self.rows)


@dataclass(frozen=True)
class Setting:
    """One run on one device: what is held, in which types, and how many tokens a pass takes."""

    config: RunConfig
    shapes: Shapes
    device: Device
    rows: DataSize | None = None
    recomputed: int | None = None
    """Decoder layers that go by the recompute policy, counted from the first; None: all."""
    optimizer_on_host: bool = False
    """The optimizer's state lies in host memory between steps."""
    resident: bool = False
    """The base is loaded already, and shared with others."""

    def __post_init__(self) -> None:
        if self.longest > self.shapes.max_positions:
            raise ConfigError(
                f"data.max_length {self.config.data.max_length}: {self.shapes.name} knows "
                f"{self.shapes.max_positions} positions; data.max_length={self.shapes.max_positions}"
            )

    @property
    def recomputed_layers(self) -> int:
        """Layers that go by the recompute policy; the others keep everything."""
        layers = self.shapes.layers
        return layers if self.recomputed is None else min(self.recomputed, layers)

    @property
    def method(self) -> str:
        return self.config.train.method

    @property
    def full(self) -> bool:
        """Every weight is trained."""
        return self.method == "full"

    @property
    def storage(self) -> Quantization:
        """How linear weights are held: quantized for `qlora` alone."""
        return self.config.base.quantization if self.method == "qlora" else "none"

    @property
    def dtype(self) -> str:
        """The type of the products and of every weight that is not quantized."""
        asked = self.config.base.dtype
        if asked == "auto":
            return "float32" if self.device.half_type == "float16" else self.device.dtype
        return asked

    @property
    def product_bytes(self) -> int:
        """Bytes of one number in the type of the products."""
        return 4 if self.dtype == "float32" else 2

    @property
    def weight_bytes(self) -> int:
        """Bytes of one unquantized weight: full fine-tuning holds float32 masters."""
        return 4 if self.full else self.product_bytes

    @property
    def mixed(self) -> bool:
        """Products in 16 bits over float32 weights (autocast)."""
        return self.full and self.product_bytes == 2

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Rank of the adapter at each module it stands beside; empty for full fine-tuning."""
        if self.full:
            return {}
        from pennyweight.lora.targets import rank_of, targets

        linear = [p for p in self.shapes.parameters if p.kind in ("linear", "head")]
        head = next((p.module for p in linear if p.kind == "head"), None)
        chosen = targets((p.module for p in linear), self.config.adapter.target_modules, head=head)
        return {name: rank_of(name, self.config.adapter) for name in chosen}

    @cached_property
    def extra_trained(self) -> tuple[Parameter, ...]:
        """Parameters of `adapter.modules_to_save`, trained in full beside the adapter."""
        wanted = () if self.full else self.config.adapter.modules_to_save
        return tuple(
            p
            for p in self.shapes.parameters
            if any(p.module == name or p.module.endswith("." + name) for name in wanted)
        )

    @cached_property
    def adapter_elements(self) -> int:
        """Numbers in the adapter: r * (d_in + d_out) a module, and its full copies."""
        low_rank = sum(
            self.ranks[p.module] * sum(p.shape)
            for p in self.shapes.parameters
            if p.module in self.ranks and p.kind in ("linear", "head")
        )
        copies = 1
        for parameter in self.extra_trained:
            for size in parameter.shape:
                copies *= size
            low_rank, copies = low_rank + copies, 1
        return low_rank

    @cached_property
    def layer_kinds(self) -> tuple[tuple[int, int], ...]:
        """Layers that are alike, as (index of one, how many)."""
        counts: dict[object, list[int]] = {}
        for index, layer in enumerate(self.shapes.by_layer):
            key = tuple(
                (p.module.rpartition(".")[2], p.shape, self.ranks.get(p.module)) for p in layer
            )
            counts.setdefault(key, []).append(index)
        return tuple((alike[0], len(alike)) for alike in counts.values())

    @cached_property
    def held_weights(self) -> tuple[int, int]:
        """Bytes of the linear weights as stored, and of everything else in the base."""
        linear = other = 0
        for parameter in self.shapes.parameters:
            if parameter.kind == "embedding" and self.embedding_on_host:
                continue
            if parameter.kind != "linear":
                other += parameter.elements * self.weight_bytes
            elif self.storage == "none":
                linear += parameter.elements * self.weight_bytes
            else:
                from pennyweight.quant import storage_bytes

                double = self.config.base.double_quantization
                linear += storage_bytes(parameter.shape, self.storage, double)
        return linear, other

    @property
    def embedding_on_host(self) -> bool:
        """Host memory that is not the device's own holds the embeddings."""
        asked = self.config.base.embedding_device == "host"
        return asked and self.device.kind == "cuda"

    def again(self, config: RunConfig) -> Setting:
        """The same model, device and data under another config; what cannot differ is kept."""
        other = replace(self, config=config)
        before, now = self.config, config
        if (before.adapter, before.base, self.method) == (now.adapter, now.base, other.method):
            self._hand_on(other)
        return other

    def recomputing(self, layers: int) -> Setting:
        """The same run with so many layers that go by the recompute policy."""
        other = replace(self, recomputed=layers)
        self._hand_on(other)
        return other

    @property
    def can_page(self) -> bool:
        """The optimizer's state may lie in host memory that is not the device's own."""
        return self.config.train.optim.startswith("paged") and self.device.kind == "cuda"

    def paging(self) -> Setting:
        """The same run with the optimizer's state in host memory."""
        other = replace(self, optimizer_on_host=True)
        self._hand_on(other)
        return other

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of AdamW's moments, wherever they lie."""
        if not self.config.train.optim.endswith("8bit"):
            return 8 * self.trained_elements
        return sum(_bytes_in_8_bits(count) for count in self._trained_sizes())

    def _trained_sizes(self) -> list[int]:
        """Numbers in each tensor that is trained."""
        if self.full:
            return [p.elements for p in self.shapes.parameters]
        factors = [
            self.ranks[p.module] * side
            for p in self.shapes.parameters
            if p.module in self.ranks and p.kind in ("linear", "head")
            for side in p.shape
        ]
        return factors + [math.prod(p.shape) for p in self.extra_trained]

    def _hand_on(self, other: Setting) -> None:
        for name in ("ranks", "adapter_elements", "layer_kinds", "held_weights"):
            other.__dict__[name] = getattr(self, name)

    @property
    def trained_elements(self) -> int:
        """Numbers that get a gradient."""
        return self.shapes.count if self.full else self.adapter_elements

    @property
    def counted(self) -> DataSize | None:
        """The data if it was counted; memory never trusts a guess."""
        return self.rows if self.rows and self.rows.exact else None

    @property
    def longest(self) -> int:
        """Tokens of the longest row the model will see."""
        limit = self.config.data.max_length
        return min(limit, self.counted.longest) if self.counted else limit

    @property
    def document(self) -> float:
        """Tokens of a typical row, which the attention's cost goes by."""
        return min(float(self.longest), self.rows.mean) if self.rows else float(self.longest)

    @property
    def micro_tokens(self) -> int:
        """Tokens of the largest micro-batch: one flat row, no padding."""
        train, data = self.config.train, self.config.data
        if not data.packing:
            most = train.batch_size * self.longest
        elif train.tokens_per_step:
            most = max(self.longest, train.tokens_per_step // train.gradient_accumulation_steps)
        else:
            most = train.batch_size * data.max_length
        return max(self.longest, min(most, self.counted.tokens)) if self.counted else most

    @property
    def step_tokens(self) -> float:
        """Tokens of an optimizer step, as full as rows can be packed."""
        train = self.config.train
        if self.rows and not self.config.data.packing:
            return train.batch_size * self.rows.mean * train.gradient_accumulation_steps
        return float(self.micro_tokens * train.gradient_accumulation_steps)


def _bytes_in_8_bits(count: int) -> int:
    """Both moments of one tensor in blocks of 256; small ones stay in float32: `optim.eight_bits`."""
    return 8 * count if count < 4096 else 2 * -(-count // 256) * (256 + 4)
