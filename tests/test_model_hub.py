"""A Hub id is found in the Hugging Face cache, at a revision too, without a network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

COMMIT = "a" * 40
OPEN = """
import sys
from pennyweight.config import BaseConfig
from pennyweight.model import load_base
for name in ("some/model", "some/model@main", "some/model@" + "a" * 40):
    print(load_base(BaseConfig(model=name, device="cpu")).fingerprint)
try:
    load_base(BaseConfig(model="some/other"))
except ValueError as error:
    print(error)
"""


def test_ids_and_revisions(tiny_llama_folder: Path, tmp_path: Path) -> None:
    repo = tmp_path / "models--some--model"
    shutil.copytree(tiny_llama_folder, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    done = subprocess.run(
        [sys.executable, "-c", OPEN],
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    *fingerprints, refusal = done.stdout.strip().splitlines()
    assert len(fingerprints) == 3
    assert len(set(fingerprints)) == 1
    assert "some/other" in refusal
    assert "the Hub did not give it" in refusal
