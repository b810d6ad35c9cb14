"""Reading a base model: from safetensors tensor by tensor, strictly, onto one device."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.utils import logging as transformers_logging

from pennyweight.attention import attend
from pennyweight.blocks import HostEmbedding, stand_in
from pennyweight.config import BaseConfig
from pennyweight.errors import MemoryExhausted, ModelError, PennyweightError
from pennyweight.foreign import ForeignError, file_in, read_json
from pennyweight.model.cache import KeptBase
from pennyweight.model.folder import (
    find_folder,
    first_line,
    load_tokenizer,
    read_config,
    stored_weights,
    weight_files,
)
from pennyweight.model.resident import BaseModel, check_head
from pennyweight.model.storage import (
    Storage,
    StreamConfig,
    StreamQuantizer,
    quantized_layers,
)

__all__ = ["load_base", "outlined", "register", "resolve_device", "resolve_dtype", "stop_ids"]


def load_base(config: BaseConfig, *, trainable: bool = False) -> BaseModel:
    """The base that `config` names, resident on its device.

    With `trainable` (full fine-tuning) all weights are float32 and require gradients, and
    products run in the compute type. Folders that transformers saved with bitsandbytes are
    read as they are. ModelError says what is missing or does not fit together.
    """
    register()
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
    store = Storage(config.quantization, config.double_quantization, device)
    _refuse_more_than_stored(hf_config, folder)
    tensors = _lazy_tensors(folder)
    kept = None
    if stored is not None:
        tensors = store.take_prequantized(tensors, _transposed(hf_config))
    elif config.quantization in ("nf4", "fp4"):
        kept = KeptBase.of(
            folder,
            quantization=config.quantization,
            double_quantization=config.double_quantization,
            device=device,
        )
        prefix = model_class(hf_config).base_model_prefix
        tensors = store.take_kept(tensors, kept.read(), prefix=prefix, dtype=dtype)
    module = _read(
        hf_config,
        tensors,
        store,
        torch.float32 if trainable else dtype,
        host_embedding=config.embedding_device == "host",
    )
    if kept is not None and not store.from_cache:
        kept.write(quantized_layers(module))
    module.requires_grad_(trainable)
    module.eval()
    stand_in(module)
    tokenizer = load_tokenizer(config.model)
    base = BaseModel(
        module,
        tokenizer,
        name=config.model,
        folder=folder,
        quantization=config.quantization,
        dtype=dtype,
        mixed=trainable and dtype != torch.float32,
        stop_ids=stop_ids(config.model, tokenizer),
    )
    base.route.backend = config.attention
    check_head(base)
    return base


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
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(device.type, True):
        raise ModelError(
            f"base.device {name!r}: this torch ({torch.__version__}) sees no such device; "
            "use auto or cpu"
        )
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU that multiplies it, else float32 (bf16 products are slow on most CPUs)."""
    if name != "auto":
        return getattr(torch, name)
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if fast else torch.float32


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    try:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise ModelError(
            f"{type(config).__name__}: transformers knows no causal language model for it"
        ) from None


@cache
def register() -> None:
    """Our attention and our quantizer, at transformers' public registries; once a process."""
    AttentionInterface.register("pennyweight", attend)
    AttentionMaskInterface.register("pennyweight", _no_mask)
    register_quantization_config("pennyweight")(StreamConfig)
    register_quantizer("pennyweight")(StreamQuantizer)


def _read(
    config: PretrainedConfig,
    tensors: dict[str, Any],
    store: Storage,
    dtype: torch.dtype,
    *,
    host_embedding: bool = False,
) -> PreTrainedModel:
    """Build the module and let transformers' loader fill it from `tensors`, strictly."""
    extra: dict[str, Any] = {}
    if store.quantization != "none":
        extra["quantization_config"] = StreamConfig(store)
    silent = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        module, info = model_class(config).from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=dtype,
            attn_implementation="pennyweight",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **extra,
        )
    except torch.OutOfMemoryError as fault:
        raise MemoryExhausted(
            f"{type(config).__name__}: its weights do not fit {store.device} ({first_line(fault)}); "
            "`pennyweight plan` says what would"
        ) from fault
    except PennyweightError:
        raise
    except Exception as fault:  # as in outlined
        raise ModelError(
            f"the weights do not fit {type(config).__name__}: {first_line(fault)}"
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
    if host_embedding:
        _leave_embedding(module)
    return module.to(store.device)


def _leave_embedding(module: PreTrainedModel) -> None:
    """Let the table of embeddings stay in host memory."""
    table, head = module.get_input_embeddings(), module.get_output_embeddings()
    if type(table) is not torch.nn.Embedding:
        raise ModelError(
            f"{type(module).__name__}: its embeddings are more than a table; "
            "remove base.embedding_device"
        )
    if getattr(head, "weight", None) is table.weight:
        raise ModelError(
            f"{type(module).__name__}: embeddings and output head are one table, which the head "
            "needs on the device; remove base.embedding_device"
        )
    module.set_input_embeddings(HostEmbedding(table))


def _lazy_tensors(folder: Path) -> dict[str, Any]:
    """Every tensor of the folder as a slice that reads its bytes only when asked."""
    tensors: dict[str, Any] = {}
    for path in weight_files(folder):
        try:
            file = safe_open(path, framework="pt")
            tensors |= {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as fault:
            raise ModelError(
                f"{path}: not a whole safetensors file ({first_line(fault)}); fetch it again"
            ) from fault
    return tensors


def _refuse_more_than_stored(config: PretrainedConfig, folder: Path) -> None:
    """Before anything is allocated by the config's word: the files must hold about what it asks for.

    A byte of a 4-bit folder holds two weights.
    """
    stored = sum(
        entry.elements * (2 if entry.dtype == "U8" else 1)
        for entry in stored_weights(folder).values()
    )
    with torch.device("meta"):
        asked = sum(p.numel() for p in outlined(config).parameters())
    if asked > 2 * stored + 1_000_000:
        raise ModelError(
            f"{folder}: the config asks for {asked:,} parameters, the files hold {stored:,}; they do "
            "not belong together"
        )


def outlined(config: PretrainedConfig) -> PreTrainedModel:
    """The model without its weights: call it on the meta device."""
    try:
        return model_class(config)(config)
    except PennyweightError:
        raise
    except Exception as fault:  # a stranger's values may trip any of the library's model classes
        raise ModelError(
            f"{type(config).__name__}: no model can be built from this config ({first_line(fault)})"
        ) from fault


def _transposed(config: PretrainedConfig) -> set[str]:
    """Names of the layers whose weight the model keeps as `[in, out]` (GPT-2's Conv1D)."""
    with torch.device("meta"):
        module = outlined(config)
    names = {n for n, layer in module.named_modules() if type(layer).__name__ == "Conv1D"}
    prefix = f"{module.base_model_prefix}."
    return names | {n.removeprefix(prefix) for n in names}


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


def stop_ids(name: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end an answer: those of generation_config.json, and the tokenizer's own."""
    folder = find_folder(name, weights=False)
    ids: list[int] = []
    if (folder / "generation_config.json").is_file():
        try:
            eos = read_json(file_in(folder, "generation_config.json")).get("eos_token_id")
        except ForeignError as fault:
            raise ModelError(str(fault)) from fault
        several = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if not all(type(each) is int and 0 <= each < 2**31 for each in several):
            raise ModelError(
                f"{folder / 'generation_config.json'}: eos_token_id is {str(eos)[:40]!r}, expected ids"
            )
        ids += several
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return tuple(dict.fromkeys(ids))


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    """Attention reads document boundaries from the route; it wants no mask."""
