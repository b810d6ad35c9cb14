"""Starting a server: its settings, its address, its folder, and what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pennyweight.errors import ConfigError
from pennyweight.serve import ServeSettings, load_settings
from pennyweight.serve import run as running
from pennyweight.serve.keys import Keys
from pennyweight.train import RunLock


def test_settings_come_from_a_file_and_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("base: {model: there, quantization: none}\nport: 9000\nchat: {rows: 3}\n")
    found = load_settings(file, {"base.model": "here", "host": "::1"})
    assert (found.base.model, found.base.quantization) == ("here", "none")
    assert (found.port, found.host, found.chat.rows) == (9000, "::1", 3)
    assert found.base_id == "here"
    assert load_settings(None, {}) == ServeSettings()


def test_every_wrong_setting_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("prot: 8000\nchat:\n  rows: 0\n  row: 2\nstore: sqlite\n")
    with pytest.raises(ConfigError) as fault:
        load_settings(file, {})
    said = sorted(str(fault.value).splitlines())
    assert [line.split(": ")[0] for line in said] == [f"serve.yaml:{n}" for n in (1, 3, 4, 5)]
    assert 'did you mean "port"' in said[0]
    assert 'did you mean "rows"' in said[2]
    with pytest.raises(ConfigError, match="cannot be read"):
        load_settings(tmp_path / "none.yaml", {})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.invalid"])
def test_an_address_for_others_needs_a_key_that_was_chosen(host: str, tmp_path: Path) -> None:
    made = Keys({"default": "k" * 20}, made_in=tmp_path / "api_key")
    given = Keys({"default": "k" * 20})
    settings = ServeSettings(host=host)
    with pytest.raises(ConfigError, match="PENNYWEIGHT_API_KEY"):
        running._refuse_open(settings, made)
    running._refuse_open(settings, given)
    for here in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        running._refuse_open(ServeSettings(host=here), made)
    assert ServeSettings().host == "127.0.0.1"


def test_two_servers_never_write_to_one_folder(tmp_path: Path) -> None:
    with (
        RunLock(tmp_path, "server"),
        pytest.raises(ConfigError, match=r"another server is writing here .*data_dir"),
        RunLock(tmp_path, "server"),
    ):
        pass


def test_what_is_printed_can_be_typed(tmp_path: Path) -> None:
    made = Keys({"default": "k" * 20}, made_in=tmp_path / "api_key")
    said = running._welcome(
        ServeSettings(port=0), made, "k" * 20, running._address("127.0.0.1", 8123)
    )
    assert said[0].startswith("key: kkk")
    assert "http://127.0.0.1:8123/v1/chat/completions" in said[1]
    assert f'Bearer {"k" * 20}"' in said[1]
    compile(said[2], "said", "exec")
    assert said[-1] == "serving builtin at http://127.0.0.1:8123"
    given = "\n".join(
        running._welcome(
            ServeSettings(),
            Keys({"a": "k" * 20}),
            "$PENNYWEIGHT_API_KEY",
            running._address("::1", 1),
        )
    )
    assert "k" * 20 not in given


def test_the_package_of_a_server_imports_nothing_heavy() -> None:
    code = (
        "import sys, pennyweight.serve, pennyweight.cli; "
        "print([m for m in ('torch', 'fastapi', 'uvicorn', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_its_extra_a_server_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(ConfigError, match=r"needs uvicorn: pip install 'pennyweight\[serve\]'"):
        running.serve(ServeSettings(data_dir=str(tmp_path)))
