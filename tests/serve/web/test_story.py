"""A newcomer's way in a real browser: sign in, upload, look, train, ask both; with the keyboard alone
where that matters, and without sideways scrolling at a phone's width."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install -e .[page-test]"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("no chromium on this machine", allow_module_level=True)

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
KEY = "pw-key-of-the-browser-test"
PATIENCE_MS = 90_000


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of its own process on the built-in base."""
    folder = tmp_path_factory.mktemp("server")
    told = folder / "said"
    with told.open("w") as said:
        server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "pennyweight",
                "serve",
                "--port",
                "0",
                "--data-dir",
                str(folder),
            ],
            stderr=said,
            env={**os.environ, "PENNYWEIGHT_API_KEY": KEY, "OMP_NUM_THREADS": "1"},
        )
    try:
        found = None
        for _ in range(3000):
            found = re.search(r"http://127\.0\.0\.1:\d+", told.read_text())
            if found or server.poll() is not None:
                break
            with pytest.raises(subprocess.TimeoutExpired):
                server.wait(0.1)
        assert found, told.read_text()
        yield found[0]
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page whose console has to stay empty: no fault, nothing the policy kept out."""
    context = browser.new_context(viewport={"width": 360, "height": 740})
    context.set_default_timeout(PATIENCE_MS)
    opened = context.new_page()
    said: list[str] = []
    opened.on("pageerror", lambda fault: said.append(str(fault)))
    opened.on("console", lambda line: line.type == "error" and said.append(line.text))
    yield opened
    context.close()
    # Of a door that is knocked at with no key the browser says so, as it should.
    assert [line for line in said if "401" not in line] == []


def rows_file(folder: Path) -> Path:
    path = folder / "functions.jsonl"
    lines = []
    for i in range(40):
        asked = f"Give the signature of this function as JSON.\n\ndef f{i}(a{i}):\n    return {i}"
        answer = json.dumps({"name": f"f{i}", "required": [f"a{i}"], "optional": []})
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": turns}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def fits(page: Any) -> bool:
    """Nothing is wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_from_upload_to_chat(address: str, page: Any, tmp_path: Path) -> None:
    page.goto(address)
    page.get_by_label("Key").fill(KEY)
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Teach the model something").wait_for()
    assert fits(page)

    # The way past the menu is the first thing the keyboard finds.
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    page.get_by_role("link", name="Start the first job").press("Enter")

    page.get_by_label("Choose a file").set_input_files(rows_file(tmp_path))
    page.get_by_label("Name").fill("signatures")
    page.get_by_text("More settings").press("Enter")
    page.get_by_label("At most so many steps").fill("4")
    page.get_by_role("button", name="Look at rows and memory").press("Enter")
    page.get_by_role("heading", name="A look before it runs").wait_for()
    assert page.evaluate("document.activeElement.id") == "look-title"
    assert '"name":' in page.locator("mark.trained").first.inner_text()
    assert "It fits." in page.locator(".verdict").inner_text()
    assert fits(page)

    page.get_by_role("button", name="Start training").press("Enter")
    page.get_by_role("heading", name="signatures").wait_for()
    page.locator(".state.succeeded").wait_for()
    page.locator(".curve canvas").wait_for()
    page.locator("figcaption", has_text="Step 4").wait_for()
    assert fits(page)
    model = page.locator("#status code").inner_text()

    page.get_by_role("link", name="Ask it").press("Enter")
    page.get_by_role("textbox", name="Question", exact=True).wait_for()
    assert page.get_by_role("checkbox", checked=True).count() == 2
    page.get_by_text("Instruction, length, temperature").press("Enter")
    page.get_by_label("Longest answer").fill("12")
    page.get_by_role("textbox", name="Question", exact=True).press("Control+Enter")
    page.get_by_text("All have answered.").wait_for()
    assert page.locator(".answer h2").all_inner_texts() == ["builtin", model]
    for foot in page.locator(".answer .told").all_inner_texts():
        assert re.match(r"\d+ tokens in ", foot), foot
    assert fits(page)

    page.get_by_role("link", name="Adapters").click()
    page.get_by_role("rowheader").filter(has_text=model).first.wait_for()
    assert fits(page)
    page.get_by_role("link", name="Usage").click()
    page.locator("code", has_text=model).wait_for()
    assert fits(page)


def test_rows_that_cannot_be_trained_are_told_by_their_line(
    address: str, page: Any, tmp_path: Path
) -> None:
    path = tmp_path / "wrong.jsonl"
    path.write_text('{"messages": [{"role": "assitant", "content": "<b>x</b>"}]}\n')
    page.goto(f"{address}/jobs/new")
    page.get_by_label("Key").fill(KEY)
    page.keyboard.press("Enter")
    # Who signs in goes on to what was asked for.
    page.get_by_role("heading", name="New job", exact=True).wait_for()
    page.get_by_label("Choose a file").set_input_files(path)
    page.get_by_role("button", name="Look at rows and memory").click()
    page.get_by_role("alert").wait_for()
    assert "wrong.jsonl:1" in page.get_by_role("alert").inner_text()
    assert page.get_by_role("button", name="Start training").count() == 0
