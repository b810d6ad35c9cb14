"""Versions are immutable and named by what they hold; names and tags move; nothing else is touched."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from pennyweight.errors import AdapterError, ConfigError, DiskError
from pennyweight.lora import Adapter, content_hash
from pennyweight.registry import Registry, default_folder
from pennyweight.registry.record import KEPT, RECORD
from pennyweight.registry.store import INCOMING


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_version_is_the_folder_that_was_added(registry: Registry, adapter_at: Any) -> None:
    folder = adapter_at("one")
    version = registry.add(folder, name="sql", tags=["prod"])
    assert version.hash == content_hash(Adapter.load(version.folder))
    kept = files_in(version.folder)
    assert {name: kept[name] for name in kept if name != RECORD} == files_in(folder)
    assert version.data == "d" * 64
    assert (version.base["name"], version.base["fingerprint"]) == ("some/base", "b" * 64)
    assert (version.trained["r"], version.trained["parameters"]) == (2, 28)
    assert version.held_out() is not None
    assert version.held_out()["loss_after"] == 1.5
    for reference in ("sql", "sql@latest", "sql@prod", f"sql@{version.short}", version.hash[:6]):
        assert registry.resolve(reference) == version
    assert registry.names_of(version) == ["sql@latest", "sql@prod"]


def test_the_same_adapter_again_is_the_same_version(registry: Registry, adapter_at: Any) -> None:
    first = registry.add(adapter_at("one"), name="sql")
    before = files_in(first.folder)
    assert registry.add(adapter_at("again", loss=9.0), name="copy") == first
    assert files_in(first.folder) == before
    assert len(list((registry.folder / "versions").iterdir())) == 1


def test_latest_moves_with_each_version_and_tags_when_told(
    registry: Registry, adapter_at: Any
) -> None:
    one = registry.add(adapter_at("one", seed=1), name="sql", tags=["prod"])
    two = registry.add(adapter_at("two", seed=2), name="sql", parent="sql@prod")
    assert (registry.resolve("sql"), registry.resolve("sql@prod")) == (two, one)
    assert registry.lineage(two) == [two, one]
    registry.tag(f"sql@{two.short}", "prod")
    assert registry.resolve("sql@prod") == two
    registry.untag("sql", "prod")
    with pytest.raises(AdapterError, match="no tag 'prod'; its tags are: latest"):
        registry.resolve("sql@prod")
    assert {entry.version.hash for entry in registry.entries("sql")} == {one.hash, two.hash}


def test_files_go_with_the_last_name(registry: Registry, adapter_at: Any) -> None:
    one = registry.add(adapter_at("one", seed=1), name="sql")
    two = registry.add(adapter_at("two", seed=2), name="sql")
    registry.add(adapter_at("again", seed=1), name="other")
    assert registry.remove("sql@latest") == [two.hash]
    assert not two.folder.exists()
    with pytest.raises(AdapterError, match="no version is tagged latest"):
        registry.resolve("sql")
    assert registry.remove("sql") == []
    assert registry.names() == ["other"]
    assert registry.remove(f"other@{one.short}") == [one.hash]
    assert registry.names() == []
    assert list((registry.folder / "versions").iterdir()) == []


@pytest.mark.parametrize("name", ["", "-a", "A", "a/b", "..", "a" * 65, "a\n", "latest/../x"])
def test_names_stay_in_the_folder(registry: Registry, adapter_at: Any, name: str) -> None:
    folder = adapter_at("one")
    with pytest.raises(AdapterError, match="names start with"):
        registry.add(folder, name=name)
    version = registry.add(folder, name="fine")
    with pytest.raises(AdapterError, match="tags are"):
        registry.tag("fine", name)
    with pytest.raises(AdapterError, match="no adapter of that name"):
        registry.remove(name)
    assert version.folder.is_dir()


def test_tags_do_not_look_like_versions(registry: Registry, adapter_at: Any) -> None:
    registry.add(adapter_at("one"), name="sql")
    with pytest.raises(AdapterError, match="how versions look"):
        registry.tag("sql", "deadbeef")
    with pytest.raises(AdapterError, match="no version begins with 000000"):
        registry.resolve("sql@000000")


def test_what_is_kept_is_read_strictly(registry: Registry, adapter_at: Any, tmp_path: Path) -> None:
    folder = adapter_at("one")
    tensors = load_file(folder / "adapter_model.safetensors")
    key = next(iter(tensors))
    save_file(tensors | {key: tensors[key] * float("nan")}, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="NaN"):
        registry.add(folder, name="sql")
    linked = adapter_at("linked")
    (linked / "receipt.json").unlink()
    (tmp_path / "secret").write_text("{}")
    (linked / "receipt.json").symlink_to(tmp_path / "secret")
    with pytest.raises(AdapterError, match="leads out of the folder"):
        registry.add(linked, name="sql")
    with pytest.raises(ConfigError, match="neither a run's folder nor an adapter's"):
        registry.add(tmp_path, name="sql")
    assert registry.names() == []
    assert not list((registry.folder / "versions").iterdir())


def test_other_files_are_left_and_said(registry: Registry, adapter_at: Any) -> None:
    folder = adapter_at("one")
    (folder / "tokenizer.json").write_text("{}")
    version = registry.add(folder, name="sql")
    assert not (version.folder / "tokenizer.json").exists()
    assert version.notes == ("left where it was: tokenizer.json",)


@pytest.mark.parametrize("changed", ["adapter_config.json", "README.md", RECORD])
def test_a_changed_version_is_noticed(registry: Registry, adapter_at: Any, changed: str) -> None:
    version = registry.add(adapter_at("one"), name="sql")
    path = version.folder / changed
    if changed == RECORD:
        told = json.loads(path.read_text())
        path.write_text(json.dumps(told | {"version": "0" * 64}))
        with pytest.raises(DiskError, match="not what was kept"):
            registry.resolve("sql")
        return
    path.write_text(path.read_text() + "\n")
    with pytest.raises(DiskError, match=changed):
        version.check()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", "../../etc"),
        ("files", {"../../x": "0" * 64}),
        ("files", {}),
        ("base", {"name": {"deep": 1}}),
        ("parent", "sql"),
        ("notes", [1]),
        ("schema_version", 2),
    ],
)
def test_a_record_is_read_strictly(
    registry: Registry, adapter_at: Any, tmp_path: Path, key: str, value: Any
) -> None:
    version = registry.add(adapter_at("one"), name="sql")
    copy = tmp_path / "copy"
    shutil.copytree(version.folder, copy)
    told = json.loads((copy / RECORD).read_text())
    (copy / RECORD).write_text(json.dumps(told | {key: value}))
    with pytest.raises(AdapterError, match=key):
        registry.add(copy, name="copy")


def test_what_a_killed_add_left_goes_in_a_day(registry: Registry, adapter_at: Any) -> None:
    registry.add(adapter_at("one", seed=1), name="sql")
    young, old = (registry.folder / "versions" / f"{INCOMING}{age}" for age in ("young", "old"))
    for path in (young, old):
        path.mkdir()
    os.utime(old, (0, 0))
    registry.add(adapter_at("two", seed=2), name="sql")
    assert (young.exists(), old.exists()) == (True, False)
    assert len(registry.entries("sql")) == 2


def test_the_default_folder_is_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENNYWEIGHT_REGISTRY", "/somewhere/else")
    assert default_folder() == Path("/somewhere/else")
    monkeypatch.delenv("PENNYWEIGHT_REGISTRY")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_folder() == Path("/data/pennyweight/adapters")


def test_no_file_of_ours_is_left_out(adapter_at: Any) -> None:
    """What `Adapter.save` and a run write is what a registry keeps."""
    assert {path.name for path in adapter_at("one").iterdir()} <= set(KEPT)
