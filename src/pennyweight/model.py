"""A resident base model: read from safetensors tensor by tensor, quantized as it arrives.

The only room that knows transformers' model classes. Loading goes through transformers' own
weight loader (which knows renamed keys, tied weights and buffers) with a quantizer registered
at its public extension point, so the full-precision model never stands in memory whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from pennyweight.attention import attend
from pennyweight.config import BaseConfig
from pennyweight.errors import ModelError
from pennyweight.lora.layer import linear_shape
from pennyweight.quant import (
    Quantized4Bit,
    Quantized8Bit,
    QuantizedLinear,
    from_bitsandbytes,
    quantize_4bit,
    quantize_8bit,
)
from pennyweight.route import Route

__all__ = [
    "BaseModel",
    "Head",
    "find_folder",
    "fingerprint",
    "load_base",
    "load_tokenizer",
    "read_config",
    "resolve_device",
    "resolve_dtype",
    "weight_files",
]

READABLE = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
SAMPLE_BYTES = 4096
SAMPLES_PER_TENSOR = 16


@dataclass(frozen=True, slots=True)
class Head:
    """The output head: logits = softcap(scale * (h W^T + b)).

    `weight` is `[vocab, d]`; `softcap` bounds logits as cap * tanh(logits / cap) (Gemma 2,
    section 2); `trainable` says that the weight itself is trained. `wrapped` says that something
    stands around the plain weight, an adapter say: then only calling `module` is right.
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
        self.fingerprint = fingerprint(folder)
        for layer in module.modules():
            if hasattr(layer, "layer_idx"):
                layer.pennyweight_route = self.route

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

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
        with self._precision():
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
            wrapped=plain is not module,
            module=module,
        )

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """bf16 products over float32 weights (full fine-tuning on a GPU); nothing elsewhere."""
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.mixed):
            yield


def load_base(config: BaseConfig, *, trainable: bool = False) -> BaseModel:
    """The base that `config` names, resident on its device.

    With `trainable` (full fine-tuning) all weights are float32 and require gradients, and
    products run in the compute type. Folders that transformers saved with bitsandbytes are
    read as they are. ModelError says what is missing or does not fit together.
    """
    _register()
    device = resolve_device(config.device)
    folder = find_folder(config.model)
    hf_config = read_config(folder)
    stored = getattr(hf_config, "quantization_config", None)
    if stored is not None:
        _refuse_foreign_quantization(stored, folder)
        del hf_config.quantization_config
    dtype = resolve_dtype(config.dtype, device)
    for key, value in vars(hf_config).items():
        if ("drop" in key) and isinstance(value, float):
            setattr(hf_config, key, 0.0)
    store = _Storage(config.quantization, config.double_quantization, device)
    tensors = _lazy_tensors(folder)
    if stored is not None:
        tensors = store.take_prequantized(tensors)
    module = _read(hf_config, tensors, store, torch.float32 if trainable else dtype)
    module.requires_grad_(trainable)
    module.eval()
    tokenizer = load_tokenizer(config.model)
    base = BaseModel(
        module,
        tokenizer,
        name=config.model,
        folder=folder,
        quantization=config.quantization,
        dtype=dtype,
        mixed=trainable and dtype != torch.float32,
        stop_ids=_stop_ids(folder, tokenizer),
    )
    base.route.backend = config.attention
    _check_head(base)
    return base


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that stands beside the model `name` (an id, `id@revision`, a folder, `builtin`)."""
    folder = find_folder(name, weights=False)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as fault:
        raise ModelError(
            f"{folder}: no tokenizer could be read ({_first_line(fault)}); the folder needs tokenizer.json"
        ) from fault


def read_config(folder: Path) -> PretrainedConfig:
    """The model's config.json; one that asks to run code of its own is refused."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{folder}: no config.json there; name a Hugging Face model folder or id"
        ) from None
    except (OSError, ValueError) as fault:
        raise ModelError(f"{path}: not readable as JSON ({_first_line(fault)})") from fault
    if not isinstance(raw, dict):
        raise ModelError(f"{path}: holds a {type(raw).__name__}, not a model's settings")
    if "auto_map" in raw:
        raise ModelError(
            f"{path}: `auto_map` asks to run code from the model's folder, which Pennyweight never does; "
            "use a model that transformers has built in, or delete the key if it has"
        )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise ModelError(f"{path}: transformers cannot read it ({_first_line(fault)})") from fault


