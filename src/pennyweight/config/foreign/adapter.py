"""LoRA's settings as PEFT names them: which modules, and the scaling that alpha and rank come to."""

from __future__ import annotations

import math
import re

from pennyweight.config.foreign.account import Account

__all__ = ["default_targets", "targets", "tell_scaling"]

# PEFT's own choice where no modules are named, for models whose attention has a fused projection.
_FUSED = {
    "gpt2": "c_attn",
    "gpt_bigcode": "c_attn",
    "starcoder": "c_attn",
    "falcon": "query_key_value",
    "pythia": "query_key_value",
    "neox": "query_key_value",
    "bloom": "query_key_value",
    "chatglm": "query_key_value",
    "mpt": "Wqkv",
}


def targets(
    account: Account,
    key: str,
    layers_key: str = "",
    pattern_key: str = "",
    every: str = "all-linear",
) -> None:
    """`adapter.target_modules` from a list, one name, a pattern, or the tool's word for all of them."""
    given = account.read(key)
    several = account.words(key) if not _is_pattern(given) else None
    value: str | list[str] | None = several
    if _is_pattern(given):
        value = given
    elif several in (["all"], ["all-linear"], ["all_linear"], [every]) or (
        several is not None and "all" in several
    ):
        value = "all-linear"
    layers = account.read(layers_key) if layers_key else None
    if layers is not None and isinstance(value, list):
        value = _in_layers(value, layers, account.read(pattern_key) if pattern_key else None)
        account.carry(layers_key, "adapter.target_modules", value, "as a pattern of full names")
        if pattern_key and pattern_key in account:
            account.carry(pattern_key, "adapter.target_modules", value)
    elif layers is not None:
        account.lose(
            layers_key, "some layers only; adapter.target_modules takes a pattern of names"
        )
    if value is not None:
        account.carry(key, "adapter.target_modules", value)


def _is_pattern(value: object) -> bool:
    return isinstance(value, str) and re.search(r"[\\^$*+?()|\[\]]", value) is not None


def _in_layers(names: list[str], layers: object, pattern: object) -> str:
    """PEFT's `layers_to_transform`: those modules inside the numbered blocks, as one pattern."""
    numbers = layers if isinstance(layers, list) else [layers]
    blocks = pattern if isinstance(pattern, list) else [pattern] if pattern else _BLOCKS
    inside = "|".join(re.escape(str(each)) for each in blocks)
    which = "|".join(str(each) for each in numbers)
    modules = "|".join(re.escape(name) for name in names)
    return rf"(.*\.)?({inside})\.({which})\.(.*\.)?({modules})"


_BLOCKS = ["layers", "h", "block", "blocks", "layer"]


def default_targets(account: Account, key: str, model: str) -> None:
    """What PEFT picks by itself: queries and values, or the fused projection."""
    fused = next((leaf for name, leaf in _FUSED.items() if name in model.lower()), None)
    value = [fused] if fused else ["q_proj", "v_proj"]
    account.assume(
        key,
        "adapter.target_modules",
        value,
        "PEFT's choice for this family; all-linear is QLoRA's, and usually better",
    )


def tell_scaling(account: Account) -> None:
    """Say what alpha and rank come to; the product B·A is scaled alike there and here."""
    rank, alpha = account.run.get("adapter.r"), account.run.get("adapter.lora_alpha")
    if not rank or alpha is None:
        return
    stabilized = bool(account.run.get("adapter.use_rslora"))
    scale = alpha / (math.sqrt(rank) if stabilized else rank)
    rule = "alpha / sqrt(r)" if stabilized else "alpha / r"
    account.differ(
        f"scaling of the update: {rule} = {alpha:g} / {'sqrt ' if stabilized else ''}{rank:g} = "
        f"{scale:.4g}, the same rule there and here, so alpha is not rescaled"
    )
