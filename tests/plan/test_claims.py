"""docs/memory.md says what the arithmetic says."""

from __future__ import annotations

from pathlib import Path

import pytest

from pennyweight.plan.claims import CLAIMS, PUBLISHED, held, tables
from pennyweight.plan.memory import peak

PAGE = Path(__file__).resolve().parents[2] / "docs" / "memory.md"


def test_the_page_holds_the_tables() -> None:
    text = PAGE.read_text(encoding="utf-8")
    _, _, rest = text.partition("<!-- tables -->\n")
    written, _, _ = rest.partition("\n<!-- end of tables -->")
    assert written == tables(), "run: python -m pennyweight.plan.claims docs/memory.md"


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen3-0.6B", 0.596),
        ("Llama-2-7B", 6.738),
        ("Mistral-7B", 7.242),
        ("Llama-3-8B", 8.030),
        ("Llama-2-13B", 13.016),
        ("Llama-65B", 65.286),
        ("Llama-2-70B", 68.977),
    ],
)
def test_published_models_have_their_published_size(name: str, billions: float) -> None:
    assert PUBLISHED[name].count / 1e9 == pytest.approx(billions, abs=0.0006)


def test_claims_hold_as_the_page_says() -> None:
    full, lora, large, lean_large, eight, lean_eight, mistral = (
        peak(held(c.model, c.method, c.tokens, c.policy, lean=c.lean), allocated=True)[0] / 1e9
        for c in CLAIMS
    )
    assert full > 56
    assert 12 <= lora <= 16
    assert lean_large < large < 48
    assert 6 < eight < 8  # not in 6 GB while the embedding stands on the card
    assert lean_eight < 6
    assert 4 < mistral < 6


def test_four_bit_weights_are_4_127_bits() -> None:
    parts = {p.name: p.bytes for p in held("Llama-2-7B", "qlora", 512, "full")}
    linear = sum(p.elements for p in PUBLISHED["Llama-2-7B"].linears)
    assert 8 * parts["linear weights"] / linear == pytest.approx(4.127, abs=0.001)
