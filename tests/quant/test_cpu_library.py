"""Which compiled kernels serve on a CPU, how they are built, and what is said where none does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pennyweight.quant import dequantize_4bit, quantize_4bit
from pennyweight.quant.blockwise import fill_in_torch
from pennyweight.quant.kernels import build, cpu, why_pure_torch
from pennyweight.quant.kernels.cpu import library as room
from pennyweight.quant.kernels.cpu.library import SWITCH, chosen

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
IN_WHEEL = "pennyweight/quant/kernels/cpu/kernels.so"


@pytest.fixture(autouse=True)
def unchosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(SWITCH, raising=False)
    room._chosen.cache_clear()
    yield
    room._chosen.cache_clear()


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel built where there is a compiler, and one where there is none."""
    if sys.platform == "win32" or not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    builder = pytest.importorskip("hatchling.builders.wheel").WheelBuilder(str(ROOT))
    folder, made = tmp_path_factory.mktemp("wheels"), {}
    for name, compiler in (("pure", "no-such-compiler"), ("compiled", "")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CXX", compiler)
            (path,) = builder.build(directory=str(folder / name))
        made[name] = Path(path)
    return made


@pytest.fixture(scope="module")
def compiled(wheels: dict[str, Path]) -> Path:
    with zipfile.ZipFile(wheels["compiled"]) as wheel:
        return Path(wheel.extract(IN_WHEEL, wheels["compiled"].parent))


def test_a_library_of_these_sources_serves(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "LIBRARY", compiled)
    found = chosen()
    assert found is not None, cpu.why_none()
    assert found.variant in build.variants()
    assert why_pure_torch(CPU) == ""
    assert cpu.serving(torch.empty(4)) is found
    assert cpu.serving(torch.empty(4, dtype=torch.float64)) is None
    assert cpu.serving(torch.empty(4, device="meta")) is None
    assert cpu.serving(torch.nn.Parameter(torch.empty(4))) is None


def test_a_library_of_other_sources_is_not_used(
    compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "LIBRARY", compiled)
    monkeypatch.setattr(room, "built_from", lambda: "other")
    assert chosen() is None
    assert "built from other sources" in cpu.why_none()
    assert "python -m pennyweight.quant.kernels" in cpu.why_none()


def test_a_file_that_is_no_library_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "LIBRARY", tmp_path / "kernels.so")
    assert "not built" in cpu.why_none()
    (tmp_path / "kernels.so").write_text("no library")
    room._chosen.cache_clear()
    assert "does not load" in cpu.why_none()
    assert torch.equal(dequantize_4bit(quantize_4bit(torch.ones(3))), torch.ones(3))


def test_a_variant_is_forced_or_refused_by_name(
    compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "LIBRARY", compiled)
    monkeypatch.setenv(SWITCH, "plain")
    assert chosen() == room._chosen("plain")
    monkeypatch.setenv(SWITCH, "off")
    assert cpu.why_none() == f"{SWITCH} is off"
    monkeypatch.setenv(SWITCH, "mmx")
    assert chosen() is None
    assert "mmx" in cpu.why_none()
    assert "plain" in cpu.why_none()


def test_kernels_that_give_other_values_are_told_once_and_not_used(
    compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "LIBRARY", compiled)
    monkeypatch.setattr(cpu, "nest", lambda *_: None)
    with pytest.warns(UserWarning, match="other values"):
        assert chosen() is None
    assert chosen() is None
    assert "other values" in cpu.why_none()


def test_the_library_asks_for_nothing_but_the_system(compiled: Path) -> None:
    tag = build.wheel_tag(compiled)
    assert tag.startswith("py3-none-")
    if sys.platform == "linux":
        assert "GLIBCXX" not in compiled.read_bytes().decode("latin1")
        assert "manylinux_2_" in tag


def test_a_compiler_that_fails_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.CannotBuild, match="no-such-compiler"):
        build.build(tmp_path / "kernels.so")
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(build.CannotBuild, match="false"):
        build.build(tmp_path / "kernels.so")
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_carries_the_library_or_is_for_any_platform(
    wheels: dict[str, Path], compiled: Path
) -> None:
    assert wheels["pure"].name.endswith("-py3-none-any.whl")
    assert wheels["compiled"].name.endswith(f"-{build.wheel_tag(compiled)}.whl")
    with (
        zipfile.ZipFile(wheels["pure"]) as without,
        zipfile.ZipFile(wheels["compiled"]) as carried,
    ):
        assert set(carried.namelist()) - set(without.namelist()) == {IN_WHEEL}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_kernels_work_in_a_forked_process(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The threads of the parent did not come along: the child makes its own, and does not wait."""
    program = f"""
import os, pathlib, sys, torch
from pennyweight.quant import QuantizedLinear, quantize_4bit
from pennyweight.quant.kernels.cpu import library
library.LIBRARY = pathlib.Path({str(compiled)!r})
torch.set_num_threads(2)
layer = QuantizedLinear(quantize_4bit(torch.randn(512, 512)))
assert library.chosen() is not None
x = torch.randn(64, 512)
with torch.inference_mode():
    expected = layer(x)
    child = os.fork()
    if child == 0:
        os._exit(0 if bytes(layer(x).numpy()) == bytes(expected.numpy()) else 1)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)


def test_a_graph_that_is_traced_is_made_of_torchs_operations(
    compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "LIBRARY", compiled)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert chosen() is None


def test_a_value_on_a_view_is_read_where_it_lies(
    compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "LIBRARY", compiled)
    value = quantize_4bit(torch.randn(4, 64), double_quantization=False)
    twice = {name: torch.cat([t, t]) for name, t in value.tensors().items()}
    view = value.with_tensors({name: t[len(t) // 2 :] for name, t in twice.items()})
    expected = torch.empty(4, 64)
    fill_in_torch(value, expected)
    assert torch.equal(dequantize_4bit(view), expected)
