"""Adapters to and from other places: a folder, a bucket (fsspec) or the Hugging Face Hub.

What lies there is PEFT's layout and `version.json`, so that other tools load it from there and a pull
can be held against the push. All that arrives is read as a stranger's (`Registry.add`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pennyweight.errors import AdapterError, ConfigError, DiskError
from pennyweight.files import disk_faults
from pennyweight.foreign import JSON_LIMIT_BYTES
from pennyweight.registry.record import KEPT, RECORD, TENSORS, Version, read_version, sha256_of
from pennyweight.registry.store import Registry

__all__ = ["Pushed", "pull", "push"]

HUB = "hf://"
LARGEST_TENSORS_BYTES = 64 * 2**30
PIECE_BYTES = 2**22


@dataclass(frozen=True, slots=True)
class Pushed:
    """Where a version went: `address` names just it, where the place can do that."""

    version: str
    address: str


def push(version: Version, target: str, *, public: bool = False, replace: bool = False) -> Pushed:
    """Write a version to a folder, an fsspec address (`s3://...`) or `hf://owner/name`.

    The record comes last, and what was written is read back. ConfigError where another version lies
    there, unless `replace`; on the Hub each push is a commit, and a new repository is private unless
    `public`.
    """
    version.check()
    if target.startswith(HUB):
        return _push_to_hub(version, target.removeprefix(HUB), public)
    address = target
    if "://" not in target:
        _refuse_hub_id(target)
        address = Path(target).expanduser().absolute().as_uri()
    system, place = _opened(address)
    with _remote_faults(target):
        _clear(system, place, version, target, replace)
        for name in (*version.files, RECORD):
            system.put_file(str(version.folder / name), f"{place}/{name}")
    with tempfile.TemporaryDirectory() as temporary:
        _fetch(system, place, Path(temporary), target)
        back = {path.name: sha256_of(path) for path in Path(temporary).iterdir()}
    sent = {**version.files, RECORD: sha256_of(version.folder / RECORD)}
    if wrong := [name for name, mark in sent.items() if back.get(name) != mark]:
        raise DiskError(
            f"{target}: {', '.join(wrong)}: read back otherwise than written; push again"
        )
    return Pushed(version.hash, target)


def pull(
    registry: Registry,
    source: str,
    *,
    name: str,
    tags: tuple[str, ...] = (),
    expect: str | None = None,
) -> Version:
    """Fetch an adapter from where `push` writes, or any PEFT adapter, and keep it as `name`.

    AdapterError where it is not what its own record says, or not the version `expect` (the hash, or
    its first digits, that whoever pushed it told): a record can only tell of accidents.
    """
    wanted = {"name": name, "tags": tags, "expect": expect}
    if source.startswith(HUB):
        return registry.add(_from_hub(source.removeprefix(HUB)), **wanted)  # type: ignore[arg-type]
    if "://" not in source:
        _refuse_hub_id(source)
        return registry.add(Path(source).expanduser(), **wanted)  # type: ignore[arg-type]
    system, place = _opened(source)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _fetch(system, place, folder, source)
        if not any(folder.iterdir()):
            raise ConfigError(f"{source}: no adapter there")
        return registry.add(folder, **wanted)  # type: ignore[arg-type]


def _opened(address: str) -> tuple[Any, str]:
    """The file system of an address, and the place in it."""
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise ConfigError('addresses need fsspec: pip install "pennyweight[remote]"') from None
    try:
        system, place = url_to_fs(address)
    except (ImportError, ValueError) as fault:
        raise ConfigError(f"{address}: {fault}") from fault
    return system, place.rstrip("/")


def _clear(system: Any, place: str, version: Version, target: str, replace: bool) -> None:
    """Make room at the place: nothing, this version, or with `replace` another one gives way."""
    there = [name for name in (*KEPT, RECORD) if system.exists(f"{place}/{name}")]
    if not there:
        system.makedirs(place, exist_ok=True)
        return
    if not replace:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            _fetch(system, place, folder, target, only=(RECORD,))
            found = read_version(folder)
        if found is None or found.hash != version.hash:
            what = f"version {found.short}" if found else "an adapter of unknown version"
            raise ConfigError(
                f"{target}: {what} lies there; push to another place, or --replace it"
            )
    # The record goes first: a folder that has one is whole.
    for name in reversed(there):
        system.rm_file(f"{place}/{name}")


def _fetch(
    system: Any, place: str, folder: Path, address: str, only: tuple[str, ...] = (*KEPT, RECORD)
) -> None:
    """Copy the files of an adapter, and no others, within their bounds."""
    with _remote_faults(address):
        for name in only:
            limit = LARGEST_TENSORS_BYTES if name == TENSORS else JSON_LIMIT_BYTES
            if not system.exists(f"{place}/{name}"):
                continue
            with system.open(f"{place}/{name}", "rb") as there, (folder / name).open("wb") as here:
                while piece := there.read(PIECE_BYTES):
                    here.write(piece)
                    if here.tell() > limit:
                        raise AdapterError(f"{address}/{name}: larger than {limit / 1e6:,.0f} MB")


@contextmanager
def _remote_faults(address: str) -> Iterator[None]:
    """What a place refuses, as DiskError with its address."""
    try:
        with disk_faults(Path(address), "nothing was kept"):
            yield
    except OSError as fault:
        raise DiskError(
            f"{address}: {str(fault).splitlines()[0][:200] if str(fault) else fault!r}"
        ) from fault


def _refuse_hub_id(target: str) -> None:
    """ConfigError for what is most likely meant as a Hub id; a folder is asked for with `./`."""
    parts = target.split("/")
    if len(parts) == 2 and all(parts) and parts[0][0] not in ".~" and not Path(parts[0]).exists():
        raise ConfigError(
            f"{target}: on the Hub that is hf://{target}; for a folder write ./{target}"
        )


def _hub_address(address: str) -> tuple[str, str | None]:
    repo, _, revision = address.partition("@")
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise ConfigError(f"{HUB}{address}: write hf://owner/name or hf://owner/name@revision")
    return repo, revision or None


@contextmanager
def _hub_faults(address: str) -> Iterator[None]:
    from huggingface_hub import errors

    # Its client's own faults, whichever library that client is of.
    network = getattr(errors, "HTTPError", OSError)
    try:
        yield
    except (errors.HFValidationError, errors.LocalEntryNotFoundError, OSError, network) as fault:
        reason = (str(fault).strip() or type(fault).__name__).splitlines()[0][:200]
        raise ConfigError(
            f"{HUB}{address}: the Hub did not do it ({reason}); check the name, the network, and HF_TOKEN"
        ) from fault


def _push_to_hub(version: Version, address: str, public: bool) -> Pushed:
    repo, revision = _hub_address(address)
    with _hub_faults(address):
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo, private=not public, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=version.folder,
            revision=revision,
            allow_patterns=[*version.files, RECORD],
            commit_message=f"Adapter {version.short}",
        )
    return Pushed(version.hash, f"{HUB}{repo}@{done.oid}")


def _from_hub(address: str) -> Path:
    repo, revision = _hub_address(address)
    with _hub_faults(address):
        from huggingface_hub import snapshot_download

        found = snapshot_download(repo, revision=revision, allow_patterns=[*KEPT, RECORD])
    return Path(found)
