"""What a wheel and an sdist hold, and how many packages an install brings.

    python tools/distribution.py dist/*.whl dist/*.tar.gz    # looks into both, lists the larger files
    python tools/distribution.py --installed                 # counts what stands beside pennyweight

Anything missing, or anything that does not belong there, is named and ends with exit code 1.
"""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What `pip install pennyweight` may bring on Linux, torch and its own needs counted, CUDA libraries
# not. They are 40 today; whoever raises this says in the changelog what for.
MOST_PACKAGES = 42
# Only where a compiler was at hand; the wheel then is for one platform.
COMPILED = {"pennyweight/quant/kernels/cpu/kernels.so"}
_TOOLS = {"pip", "pennyweight"}
_CUDA = re.compile(r"(nvidia|cuda)[-_].*|triton")


def main(words: list[str]) -> int:
    faults: list[str] = []
    if words == ["--installed"]:
        faults += faults_installed()
    for word in words if words != ["--installed"] else ():
        path = Path(word)
        sizes = wheel_files(path) if path.suffix == ".whl" else sdist_files(path)
        print(f"{path.name}: {path.stat().st_size:,} bytes, {len(sizes)} files; the largest:")
        for name in sorted(sizes, key=sizes.__getitem__, reverse=True)[:4]:
            print(f"  {sizes[name]:>10,}  {name}")
        found = faults_of_wheel(sizes) if path.suffix == ".whl" else faults_of_sdist(sizes)
        faults += [f"{path.name}: {fault}" for fault in found]
    for fault in faults:
        print(f"distribution: {fault}", file=sys.stderr)
    return 1 if faults else 0


def wheel_files(path: Path) -> dict[str, int]:
    with zipfile.ZipFile(path) as archive:
        return {entry.filename: entry.file_size for entry in archive.infolist()}


def sdist_files(path: Path) -> dict[str, int]:
    """Names without the one folder that everything stands in."""
    with tarfile.open(path) as archive:
        members = [member for member in archive.getmembers() if member.isfile()]
    return {member.name.partition("/")[2]: member.size for member in members}


def source_files(folder: str) -> set[str]:
    """Every file of this checkout under `folder`, but for what Python and the compiler leave there."""
    found = (path for path in (ROOT / folder).rglob("*") if path.is_file())
    kept = (path for path in found if "__pycache__" not in path.parts and path.suffix != ".so")
    return {path.relative_to(ROOT).as_posix() for path in kept}


def faults_of_wheel(sizes: dict[str, int]) -> list[str]:
    """The package, whole and alone, with its licence and its command."""
    package = {name for name in sizes if ".dist-info/" not in name}
    wanted = {name.removeprefix("src/") for name in source_files("src/pennyweight")}
    about = {name.partition(".dist-info/")[2] for name in sizes.keys() - package}
    faults = [f"{name} is missing" for name in sorted(wanted - package)]
    faults += [f"{name} does not belong there" for name in sorted(package - wanted - COMPILED)]
    needed = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
    return faults + [f"{name} is missing from dist-info" for name in sorted(needed - about)]


def faults_of_sdist(sizes: dict[str, int]) -> list[str]:
    """All that building and testing take; nothing that a tool left behind."""
    wanted = source_files("src") | source_files("tests") | source_files("requirements")
    wanted |= {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "PKG-INFO"}
    faults = [f"{name} is missing" for name in sorted(wanted - sizes.keys())]
    left = re.compile(
        r"^(runs|dist|build|merged)/|(^|/)(__pycache__|\.[^/]*)/|\.(pyc|so|safetensors)$"
    )
    ours = "src/pennyweight/builtin/model/model.safetensors"
    strange = [name for name in sizes if left.search(name) and name != ours]
    return faults + [f"{name} does not belong there" for name in sorted(strange)]


def faults_installed() -> list[str]:
    names = {
        str(each.metadata["Name"]).lower().replace("_", "-") for each in metadata.distributions()
    }
    if "pennyweight" not in names:
        return ["pennyweight is not installed here"]
    beside = sorted(name for name in names - _TOOLS if not _CUDA.fullmatch(name))
    print(f"an install without extras brings {len(beside)} packages (at most {MOST_PACKAGES}):")
    print("  " + " ".join(beside))
    if len(beside) > MOST_PACKAGES:
        return [f"{len(beside)} packages, {MOST_PACKAGES} are allowed"]
    return []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
