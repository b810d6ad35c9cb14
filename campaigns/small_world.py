"""What every campaign over training starts from: a base, rows, and the uninterrupted run's bits."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from campaigns.children import Child, warm
from campaigns.small_run import bits, build_model, described, write_rows

__all__ = ["World"]


@dataclass
class World:
    """A folder with the model, the rows, the cache and the runs of a campaign."""

    folder: Path

    @classmethod
    def made(cls, folder: Path) -> World:
        warm()
        build_model(folder / "model")
        write_rows(folder / "rows.jsonl")
        os.environ["PENNYWEIGHT_CACHE"] = str(folder / "cache")
        return cls(folder)

    def describe(self, name: str, **changes: Any) -> Path:
        """`folder/name.yaml`, which trains into `folder/name`. JSON is YAML."""
        path = self.folder / f"{name}.yaml"
        text = described(self.folder, name, **changes).model_dump_json(indent=1, exclude_unset=True)
        path.write_text(text)
        return path

    def train(self, description: Path, **options: Any) -> Child:
        """`pennyweight train` in a child."""
        return Child(["train", str(description)], description.with_suffix(".said"), **options)

    def whole(self, description: Path) -> str:
        """The bits of the uninterrupted run of this description."""
        child = self.train(description)
        if child.wait() != 0:
            raise RuntimeError(f"the uninterrupted run failed: {child.said[-2000:]}")
        return bits(description.with_suffix(""))

    def copy(self, kept: Path, run: Path) -> None:
        """Put a run's folder back as it was."""
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(kept, run)

    def ends_the_same(self, description: Path, expected: str) -> str | None:
        """The same command again until it is done; what differs from the uninterrupted run, or None."""
        child = self.train(description)
        code = child.wait()
        if code != 0:
            return f"the same command again ended with {code}: {child.said[-300:].strip()}"
        run = description.with_suffix("")
        litter = [p.name for p in run.rglob(".*")]
        if litter:
            return f"left over: {', '.join(litter[:4])}"
        return None if bits(run) == expected else "the resumed run ended with other bits"
