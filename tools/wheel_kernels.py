"""Puts the compiled CPU kernels into a wheel, or beside the sources of an editable install.

Where they cannot be compiled the package is the same without them: a warning, never a failure.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = Path("pennyweight/quant/kernels")


class KernelsHook(BuildHookInterface):
    PLUGIN_NAME = "custom"
    scratch: str | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        kernels = _build_module(Path(self.root))
        try:
            if version == "editable":
                kernels.build()
                return
            self.scratch = tempfile.mkdtemp()
            library = kernels.build(Path(self.scratch) / kernels.LIBRARY.name)
        except (kernels.CannotBuild, OSError) as fault:
            self.app.display_warning(
                f"CPU kernels are left out: {fault}; the package works without, more slowly"
            )
            return
        build_data["force_include"][str(library)] = str(KERNELS / "cpu" / library.name)
        build_data["pure_python"] = False
        build_data["tag"] = kernels.wheel_tag(library)

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if self.scratch is not None:
            shutil.rmtree(self.scratch, ignore_errors=True)


def _build_module(root: Path) -> ModuleType:
    """`pennyweight.quant.kernels.build` by its path: a build has no torch for the rest of the room."""
    spec = importlib.util.spec_from_file_location(
        "kernels_build", root / "src" / KERNELS / "build.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
