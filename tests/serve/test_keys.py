"""Keys: found, made, compared, and stood for by a cookie."""

from __future__ import annotations

import hmac
from pathlib import Path
from typing import Any

import pytest

from pennyweight.errors import ConfigError
from pennyweight.serve.keys import KEY_VARIABLE, Caller, Keys, find_keys


def test_each_key_is_its_name_and_no_other_text_is_one(keys: Keys) -> None:
    assert keys.caller("alice-key-0123456789") == Caller("alice", admin=True)
    assert keys.caller("bob-key-0123456789ab") == Caller("bob")
    for wrong in ("", "alice", "alice-key-012345678", "alice-key-0123456789 ", "\udcff"):
        assert keys.caller(wrong) is None


def test_every_key_is_compared_in_constant_time(
    keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []

    def counting(a: Any, b: Any) -> bool:
        compared.append((len(a), len(b)))
        return bool(a == b)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    keys.caller("alice-key-0123456789")
    keys.caller("no key at all")
    assert compared == [(32, 32)] * 4


def test_a_made_key_is_kept_for_its_owner_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    made, shown = find_keys(None, tmp_path)
    assert made.made_in is not None
    assert made.made_in.stat().st_mode & 0o777 == 0o600
    assert made.caller(shown) == Caller("default", admin=True)
    assert find_keys(None, tmp_path)[1] == shown


def test_a_given_key_is_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "canary-0123456789abcdef")
    found, shown = find_keys(None, tmp_path)
    assert found.caller("canary-0123456789abcdef") is not None
    assert "canary" not in shown
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv(KEY_VARIABLE, "short")
    with pytest.raises(ConfigError, match="16 characters"):
        find_keys(None, tmp_path)


def test_a_file_of_keys_names_every_fault(tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    file.write_text("# ours\nalice 0123456789abcdef admin\nbob 0123456789abcdeg\n")
    found, _ = find_keys(str(file), tmp_path)
    assert found.names == ("alice", "bob")
    assert found.caller("0123456789abcdef") == Caller("alice", admin=True)
    file.write_text("alice\nBob 0123456789abcdef\ncarol short\ndan 0123456789abcdef root\n")
    with pytest.raises(ConfigError) as fault:
        find_keys(str(file), tmp_path)
    assert [line.split(":")[1] for line in str(fault.value).splitlines()] == list("1234")
    file.write_text("")
    with pytest.raises(ConfigError, match="holds no key"):
        find_keys(str(file), tmp_path)


def test_a_session_stands_for_its_key_until_it_ends(keys: Keys) -> None:
    cookie = keys.session(Caller("bob"), now=1000)
    assert keys.of_session(cookie, now=1001) == Caller("bob", by_cookie=True)
    assert keys.of_session(cookie, now=1000 + 13 * 3600) is None
    name, until, seal = cookie.split(".")
    for forged in (f"alice.{until}.{seal}", f"{name}.{int(until) + 9}.{seal}", "", "..", "é.1.2"):
        assert keys.of_session(forged, now=1001) is None
    other = Keys({"bob": "another key of bob's"})
    assert other.of_session(cookie, now=1001) is None
