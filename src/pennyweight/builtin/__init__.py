"""The small base model shipped inside the package, and a task whose answers a program can check."""

from __future__ import annotations

from pathlib import Path

__all__ = ["model_folder"]


def model_folder() -> Path:
    """The shipped model: a Hugging Face folder, ready for any loader that takes a path."""
    return Path(__file__).parent / "model"
