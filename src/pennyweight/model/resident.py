"""A base model and its tokenizer, resident on one device, shared by every adapter."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pennyweight.blocks import GatedFeedForward
from pennyweight.errors import ModelError
from pennyweight.lora.layer import AdaptedModule
from pennyweight.model.folder import fingerprint, read_settings
from pennyweight.quant import QuantizedLinear
from pennyweight.route import Route

__all__ = ["BaseModel", "Head", "check_head"]


@dataclass(frozen=True, slots=True)
class Head:
    """The output head: logits = softcap(scale * (h W^T + b)).

    `weight` is `[vocab, d]`; `softcap` bounds logits as cap * tanh(logits / cap) (Gemma 2,
    section 2); `trainable` says that the weight itself is trained. `wrapped` says that something
    stands around the plain weight, an adapter that the route names say: then only calling
    `module` is right.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float
    trainable: bool
    wrapped: bool
    module: nn.Module


class BaseModel:
    """One base model and its tokenizer, resident on one device, shared by every adapter."""

    def __init__(
        self,
        module: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        folder: Path,
        quantization: str,
        dtype: torch.dtype,
        mixed: bool,
        stop_ids: tuple[int, ...],
    ) -> None:
        self.module, self.tokenizer = module, tokenizer
        self.name, self.folder = name, folder
        self.quantization, self.dtype = quantization, dtype
        self.mixed, self.stop_ids = mixed, stop_ids
        self.route = Route()
        # Around each pass; what training says of the tensors that backward will want.
        self.keeping: Callable[[], AbstractContextManager[None]] = nullcontext
        self.fingerprint = fingerprint(folder)
        for layer in module.modules():
            if hasattr(layer, "layer_idx") or isinstance(layer, GatedFeedForward):
                layer.pennyweight_route = self.route

    @property
    def device(self) -> torch.device:
        # The head's, for embeddings may stay in host memory.
        head: Any = self.module.get_output_embeddings()
        return cast(torch.device, head.weight.device)

    @property
    def vocab_size(self) -> int:
        return int(self.head.weight.shape[0])

    @property
    def max_positions(self) -> int:
        return int(getattr(_text_config(self.module), "max_position_embeddings", 2**31))

    def hidden(
        self, ids: Int64[Tensor, " tokens"], positions: Int64[Tensor, " tokens"]
    ) -> Float[Tensor, "tokens d"]:
        """Last hidden states of one flat row; the caller has set `route.over(...)`."""
        with self._precision(), self.keeping():
            out = self.module.base_model(
                input_ids=ids[None], position_ids=positions[None], use_cache=False
            )
        return out.last_hidden_state[0]

    def logits(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n vocab"]:
        """Logits in float32; scaled and capped as the model's own forward does."""
        head = self.head
        with self._precision():
            logits = head.module(hidden).float() * head.scale
        return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)

    @property
    def head(self) -> Head:
        module = self.module.get_output_embeddings()
        plain = getattr(module, "base_layer", module)
        config = _text_config(self.module)
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        return Head(
            weight=plain.weight,
            bias=getattr(plain, "bias", None),
            softcap=getattr(config, "final_logit_softcapping", None),
            scale=scale,
            trainable=plain.weight.requires_grad,
            wrapped=plain is not module and not _idle(module, self.route),
            module=module,
        )

    def keep_dense(self) -> int:
        """Hold every quantized weight in the compute type as well, so that generation dequantizes
        nothing; gives the bytes that takes. Training reads the codes as before."""
        layers = (m for m in self.module.modules() if isinstance(m, QuantizedLinear))
        return sum(layer.keep_dense(self.dtype) for layer in layers)

    def write_folder(self, folder: Path) -> None:
        """The whole model as a plain Hugging Face folder, its config as the base's was."""
        self.module.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        config = read_settings(self.folder)
        config.pop("torch_dtype", None)
        config["dtype"] = str(self.module.dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """bf16 products over float32 weights (full fine-tuning on a GPU); nothing elsewhere."""
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.mixed):
            yield


def check_head(base: BaseModel) -> None:
    """Our hidden → head → logits path must give what the model's own forward gives."""
    ids = torch.tensor([0, 1, 2, 3], device=base.device)
    positions = torch.arange(4, device=base.device)
    passes: list[tuple[Any, dict[str, Any], Any]] = []
    watched = base.module.base_model.register_forward_hook(
        lambda _, *seen: passes.append(seen), with_kwargs=True
    )
    with torch.inference_mode(), base.route.over((0, 4), (None,)), base._precision():
        given = {"input_ids": ids[None], "position_ids": positions[None], "use_cache": False}
        try:
            theirs = base.module(**given).logits[0].float()
        finally:
            watched.remove()
        hidden = _hidden_of(passes, given)
        ours = base.logits(base.hidden(ids, positions) if hidden is None else hidden)
    if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2 * float(theirs.abs().max())):
        raise ModelError(
            f"{type(base.module).__name__}: its logits are more than its head applied to its hidden states "
            f"(largest difference {float((ours - theirs).abs().max()):.3g}); this architecture is not supported"
        )


def _hidden_of(
    passes: list[tuple[Any, dict[str, Any], Any]], given: dict[str, Any]
) -> Tensor | None:
    """The hidden states of the one pass, where it was asked as `BaseModel.hidden` asks.

    None where it was asked for anything else, which may matter: then `hidden` has to run as well.
    """
    if len(passes) != 1:
        return None
    arguments, words, out = passes[0]
    asked = {name: value for name, value in words.items() if value is not None}
    alike = asked.keys() == given.keys() and all(asked[name] is given[name] for name in given)
    hidden: Tensor | None = getattr(out, "last_hidden_state", None)
    return hidden[0] if alike and not arguments and hidden is not None else None


def _idle(module: nn.Module, route: Route) -> bool:
    """Whether only adapters that the pass does not read stand around a module."""
    return isinstance(module, AdaptedModule) and not any(
        name is not None and name in module for name in route.adapters
    )


def _text_config(module: PreTrainedModel) -> PretrainedConfig:
    return module.config.get_text_config(decoder=True)
