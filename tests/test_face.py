"""The package's own names: few, lazy, and not hidden by the rooms they come from."""

from __future__ import annotations

import subprocess
import sys

import pennyweight


def test_every_name_is_there_and_is_no_module():
    for name in pennyweight.__all__:
        assert callable(getattr(pennyweight, name)), name
    assert len(pennyweight.__all__) <= 15


def test_a_room_does_not_hide_the_function_of_its_name():
    from pennyweight.generate import generate
    from pennyweight.merge import MergeReport, merge
    from pennyweight.train import Trainee

    assert pennyweight.generate is generate
    assert pennyweight.merge is merge
    assert MergeReport is not None
    assert Trainee is not None


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, pennyweight; print([m for m in ('torch', 'numpy', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
