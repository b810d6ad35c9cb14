"""Compiles the CPU kernels: `python -m pennyweight.quant.kernels` does in place, the build of a wheel
into the wheel. Only the standard library is imported, because a build has nothing else.

One set of sources is compiled once for each instruction set, into one library that depends on
nothing but the system's C library; which of them runs is chosen where it is loaded.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["LIBRARY", "CannotBuild", "build", "built_from", "variants", "wheel_tag"]

SOURCES = Path(__file__).parent / "cpu"
LIBRARY = SOURCES / "kernels.so"

_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-math-errno",
    "-fvisibility=hidden",
]
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
# By machine, best first.
_VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "avx512_bf16": (*_AVX2, *_AVX512, "-mavx512bf16"),
        "avx512": (*_AVX2, *_AVX512),
        "avx2": _AVX2,
    },
    "aarch64": {"neon": ()},
}
_PLAIN = {"plain": ("-DPENNYWEIGHT_PLAIN",)}
_NAMES = {"amd64": "x86_64", "arm64": "aarch64"}
_ONCE = ("library.cpp", "threads.cpp")
_EACH = (
    "adapted.cpp",
    "attention.cpp",
    "attention_bf16.cpp",
    "blockwise.cpp",
    "decoder_layer.cpp",
    "elementwise.cpp",
    "product.cpp",
    "product_bf16.cpp",
    "softmax.cpp",
)


class CannotBuild(RuntimeError):
    """No compiler, or one that failed; the package works without, in pure torch."""


def variants() -> dict[str, tuple[str, ...]]:
    """The instruction sets compiled for on this machine, best first, and what each is compiled with."""
    machine = platform.machine().lower()
    return _VARIANTS.get(_NAMES.get(machine, machine), {}) | _PLAIN


def built_from() -> str:
    """A digest of the sources and of the commands, to tell a library that is not of them."""
    digest = hashlib.sha256(repr((_FLAGS, variants())).encode())
    for path in sorted(SOURCES.glob("*.cpp")) + sorted(SOURCES.glob("*.h")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def build(library: Path = LIBRARY) -> Path:
    """Compile the library; it is written whole or not at all. Raises CannotBuild."""
    compiler = _compiler()
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        commands, objects = [], []
        named = {"": (f'-DPENNYWEIGHT_BUILT_FROM="{built_from()}"',)}
        each = {
            name: (*flags, f"-DPENNYWEIGHT_VARIANT={name}")
            for name, flags in variants().items()
            if _knows(compiler, flags)
        }
        for variant, flags in (named | each).items():
            for source in _EACH if variant else _ONCE:
                objects.append(f"{scratch}/{variant}{Path(source).stem}.o")
                commands.append(
                    [compiler, *_FLAGS, *flags, "-c", str(SOURCES / source), "-o", objects[-1]]
                )
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        # The same bytes from any folder: no build id, no names of files.
        linux = ["-Wl,--build-id=none", "-Wl,-s", "-Wl,-z,defs", "-nodefaultlibs", "-lgcc", "-lc"]
        made, bare = f"{scratch}/made.so", linux if sys.platform == "linux" else []
        _run([compiler, "-shared", *objects, *bare, "-o", made])
        beside = library.with_name(f".{library.name}.{os.getpid()}")
        shutil.copyfile(made, beside)
        beside.replace(library)
    return library


def wheel_tag(library: Path) -> str:
    """The tag of a wheel that carries the library: any Python, this platform and C library.

    On Linux the oldest C library is the newest version that a symbol asks for (PEP 600).
    """
    machine = platform.machine().lower()
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        asked = re.findall(rb"GLIBC_2\.(\d+)", library.read_bytes())
        return f"py3-none-manylinux_2_{max([17, *map(int, asked)])}_{machine}"
    if sys.platform == "darwin":
        oldest = "11_0" if machine == "arm64" else "10_15"
        return f"py3-none-macosx_{oldest}_{machine}"
    return f"py3-none-{sys.platform}_{machine}"


def _compiler() -> str:
    if sys.platform == "win32":
        raise CannotBuild("the kernels are written for GCC and Clang, which Windows lacks")
    named = os.environ.get("CXX", "").strip()
    found = next(
        filter(None, map(shutil.which, [named] if named else ["c++", "g++", "clang++"])), ""
    )
    if not found:
        raise CannotBuild(f"CXX={named}: no such program" if named else "no C++ compiler was found")
    return found


def _knows(compiler: str, flags: tuple[str, ...]) -> bool:
    """Whether this compiler has the instruction set: bf16 came with GCC 10 and Clang 9."""
    command = [compiler, *flags, "-E", "-x", "c++", os.devnull]
    return (
        "-mavx512bf16" not in flags or not subprocess.run(command, capture_output=True).returncode
    )


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CannotBuild(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        said = next((s for s in done.stderr.splitlines() if "error" in s), done.stderr.strip())
        raise CannotBuild(f"{command[0]}: {said[:300]}")
