"""The folder a run leaves behind: what stands where, written whole and read back.

run.yaml        the description as it was given      config.json   every value, resolved
adapter/        PEFT's layout; or model/ (full)      checkpoints/  to resume from
events.jsonl    every step                           ledger.jsonl  what became of each row
receipt.json    what was run, and what it came to    loss.png      the curves
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pennyweight.config import DataConfig, RunConfig, read_resolved
from pennyweight.data.chat import Renderer
from pennyweight.data.examples import Examples, load_folder, save_folder
from pennyweight.data.prepare import Prepared, Question
from pennyweight.data.specimens import Specimen
from pennyweight.errors import ConfigError, DiskError
from pennyweight.files import mend, whole
from pennyweight.lora import Adapter, adapter_of, attach, described
from pennyweight.model import BaseModel, load_base
from pennyweight.runs.card import run_card
from pennyweight.runs.dressing import EXPORTED, dress
from pennyweight.runs.parity import compared
from pennyweight.runs.receipt import SCHEMA_VERSION

TEMPLATE, RECEIPT = "template.jinja", "receipt.json"
NAMED_TEMPLATES = ("auto", "tokenizer", "plain", "turns", "chatml")

__all__ = ["HeldOut", "RunFolder", "adapter_slot"]


def adapter_slot(config: RunConfig, name: str = "default") -> str | None:
    """The name that documents read: the run's adapter, or None where the whole model was trained."""
    return None if config.train.method == "full" else name


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out rows as tokens, those to answer in text, and how text is rendered.

    `builtin_task`: the questions are those of the built-in task, which has a check of its own.
    `specimens`: rows of every shape, as they were read and as they were trained.
    """

    rows: Examples
    questions: tuple[Question, ...]
    rendering: dict[str, Any]
    builtin_task: bool
    specimens: tuple[Specimen, ...] = ()


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where each thing of a run stands."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def picture(self) -> Path:
        return self.path / "loss.png"

    @property
    def held_out(self) -> Path:
        return self.path / "held_out"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def config(self) -> RunConfig:
        """The resolved description; ConfigError where this is no run's folder."""
        if not (self.path / "config.json").is_file():
            raise ConfigError(
                f"{self.path}: not a run's folder; it has no config.json. "
                "`pennyweight train run.yaml` makes one"
            )
        return read_resolved(self.path / "config.json")

    def describe(
        self, config: RunConfig, *, origin: Mapping[str, str] | None, text: str | None
    ) -> None:
        """Write down what is about to be run."""
        if text is not None:
            self._write("run.yaml", text)
        self._write("config.json", config.model_dump_json(indent=2) + "\n")
        if origin is not None:
            self._write("origin.json", json.dumps(dict(origin), indent=2) + "\n")

    def keep_held_out(self, data: Prepared, most_rows: int) -> None:
        """Keep the rows to measure on, and what it takes to render text as training did."""
        rendering = dict(data.renderer.settings)
        if Path(rendering["template"]).is_file():
            with whole(self.path / TEMPLATE) as partial:
                shutil.copyfile(rendering["template"], partial)
            rendering["template"] = TEMPLATE
        facts = {
            "rendering": rendering,
            "builtin_task": all(q.source.startswith("builtin/") for q in data.questions),
            "questions": [asdict(question) for question in data.questions[:most_rows]],
            "specimens": [specimen.values() for specimen in data.specimens],
        }
        rows = Examples.of([data.eval[i] for i in range(min(most_rows, len(data.eval)))])
        shutil.rmtree(self.held_out, ignore_errors=True)
        save_folder(self.held_out, {"eval": rows}, facts)

    def read_held_out(self) -> HeldOut:
        """What `keep_held_out` kept; DiskError where it is gone or was changed."""
        found = load_folder(self.held_out)
        if found is None:
            raise DiskError(
                f"{self.held_out}: missing or not what the run wrote; train again, or restore it"
            )
        facts = found.facts
        questions = tuple(
            Question(tuple(q["prompt_ids"]), q["reference"], q["source"])
            for q in facts["questions"]
        )
        return HeldOut(
            found.parts["eval"],
            questions,
            facts["rendering"],
            facts["builtin_task"],
            tuple(Specimen.of(values) for values in facts.get("specimens", ())),
        )

    def renderer(self, tokenizer: Any, *, checked: bool = True) -> Renderer:
        """The renderer that training used.

        ConfigError where the same row would now become other ids (not with `checked` False).
        """
        held = self.read_held_out()
        settings = dict(held.rendering)
        if settings["template"] == TEMPLATE:
            settings["template"] = str(self.path / TEMPLATE)
        elif settings["template"] not in NAMED_TEMPLATES:
            raise DiskError(
                f"{self.held_out}: names the template {str(settings['template'])[:60]!r}, which is "
                f"not one a run keeps ({TEMPLATE} or {', '.join(NAMED_TEMPLATES)})"
            )
        renderer = Renderer(tokenizer, **settings)
        if checked:
            compared(held.specimens, renderer, (), mend=self.drift_mend).refuse()
        return renderer

    @property
    def drift_mend(self) -> str:
        return (
            "the chat template or the tokenizer of the base changed since the run was trained: "
            f"restore it, or train again; `pennyweight parity {self.path}` tells more"
        )

    def rendering(self, data: DataConfig) -> DataConfig:
        """The data settings with the template that was kept, for other rows rendered like the run's."""
        kept = self.path / TEMPLATE
        return data.model_copy(update={"template": str(kept)}) if kept.is_file() else data

    def keep_weights(
        self,
        base: BaseModel,
        config: RunConfig,
        receipt: Mapping[str, Any],
        *,
        name: str | None = "default",
    ) -> None:
        """Write what was trained, the adapter attached as `name` in PEFT's layout or a whole Hugging
        Face folder, with its model card; and the receipt beside it and in the run's folder."""
        text = json.dumps(receipt, indent=2, allow_nan=False) + "\n"
        if name is not None:
            kept = adapter_of(base, name, config.adapter)
            held = {
                "base_quantization": config.base.quantization,
                "base_double_quantization": config.base.double_quantization,
            }
            described(kept, base, **held).save(self.adapter, card=run_card(receipt))
            template = self.renderer(base.tokenizer).exported_template()
            if template is not None:  # whoever takes the adapter alone has to know it
                (self.adapter / EXPORTED).write_text(template, encoding="utf-8")
            self._write(f"{self.adapter.name}/{RECEIPT}", text)
        else:
            partial = self.path / ".model.partial"
            shutil.rmtree(partial, ignore_errors=True)
            base.write_folder(partial)
            dress(partial, self.renderer(base.tokenizer))
            (partial / "README.md").write_text(run_card(receipt), encoding="utf-8")
            (partial / RECEIPT).write_text(text, encoding="utf-8")
            shutil.rmtree(self.model, ignore_errors=True)
            partial.replace(self.model)
        self._write(RECEIPT, text)

    def receipt(self) -> dict[str, Any] | None:
        """The receipt of a finished run; None where there is none of a schema that is known here."""
        try:
            found = json.loads((self.path / RECEIPT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        known = isinstance(found, dict) and found.get("schema_version") == SCHEMA_VERSION
        return found if known else None

    def open(self, *, adapter: bool = True) -> tuple[RunConfig, BaseModel]:
        """The run's base, resident, with its adapter attached as `default` (or its tuned model)."""
        config = self.config()
        if config.train.method == "full":
            named = str(self.model) if adapter else config.base.model
            return config, load_base(config.base.model_copy(update={"model": named}))
        base = load_base(config.base)
        if adapter:
            self._require_adapter()
            attach(base, Adapter.load(self.adapter), trainable=False)
        return config, base

    def _require_adapter(self) -> None:
        if not self.adapter.is_dir():
            raise ConfigError(
                f"{self.path}: the run has not finished, there is no adapter yet; "
                "`pennyweight train` with the same description resumes it"
            )

    def _write(self, name: str, text: str) -> None:
        try:
            with whole(self.path / name) as partial:
                partial.write_text(text, encoding="utf-8")
        except OSError as fault:
            raise DiskError(
                f"{self.path / name}: cannot be written ({fault.strerror}); {mend(fault)}"
            ) from fault
