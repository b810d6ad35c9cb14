"""Which other tools load a version as it is, and why one does not.

Read in their sources: vLLM's `lora/peft_helper.py`, LoRAX's `adapters/lora.py`, SGLang's
`lora/lora.py` and `lora_config.py`, llama.cpp's `convert_lora_to_gguf.py` and `llama-adapter.h`. None
of them was run here; docs/registry.md says what was read.
"""

from __future__ import annotations

from dataclasses import dataclass

from pennyweight.registry.record import Version

__all__ = ["Loader", "loaders"]


@dataclass(frozen=True, slots=True)
class Loader:
    """A tool, and what stands in its way; nothing does where `faults` is empty."""

    tool: str
    faults: tuple[str, ...]


def loaders(version: Version) -> tuple[Loader, ...]:
    """PEFT and the four servers that read its layout, each with its faults."""
    settings = version.settings()
    rank, alpha = (bool(settings.get(f"{each}_pattern")) for each in ("rank", "alpha"))
    whole = bool(settings.get("modules_to_save") or version.trained.get("whole"))
    rslora = bool(settings.get("use_rslora"))
    one_scaling = "one scaling for all modules: ranks or alphas by pattern would be scaled wrongly"
    trained_whole = "modules trained whole are not taken; merge it first"
    return (
        Loader("PEFT", ()),
        _loader("vLLM", (rank or alpha, one_scaling), (whole, trained_whole)),
        _loader("LoRAX", (rank or alpha, one_scaling), (whole, trained_whole)),
        _loader(
            "SGLang",
            (rslora, "use_rslora is not read (sgl-project/sglang#40835)"),
            (rank or alpha, "ranks or alphas by pattern: not seen to be applied"),
            (whole, trained_whole),
        ),
        _loader(
            "llama.cpp",
            (alpha, "alphas by pattern are not read"),
            (rslora, "use_rslora is not read: it would scale by alpha / r"),
            (whole, trained_whole),
        ),
    )


def _loader(tool: str, *faults: tuple[bool, str]) -> Loader:
    return Loader(tool, tuple(said for there, said in faults if there))
