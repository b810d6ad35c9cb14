"""A model's folder made to speak as it was trained: what others render and stop by is written there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pennyweight.data.chat import Renderer
from pennyweight.runs.parity import generation_eos

__all__ = ["EXPORTED", "dress"]

EXPORTED, GENERATION = "chat_template.jinja", "generation_config.json"


def dress(folder: Path, renderer: Renderer) -> list[str]:
    """Write the template and the stop tokens of training, where the folder has others; their files.

    Whoever opens the folder with transformers alone then asks with the ids that were trained, and
    stops where answers were trained to end.
    """
    written = []
    template = renderer.exported_template()
    if template is not None:
        (folder / EXPORTED).write_text(template, encoding="utf-8")
        written.append(EXPORTED)
    eos = generation_eos(folder)
    if not eos >= set(renderer.stop_ids):
        path = folder / GENERATION
        settings: dict[str, Any] = {}
        if path.is_file():
            settings = json.loads(path.read_text(encoding="utf-8"))
        settings["eos_token_id"] = sorted(eos | set(renderer.stop_ids))
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        written.append(GENERATION)
    return written
