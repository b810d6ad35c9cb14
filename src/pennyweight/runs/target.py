"""What can be measured: a run's folder, an adapter's folder beside its base, or a model by itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from pennyweight.config import BaseConfig
from pennyweight.data.chat import Renderer
from pennyweight.errors import ConfigError
from pennyweight.lora import Adapter, attach
from pennyweight.model import BaseModel, load_base
from pennyweight.runs.folder import RunFolder, adapter_slot
from pennyweight.runs.merging import base_of

__all__ = ["Arm", "Target", "target_of"]


@dataclass(frozen=True, slots=True)
class Arm:
    """One reader: `base` (the bare base), `tuned` (what training made of it) or `model` (alone).

    `renderer`: how prompts are rendered as chat, None for plain text. `stop_ids` end an answer
    beside the base's own.
    """

    name: str
    base: BaseModel
    adapter: str | None
    renderer: Renderer | None
    stop_ids: tuple[int, ...] = ()


@runtime_checkable
class Target(Protocol):
    """Something to measure; `path` is a run's folder, where its results belong, else None."""

    @property
    def path(self) -> Path | None: ...

    def arms(self, *, chat: bool) -> Iterator[Arm]:
        """Load and give the readers, one resident base for those that share it."""


def target_of(named: str, *, model: str | None = None, quantization: str | None = None) -> Target:
    """The target of this name; nothing is loaded yet. ConfigError for what does not go together."""
    folder = Path(named)
    if (folder / "adapter_config.json").is_file():
        return _AdapterFolder(folder, model, quantization)
    if model is not None:
        raise ConfigError(
            f"--model {model}: only for the folder of an adapter, which {named} is not"
        )
    if _is_run(folder):
        if quantization is not None:
            raise ConfigError(
                f"--quantization {quantization}: {named} is a run, which is measured as it was trained"
            )
        run = RunFolder(folder)
        run.config()
        return _Run(run)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"{named}: not the folder of a run, an adapter or a model; it has no config.json"
        )
    return _Model(named, quantization)


def _is_run(folder: Path) -> bool:
    """A run's config.json describes a run, a model's names its type."""
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(described, dict) and "model_type" not in described


@dataclass(frozen=True, slots=True)
class _Run:
    run: RunFolder

    @property
    def path(self) -> Path | None:
        return self.run.path

    def arms(self, *, chat: bool) -> Iterator[Arm]:
        def arm(name: str, base: BaseModel, adapter: str | None) -> Arm:
            renderer = self.run.renderer(base.tokenizer)
            return Arm(name, base, adapter, renderer if chat else None, renderer.stop_ids)

        if self.run.config().train.method == "full":
            # One after the other: whoever drops the first has room for the second.
            yield arm("base", self.run.open(adapter=False)[1], None)
            yield arm("tuned", self.run.open()[1], None)
            return
        config, base = self.run.open()
        yield arm("base", base, None)
        yield arm("tuned", base, adapter_slot(config))


@dataclass(frozen=True, slots=True)
class _AdapterFolder:
    folder: Path
    model: str | None
    quantization: str | None
    path: Path | None = None

    def arms(self, *, chat: bool) -> Iterator[Arm]:
        adapter = Adapter.load(self.folder)
        base = load_base(base_of(self.folder, adapter, self.model, self.quantization))
        attach(base, adapter, trainable=False)
        renderer = Renderer(base.tokenizer) if chat else None
        yield Arm("base", base, None, renderer)
        yield Arm("tuned", base, "default", renderer)


@dataclass(frozen=True, slots=True)
class _Model:
    named: str
    quantization: str | None
    path: Path | None = None

    def arms(self, *, chat: bool) -> Iterator[Arm]:
        held = self.quantization or "none"
        base = load_base(BaseConfig.model_validate({"model": self.named, "quantization": held}))
        yield Arm("model", base, None, Renderer(base.tokenizer) if chat else None)
