"""The house stands as it is drawn: floors, faces, and what no file may do."""

import ast
import importlib
import shutil
import subprocess
from importlib import metadata, util
from pathlib import Path

import pytest

import pennyweight
from tests.conftest import SHAPED

ROOT = Path(pennyweight.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MODULES = [
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in FILES
    if path.stem != "__main__"
]


def test_floors_and_fences_hold() -> None:
    program = shutil.which("lint-imports")
    if util.find_spec("importlinter") is None or program is None:
        pytest.skip("import-linter is not installed: pip install -e .[check]")
    done = subprocess.run(
        [program], cwd=ROOT.parents[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_names_its_face(name: str) -> None:
    """`__all__` is sorted, and everything in it exists; a module without one only explains."""
    if ".kernels" in name:
        pytest.importorskip("triton")
    if name.startswith(tuple(f"pennyweight.serve.{room}" for room in ("api", "listening", "web"))):
        pytest.importorskip("fastapi")
        pytest.importorskip("uvicorn")
    if name == "pennyweight.evaluate.tasks.lm":
        pytest.importorskip("lm_eval")
    module = importlib.import_module(name)
    assert (module.__doc__ or "").strip(), f"{name} opens with a sentence"
    face = getattr(module, "__all__", [])
    assert list(face) == sorted(face, key=lambda it: (not it.isupper(), not it[0].isupper(), it))
    assert all(hasattr(module, each) for each in face)


def test_shapes_are_checked_wherever_they_are_said() -> None:
    for path in FILES:
        if "from jaxtyping import" in path.read_text(encoding="utf-8"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            assert name.startswith(SHAPED), f"{name}: add its room to SHAPED in tests/conftest.py"


def test_names_say_what_they_hold() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "handler", "base"}
    assert not [path for path in FILES if path.stem in vague]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle_and_no_bare_except(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: a bare except"
        if isinstance(node, ast.Import | ast.ImportFrom):
            named = {alias.name.split(".")[0] for alias in node.names}
            named.add((getattr(node, "module", None) or "").split(".")[0])
            assert not named & {"pickle", "dill", "shelve", "marshal"}, f"line {node.lineno}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            called = f"{node.value.id}.{node.attr}"
            assert called not in ("torch.load", "torch.save"), f"line {node.lineno}: {called}"


def test_the_installed_version_is_the_one_in_the_source() -> None:
    try:
        installed = metadata.version("pennyweight")
    except metadata.PackageNotFoundError:
        pytest.skip("pennyweight is on the path but not installed")
    assert installed == pennyweight.__version__
