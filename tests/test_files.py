"""Files whole or not at all; what the disk refuses is told from every other fault."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from pennyweight.errors import DiskError
from pennyweight.files import disk_faults, make_folder, scratch_folder, whole


def test_a_file_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")
    with whole(path) as partial:
        partial.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


def raise_after(fault: BaseException, partial: Path) -> None:
    partial.write_text("aft")
    raise fault


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_what_fails_leaves_what_was_there(tmp_path: Path, fault: BaseException) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(type(fault)), whole(path) as partial:
        raise_after(fault, partial)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["before"]


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot lock a folder")
def test_a_scratch_folder_of_the_dead_is_removed_and_one_of_the_living_is_not(
    tmp_path: Path,
) -> None:
    dead = tmp_path / ".unfinished-dead"
    dead.mkdir()
    (dead / "half.npy").write_text("half")
    with scratch_folder(tmp_path) as first:
        assert not dead.exists()
        (first / "a").write_text("a")
        with scratch_folder(tmp_path) as second:
            assert sorted(tmp_path.iterdir()) == sorted([first, second])
            second.rename(tmp_path / "made")
        assert (first / "a").read_text() == "a"
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_a_fault_while_a_scratch_folder_is_filled_is_told_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    with pytest.raises(FileNotFoundError), scratch_folder(tmp_path) as made:
        (made / "absent" / "a").write_text("a")
    assert not list(tmp_path.iterdir())


def test_every_folder_on_the_way_is_made_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def spy(number: int) -> None:
        synced.append(Path(f"/proc/self/fd/{number}").readlink().name)
        real(number)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to name what was synced")
    monkeypatch.setattr(os, "fsync", spy)
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path.name, "a"]


@pytest.mark.parametrize(
    "fault",
    [
        OSError(errno.ENOSPC, "No space left on device", "x.bin"),
        SafetensorError("Error while serializing: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_named(fault: Exception) -> None:
    said = r"x\.bin: No space left on device; free some"
    with pytest.raises(DiskError, match=said), disk_faults(Path("x.bin"), "free some"):
        raise fault


@pytest.mark.parametrize(
    "fault", [ConnectionResetError(errno.ECONNRESET, "reset"), SafetensorError("header too large")]
)
def test_other_faults_pass_as_they_are(fault: Exception) -> None:
    with pytest.raises(type(fault)), disk_faults(Path("x"), "y"):
        raise fault
