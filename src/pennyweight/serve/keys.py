"""Keys: where they come from, who a caller is, and the cookie that stands for a key in a browser.

A key is compared in constant time and kept as its digest alone; what is printed is printed once, to
the person who started the server.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pennyweight.errors import ConfigError, DiskError
from pennyweight.files import sync

__all__ = ["COOKIE", "KEY_VARIABLE", "Caller", "Keys", "find_keys"]

KEY_VARIABLE, KEY_FILE, COOKIE = "PENNYWEIGHT_API_KEY", "api_key", "pennyweight_session"
SESSION_SECONDS = 12 * 3600
SHORTEST = 16
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: the name of the key. `admin` sees everybody's usage. `by_cookie`: from a browser."""

    name: str
    admin: bool = False
    by_cookie: bool = False


class Keys:
    """Named keys. `made_in`: the file of the key that was made here, None where keys were given."""

    def __init__(
        self, keys: Mapping[str, str], *, admins: Sequence[str] = (), made_in: Path | None = None
    ) -> None:
        assert keys, "without a key nobody could ask"
        self._digests = {name: _digest(key) for name, key in keys.items()}
        self._admins = frozenset(admins)
        self.made_in = made_in

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._digests)

    def caller(self, key: str) -> Caller | None:
        """Whose key this is. Every key is compared, whichever matches."""
        given, found = _digest(key), None
        for name, known in self._digests.items():
            if hmac.compare_digest(given, known):
                found = name
        return None if found is None else Caller(found, found in self._admins)

    def session(self, caller: Caller, now: float | None = None) -> str:
        """A value for the cookie; it ends after twelve hours, and with the key."""
        until = int((time.time() if now is None else now) + SESSION_SECONDS)
        text = f"{caller.name}.{until}"
        return f"{text}.{self._seal(caller.name, text)}"

    def of_session(self, cookie: str, now: float | None = None) -> Caller | None:
        """The caller that a cookie stands for; the inverse of `session`."""
        text, _, seal = cookie.rpartition(".")
        name, _, until = text.partition(".")
        known = name in self._digests
        expected = self._seal(name if known else self.names[0], text)
        if not hmac.compare_digest(expected.encode(), seal.encode("utf-8", "replace")) or not known:
            return None
        if not until.isdecimal() or int(until) < (time.time() if now is None else now):
            return None
        return Caller(name, name in self._admins, by_cookie=True)

    def _seal(self, name: str, text: str) -> str:
        return hmac.new(self._digests[name], text.encode(), hashlib.sha256).hexdigest()


def find_keys(file: str | None, data_dir: Path) -> tuple[Keys, str]:
    """The keys there are, and one of them to show in an example: from `file`, else from the
    environment, else from the data folder, where one is made the first time.
    """
    if file is not None:
        keys, admins = _read(Path(file).expanduser())
        return Keys(keys, admins=admins), "$KEY"
    if given := os.environ.get(KEY_VARIABLE):
        _check(given, f"${KEY_VARIABLE}")
        return Keys({"default": given}, admins=("default",)), f"${KEY_VARIABLE}"
    path = data_dir / KEY_FILE
    key = _kept(path) or _made(path)
    return Keys({"default": key}, admins=("default",), made_in=path), key


def _kept(path: Path) -> str | None:
    try:
        key = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as fault:
        raise DiskError(
            f"{path}: cannot be read ({fault}); mend its rights, or delete it"
        ) from None
    _check(key, str(path))
    return key


def _made(path: Path) -> str:
    key = f"pw-{secrets.token_urlsafe(32)}"
    try:
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(key + "\n")
        sync(path)
        sync(path.parent)
    except OSError as fault:
        raise DiskError(f"{path}: cannot be written ({fault.strerror}); mend its rights") from fault
    return key


def _read(path: Path) -> tuple[dict[str, str], list[str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as fault:
        raise ConfigError(f"keys: {path}: cannot be read ({fault})") from None
    keys: dict[str, str] = {}
    admins, faults = [], []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) not in (2, 3) or words[2:] not in ([], ["admin"]):
            faults.append(f"{path.name}:{number}: expected `NAME KEY` or `NAME KEY admin`")
        elif not _NAME.fullmatch(words[0]):
            faults.append(f"{path.name}:{number}: a name is a-z, 0-9, _ and -, 32 at most")
        elif words[0] in keys or words[1] in keys.values():
            faults.append(f"{path.name}:{number}: this name or key stands above already")
        elif len(words[1]) < SHORTEST:
            faults.append(f"{path.name}:{number}: a key has {SHORTEST} characters or more")
        else:
            keys[words[0]] = words[1]
            admins += [words[0]] if words[2:] else []
    if not keys and not faults:
        faults.append(f"{path.name}: holds no key; write lines such as `alice KEY`")
    if faults:
        raise ConfigError.all(faults)
    return keys, admins


def _check(key: str, where: str) -> None:
    if len(key) < SHORTEST or not key.isascii() or any(c.isspace() for c in key):
        raise ConfigError(
            f"{where}: a key has {SHORTEST} characters or more, all ASCII and none of them a space"
        )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
