"""Examples kept in a folder: what a changed manifest names is never read."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pennyweight.data.conversation import Example
from pennyweight.data.examples import Examples, load_folder, save_folder


def saved(folder: Path) -> Path:
    one = Example(np.arange(3, dtype=np.int32), np.array([False, True, True]), "a:1", 3)
    save_folder(folder, {"train": Examples.of([one])}, {"fact": 1})
    return folder


def rewrite(folder: Path, change: Any) -> None:
    """Change the manifest and put its own sum right, as a stranger would."""
    _, body = (folder / "manifest.json").read_text().split("\n", 1)
    manifest = json.loads(body)
    body = json.dumps(change(manifest))
    head = {"body_sha256": hashlib.sha256(body.encode()).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(head) + "\n" + body)


def test_saved_is_loaded(tmp_path: Path) -> None:
    found = load_folder(saved(tmp_path / "a"))
    assert found is not None
    assert found.parts["train"][0].ids.tolist() == [0, 1, 2]
    assert found.facts == {"fact": 1}


def outside(manifest: dict[str, Any]) -> dict[str, Any]:
    """The same arrays, named where they stand in the folder beside."""
    sums = {f"../b/{name}": digest for name, digest in manifest["sha256"].items()}
    return manifest | {"sha256": sums, "parts": ["../b/train"]}


@pytest.mark.parametrize(
    "change",
    [
        outside,
        lambda m: m | {"sha256": {}},
        lambda m: m | {"sha256": {**m["sha256"], "/etc/passwd": "0"}},
        lambda m: m | {"parts": []},
        lambda m: m | {"parts": 5},
        lambda m: m | {"arrays": ["../b/train.ids"]},
        lambda m: [],
        lambda m: None,
    ],
)
def test_a_changed_manifest_is_not_followed(tmp_path: Path, change: Any) -> None:
    shutil.copytree(saved(tmp_path / "a"), tmp_path / "b")
    rewrite(tmp_path / "a", change)
    assert load_folder(tmp_path / "a") is None