def find_folder(name: str, *, weights: bool = True) -> Path:
    """The local folder of a model: `builtin`, a path, or a Hub snapshot (fetched if need be)."""
    if name == "builtin":
        from pennyweight.builtin import model_folder

        return model_folder()
    if Path(name).is_dir():
        return Path(name)
    repo, _, revision = name.partition("@")
    if repo.startswith((".", "/", "~")) or repo.count("/") != 1:
        raise ModelError(
            f"base.model {name!r}: no such folder, and not a Hugging Face id of the form owner/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [p for p in READABLE if weights or "safetensors" not in p]
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as fault:
        raise ModelError(
            f"base.model {name!r}: not found as a folder, and the Hub did not give it ({_first_line(fault)}); "
            "check the name, the network, and HF_TOKEN for gated models"
        ) from fault


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, by its index where there is one."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
        if not files:
            raise ModelError(
                f"{folder}: no .safetensors weights there; other formats can carry code and are not read"
            )
        return files
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as fault:
        raise ModelError(f"{index}: not a weight index ({_first_line(fault)})") from fault
    strange = [n for n in names if not isinstance(n, str) or Path(n).name != n or n.startswith(".")]
    if strange:
        raise ModelError(
            f"{index}: names files outside its folder: {', '.join(map(repr, strange[:3]))}"
        )
    missing = [n for n in names if not (folder / n).is_file()]
    if missing:
        raise ModelError(
            f"{folder}: the index names {len(names)} files, missing: {', '.join(missing[:3])}"
        )
    return [folder / n for n in names]


def fingerprint(folder: Path) -> str:
    """SHA-256 over every tensor's name, type and shape, and 16 evenly spaced 4 KiB samples of its bytes.

    Reads at most 64 KiB a tensor, so a large base takes well under a second; two trainings of one
    architecture differ in every weight they touched.
    """
    digest = hashlib.sha256()
    for path in weight_files(folder):
        size = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
            for key in sorted(k for k in header if k != "__metadata__"):
                entry = header[key]
                digest.update(f"{key}|{entry['dtype']}|{entry['shape']}".encode())
                start, stop = (8 + header_bytes + offset for offset in entry["data_offsets"])
                step = max(SAMPLE_BYTES, (stop - start) // SAMPLES_PER_TENSOR)
                for at in range(start, min(stop, size), step):
                    file.seek(at)
                    digest.update(file.read(min(SAMPLE_BYTES, stop - at)))
    return digest.hexdigest()


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA, else MPS, else the CPU."""
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(
            f"base.device {name!r}: not a device; use auto, cpu, cuda, cuda:1 or mps"
        ) from None
    present = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(
        device.type, lambda: True
    )
    if not present():
        raise ModelError(
            f"base.device {name!r}: this torch ({torch.__version__}) sees no such device; use auto or cpu"
        )
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU that multiplies it, else float32 (bf16 products are slow on most CPUs)."""
    if name != "auto":
        return getattr(torch, name)
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if fast else torch.float32


class _Storage:
    """Turns the weights of linear layers into what the run asked for, one at a time."""

    def __init__(self, quantization: str, double_quantization: bool, device: torch.device) -> None:
        self.quantization, self.double = quantization, double_quantization
        self.device = device
        self.stored: dict[str, Quantized4Bit | Quantized8Bit] = {}
        self.held: dict[str, Quantized4Bit | Quantized8Bit] = {}
        self.faults: list[str] = []

    def take_prequantized(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Fold bitsandbytes' companions of each weight (`weight.absmax`, ...) into values kept here."""
        roots = {k.rpartition(".weight.")[0] for k in tensors if ".weight." in k}
        roots |= {k.removesuffix(".SCB") for k in tensors if k.endswith(".SCB")}
        plain = {}
        groups: dict[str, dict[str, Tensor]] = {root: {} for root in roots}
        for key, lazy in tensors.items():
            root = next((r for r in _parents(key) if r in groups), None)
            if root is None or key == f"{root}.bias":
                plain[key] = lazy
            else:
                groups[root][key.removeprefix(root + ".")] = (
                    lazy[...] if lazy.get_shape() else _scalar(lazy)
                )
        for root, parts in groups.items():
            value = from_bitsandbytes(parts)
            if self.quantization == "none":
                plain[f"{root}.weight"] = _dense(value)
            else:
                self.stored[f"{root}.weight"] = value
                plain[f"{root}.weight"] = torch.zeros(tuple(value.shape))
        return plain

    def hold(self, key: str, weight: Tensor, layer: nn.Module) -> None:
        """Keep the weight `[out, in]` named `key` in the storage asked for; faults are collected."""
        try:
            value = self.stored.pop(key, None) or self._quantized(weight.to(self.device))
        except ModelError as fault:
            self.faults.append(f"{key}: {fault}")
            return
        if tuple(value.shape) != linear_shape(layer):
            found, asked = tuple(value.shape), linear_shape(layer)
            self.faults.append(f"weight {key} has shape {found}, the config asks for {asked}")
        self.held[key] = value

    def take_held(self) -> Iterator[tuple[str, Quantized4Bit | Quantized8Bit]]:
        """Hand over each held value once, so that none stands twice."""
        while self.held:
            yield self.held.popitem()

    def _quantized(self, weight: Tensor) -> Quantized4Bit | Quantized8Bit:
        if self.quantization == "int8":
            return quantize_8bit(weight)
        return quantize_4bit(weight, format=self.quantization, double_quantization=self.double)


def _read(
    config: PretrainedConfig, tensors: dict[str, Any], store: _Storage, dtype: torch.dtype
) -> PreTrainedModel:
    """Build the module and let transformers' loader fill it from `tensors`, strictly."""
    try:
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise ModelError(
            f"{type(config).__name__}: transformers knows no causal language model for it"
        ) from None
    extra: dict[str, Any] = {}
    if store.quantization != "none":
        extra["quantization_config"] = _StreamConfig(store)
    silent = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        module, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=dtype,
            attn_implementation="pennyweight",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **extra,
        )
    except (ValueError, KeyError, RuntimeError, SafetensorError) as fault:
        raise ModelError(
            f"the weights do not fit {type(config).__name__}: {_first_line(fault)}"
        ) from fault
    finally:
        transformers_logging.set_verbosity(silent)
        transformers_logging.enable_progress_bar()
    faults = store.faults + [
        f"weight {k} is missing from the files" for k in sorted(info["missing_keys"])
    ]
    faults += [
        f"weight {k[0]} has shape {tuple(k[1])}, the config asks for {tuple(k[2])}"
        for k in info["mismatched_keys"]
    ]
    if faults:
        raise ModelError.all(faults[:10])
    if hasattr(module.config, "quantization_config"):
        del module.config.quantization_config
    return module.to(store.device)


@cache
def _register() -> None:
    """Our attention and our quantizer, at transformers' public registries; once a process."""
    AttentionInterface.register("pennyweight", attend)
    AttentionMaskInterface.register("pennyweight", _no_mask)
    register_quantization_config("pennyweight")(_StreamConfig)
    register_quantizer("pennyweight")(_StreamQuantizer)


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    """Attention reads document boundaries from the route; it wants no mask."""


class _StreamConfig(QuantizationConfigMixin):
    """Carries the storage through transformers' loader."""

    def __init__(self, store: _Storage | None = None, **_: Any) -> None:
        self.quant_method = "pennyweight"
        self.store = store

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method}


class _StreamQuantizer(HfQuantizer):
    """Quantizes each linear weight as transformers' loader hands it over, then drops it."""

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.targets: set[str] = set()

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        head = model.get_output_embeddings()
        self.targets = {
            f"{name}.weight"
            for name, layer in model.named_modules()
            if (isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D")
            and layer is not head
        }
        return model

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        return param_name in self.targets

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self.quantization_config.store)

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        for key, value in self.quantization_config.store.take_held():
            path = key.removesuffix(".weight")
            layer = model.get_submodule(path)
            linear = QuantizedLinear(value, layer.bias, compute_dtype=None)
            linear.fan_in_fan_out = type(layer).__name__ == "Conv1D"
            model.set_submodule(path, linear)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _Quantize(ConversionOps):
    """One weight in, its quantized value kept by the storage, an empty placeholder out.

    The layers themselves are replaced when all is read: until then transformers expects to find
    its own.
    """

    def __init__(self, store: _Storage) -> None:
        self.store = store

    def convert(
        self, input_dict: dict[str, Any], model: nn.Module | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        assert model is not None
        empty = {}
        for key, given in input_dict.items():
            weight = given[0] if isinstance(given, list) else given
            layer = model.get_submodule(key.removesuffix(".weight"))
            transposed = type(layer).__name__ == "Conv1D"
            self.store.hold(key, weight.T.contiguous() if transposed else weight, layer)
            empty[key] = nn.Parameter(weight.new_empty(0), requires_grad=False)
        return empty


def _lazy_tensors(folder: Path) -> dict[str, Any]:
    """Every tensor of the folder as a slice that reads its bytes only when asked."""
    tensors: dict[str, Any] = {}
    for path in weight_files(folder):
        try:
            file = safe_open(path, framework="pt")
            tensors |= {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as fault:
            raise ModelError(
                f"{path}: not a whole safetensors file ({_first_line(fault)}); fetch it again"
            ) from fault
    return tensors


def _refuse_foreign_quantization(stored: Any, folder: Path) -> None:
    method = (
        stored.get("quant_method")
        if isinstance(stored, dict)
        else getattr(stored, "quant_method", None)
    )
    if method != "bitsandbytes":
        raise ModelError(
            f"{folder}: weights are stored as {method}; Pennyweight reads plain and bitsandbytes folders, "
            "so name the unquantized model instead"
        )


def _check_head(base: BaseModel) -> None:
    """Our hidden → head → logits path must give what the model's own forward gives."""
    ids = torch.tensor([0, 1, 2, 3], device=base.device)
    positions = torch.arange(4, device=base.device)
    with torch.inference_mode(), base.route.over((0, 4), (None,)), base._precision():
        theirs = (
            base.module(input_ids=ids[None], position_ids=positions[None], use_cache=False)
            .logits[0]
            .float()
        )
        ours = base.logits(base.hidden(ids, positions))
    if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2 * float(theirs.abs().max())):
        raise ModelError(
            f"{type(base.module).__name__}: its logits are more than its head applied to its hidden states "
            f"(largest difference {float((ours - theirs).abs().max()):.3g}); this architecture is not supported"
        )


def _stop_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end an answer: those of generation_config.json, and the tokenizer's own."""
    ids: list[int] = []
    if (folder / "generation_config.json").is_file():
        eos = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
        ids += eos if isinstance(eos, list) else [eos] if eos is not None else []
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return tuple(dict.fromkeys(ids))


def _text_config(module: PreTrainedModel) -> PretrainedConfig:
    return module.config.get_text_config(decoder=True)


def _dense(value: Quantized4Bit | Quantized8Bit) -> Tensor:
    from pennyweight.quant import dequantize_4bit, dequantize_8bit

    return dequantize_4bit(value) if isinstance(value, Quantized4Bit) else dequantize_8bit(value)


def _scalar(lazy: Any) -> Tensor:
    return lazy[()] if not hasattr(lazy, "get_dtype") else lazy[...]


def _parents(key: str) -> Iterator[str]:
    """`a.b.c` gives `a.b`, then `a`."""
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


def _first_line(fault: BaseException) -> str:
    return (str(fault).strip() or type(fault).__name__).splitlines()[0][:300]
