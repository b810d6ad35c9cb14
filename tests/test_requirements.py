"""The lock is whole, names no place to fetch from, and agrees with what pyproject.toml allows."""

from __future__ import annotations

import re
import tomllib
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from pennyweight import doctor

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "requirements"
FILES = sorted(FOLDER.glob("*.txt"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DIRECT = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {
    extra: [Requirement(line) for line in lines]
    for extra, lines in PROJECT["optional-dependencies"].items()
}


@cache
def pins(name: str) -> dict[str, set[Version]]:
    """package -> versions that requirements/`name`.txt pins, one for each system and Python."""
    found: dict[str, set[Version]] = defaultdict(set)
    for entry in entries(FOLDER / f"{name}.txt"):
        requirement = Requirement(entry.partition(" --hash")[0])
        (only,) = requirement.specifier
        assert only.operator == "==", entry
        found[canonicalize_name(requirement.name)].add(Version(only.version))
    return found


def entries(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    stripped = (re.sub(r"\s+", " ", line.partition("#")[0]).strip() for line in lines)
    return [line for line in stripped if line]


def floor(requirement: Requirement) -> Version:
    (least,) = [each for each in requirement.specifier if each.operator == ">="]
    return Version(least.version)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_pin_has_digests_and_no_source(path: Path) -> None:
    assert entries(path)
    for entry in entries(path):
        assert re.fullmatch(
            r"[a-z0-9._-]+==[^ ;]+( ; [^\\]*?)?( --hash=sha256:[0-9a-f]{64})+", entry
        ), entry
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"://|index-url|find-links| @ |(?<![\w.])/\w+/", text)


@pytest.mark.parametrize("name", ["core", "plots", "check", "test"])
def test_what_the_project_asks_for_is_pinned_within_its_range(name: str) -> None:
    held = pins("torch") | pins("core") | pins(name)
    for requirement in DIRECT if name == "core" else EXTRAS[name]:
        versions = held[canonicalize_name(requirement.name)]
        assert versions, requirement
        assert all(version in requirement.specifier for version in versions), requirement


def test_a_package_has_one_version_wherever_it_is_pinned() -> None:
    held: dict[str, list[set[Version]]] = defaultdict(list)
    for path in FILES:
        if path.stem not in ("lowest", "torch-cpu"):
            for package, versions in pins(path.stem).items():
                held[package].append(versions)
    assert not {
        package: found for package, found in held.items() if found.count(found[0]) < len(found)
    }


def test_the_cpu_builds_are_of_the_torch_that_is_pinned() -> None:
    (cpu,), (plain,) = pins("torch-cpu")["torch"], pins("torch")["torch"]
    assert cpu.public == plain.public
    assert cpu.local == "cpu"


def test_the_lowest_versions_are_the_floors() -> None:
    """Torch apart: the registry holds no CPU build of its floor for Linux."""
    for requirement in [*DIRECT, *EXTRAS["test"]]:
        if requirement.name == "torch":
            continue
        (lowest,) = pins("lowest")[canonicalize_name(requirement.name)]
        least = floor(requirement).release
        assert lowest.release[: len(least)] == least, f"{requirement}: {lowest} is what was tried"


def test_the_doctor_asks_for_the_floors() -> None:
    floors = {requirement.name: floor(requirement).release for requirement in DIRECT}
    assert {name: floors[name] for name, _ in doctor._NEEDED} == dict(doctor._NEEDED)


def test_an_install_stays_small() -> None:
    """Without torch's CUDA libraries; the count of a real install is printed by scripts/package."""
    assert len(pins("core")) + 1 <= 44
