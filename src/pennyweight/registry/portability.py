"""Which other tools load a version as it is, why one does not, and the form that all of them load.

Read in their sources: vLLM's `lora/peft_helper.py`, LoRAX's `adapters/lora.py`, SGLang's
`lora/lora.py` and `lora_config.py`, llama.cpp's `convert_lora_to_gguf.py` and `llama-adapter.h`. None
of them was run here; docs/registry.md says what was read.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass

from pennyweight.registry.record import KEPT, Version
from pennyweight.registry.store import Registry

__all__ = ["Loader", "keep_uniform", "loaders"]


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


def keep_uniform(
    registry: Registry, reference: str, *, name: str, tags: Iterable[str] = ()
) -> Version:
    """Keep the same adapter as one rank and one scaling, a child of the version it says the same as."""
    from pennyweight.lora import Adapter, uniform

    version = registry.resolve(reference)
    version.check()
    with tempfile.TemporaryDirectory() as temporary:
        folder = uniform(Adapter.load(version.folder)).save(temporary)
        # Its card, receipt and template are the version's: it was trained once.
        for kept in KEPT[3:]:
            if (version.folder / kept).is_file():
                shutil.copyfile(version.folder / kept, folder / kept)
        return registry.add(folder, name=name, tags=tags, parent=version.hash)
