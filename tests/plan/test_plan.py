"""The plan as a whole: verdicts, what to paste, the largest fit, work and disk."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pennyweight.config import DataConfig, RunConfig, TrainConfig
from pennyweight.errors import ConfigError
from pennyweight.model import shapes as shapes_by_library
from pennyweight.plan import DataSize, fit, named_device, plan
from pennyweight.plan.claims import PUBLISHED
from pennyweight.plan.cost import flops_a_token
from pennyweight.plan.guess import guess_rows
from pennyweight.plan.memory import peak_bytes
from pennyweight.plan.outline import shapes_of
from pennyweight.plan.search import sized
from pennyweight.plan.setting import Setting
from pennyweight.shapes import dense_shapes
from tests.plan.conftest import CPU, run_config

LLAMA3 = PUBLISHED["Llama-3-8B"]
CARD = named_device("rtx3060")


def run(batch: int = 8, length: int = 2048, **train: object) -> RunConfig:
    return RunConfig(
        data=DataConfig(max_length=length), train=TrainConfig(batch_size=batch, **train)
    )


def pasted(config: RunConfig, overrides: tuple[str, ...]) -> RunConfig:
    from pennyweight.plan.search import _with

    return RunConfig.model_validate(_with(config, overrides).model_dump())


def test_a_run_that_fits() -> None:
    said = plan(run(1), LLAMA3, device=named_device("a100-80"))
    assert said.fits
    assert said.recompute == "none"
    assert said.changes == ()
    assert said.sentence().startswith("Fits")


def test_beside_a_resident_base_what_stands_and_what_a_pass_adds_are_told_apart() -> None:
    card = named_device("a100-80")
    alone = plan(run(1), LLAMA3, device=card)
    base = sum(p.bytes for p in alone.parts[:2]) + alone.parts[-1].bytes
    wanted = alone.standing_bytes + alone.pass_bytes
    assert alone.standing_bytes == 16 * alone.trained_parameters
    assert alone.peak_bytes == base + wanted
    just = plan(run(1), LLAMA3, device=card, beside_bytes=wanted)
    assert (just.fits, just.recompute, just.budget_bytes) == (True, "none", base + wanted)
    less = plan(run(1), LLAMA3, device=card, beside_bytes=wanted // 2)
    assert less.recompute != "none"
    assert less.standing_bytes + less.pass_bytes <= wanted // 2
    assert not plan(run(1), LLAMA3, device=card, beside_bytes=alone.standing_bytes).fits


def test_auto_recomputes_only_where_it_must() -> None:
    card = named_device("rtx3060")
    said = plan(run(1), LLAMA3, device=card)
    assert said.recompute in ("minimal", "full")
    assert 0 < said.recomputed_layers < 32
    assert said.recompute_in_words in said.sentence()
    one_more_kept = Setting(run(1), LLAMA3, card, recomputed=said.recomputed_layers - 1)
    assert peak_bytes(one_more_kept, said.recompute) > said.budget_bytes


def test_changes_pasted_make_it_fit() -> None:
    config = run(64)
    said = plan(config, LLAMA3, device=CARD)
    assert said.verdict == "fits with changes"
    mended = pasted(config, said.changes)
    again = plan(mended, LLAMA3, device=CARD)
    assert again.fits
    assert again.peak_bytes == said.peak_after_changes
    train = mended.train
    assert train.batch_size * train.gradient_accumulation_steps == 64, "the same optimizer step"
    assert all(change in said.sentence() for change in said.changes)


def test_full_fine_tuning_that_cannot_is_sent_to_adapters() -> None:
    said = plan(run(1, method="full"), PUBLISHED["Llama-2-7B"], device=named_device("rtx4090"))
    assert said.verdict == "fits with changes"
    assert said.changes[0] in ("train.method=lora", "train.method=qlora")


def test_what_cannot_fit_is_said_so() -> None:
    said = plan(run(1), PUBLISHED["Llama-2-70B"], device=CARD)
    assert said.verdict == "cannot"
    assert "larger device" in said.sentence()


def test_largest_fit_fits_and_one_more_does_not() -> None:
    found = fit(run(), LLAMA3, budget_bytes=24 * 10**9, device=named_device("rtx4090"))
    setting = Setting(run(), LLAMA3, named_device("rtx4090"))
    assert found.peak_bytes <= 24e9
    more = sized(setting, found.max_length, found.batch_size + 1)
    assert peak_bytes(more, found.recompute) > 24e9
    assert found.overrides[0] == f"data.max_length={found.max_length}"


def test_no_fit_says_how_much_it_takes() -> None:
    with pytest.raises(ConfigError, match=r"needs \d+\.\d GB"):
        fit(run(), LLAMA3, budget_bytes=10**9, device=CARD)


def test_operations_of_the_reference_shape() -> None:
    """Llama-3-8B, r = 16, 2,048 tokens: 32.15 GFLOP a token; 46.7 if all were recomputed, less the
    product with `down_proj`; 42.4 minimal."""
    setting = Setting(run(1), LLAMA3, named_device("h200"))
    assert flops_a_token(setting, "none") / 1e9 == pytest.approx(32.15, abs=0.05)
    down = 2 * 32 * 4096 * 14336 / 1e9
    assert flops_a_token(setting, "full") / 1e9 == pytest.approx(46.7 - down, abs=0.1)
    assert flops_a_token(setting, "minimal") / 1e9 == pytest.approx(42.4, abs=0.1)


def test_steps_and_tokens_come_from_the_rows() -> None:
    rows = DataSize(rows=1000, tokens=500_000, longest=2048)
    said = plan(run(8), LLAMA3, device=named_device("h200"), rows=rows)
    assert said.cost.tokens == 500_000
    assert said.cost.steps == -(-500_000 // (8 * 2048))
    unknown = plan(run(8), LLAMA3, device=named_device("h200"))
    assert unknown.cost.steps is None
    assert plan(run(8, max_steps=7), LLAMA3, device=named_device("h200")).cost.steps == 7


def test_rows_longer_than_the_model_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.max_length=4096"):
        plan(run(1, 8192), PUBLISHED["Llama-2-7B"], device=CARD)


def test_a_plan_is_plain_json() -> None:
    said = plan(run(1), LLAMA3, device=CARD).to_dict()
    assert json.loads(json.dumps(said))["counted_peak_bytes"] > 0


def test_rows_are_guessed_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    row = json.dumps({"prompt": "a question of some length", "completion": "an answer"})
    file.write_text(f"{row}\n" * 40, encoding="utf-8")
    guessed = guess_rows(DataConfig(train=str(file), eval_fraction=0.0), 32000)
    assert guessed is not None
    assert guessed.rows == 40
    assert not guessed.exact
    assert guess_rows(DataConfig(train=str(tmp_path / "none.jsonl")), 32000) is None


def test_a_guess_does_not_make_memory_smaller() -> None:
    guess = DataSize(rows=3, tokens=30, longest=10, exact=False)
    config = run_config(tokens=256)
    model = dense_shapes("x", layers=2, hidden=64, intermediate=128, heads=4, vocab=100)
    assert Setting(config, model, CPU, guess).micro_tokens == 256


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_config_alone_gives_the_librarys_shapes(tiny_model_folder: object, family: str) -> None:
    folder = str(tiny_model_folder(family))  # type: ignore[operator]
    quick, slow = shapes_of(folder), shapes_by_library(folder)
    assert {(p.name, p.shape, p.kind) for p in quick.parameters} == {
        (p.name, p.shape, p.kind) for p in slow.parameters
    }
    assert quick.count == slow.count
    numbers = ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocab")
    assert all(getattr(quick, n) == getattr(slow, n) for n in numbers)


def test_the_plan_room_imports_nothing_heavy() -> None:
    code = "import sys, pennyweight.plan; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_the_disk_has_no_room_for_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    free = {"hub": 9_300_000_000, "run": 10**15}
    room = importlib.import_module("pennyweight.plan.cost")  # the name is also its function's
    monkeypatch.setattr(room, "_free", lambda folder: free[folder.name])
    config = run(1).model_copy(update={"output_dir": str(tmp_path / "run")})
    elsewhere = config.model_copy(
        update={"base": config.base.model_copy(update={"model": "someone/llama"})}
    )
    card = named_device("a100-80")
    said = plan(elsewhere, LLAMA3, device=card)
    first, second = said.sentence().splitlines()
    assert first.startswith("Fits: ")
    assert second == (
        "Not enough disk: the download needs 16.06 GB, 9.30 GB are free there; free some, or set "
        "HF_HOME to a larger disk."
    )
    assert said.to_dict()["disk"]["download_free"] == free["hub"]
    assert "Not enough" not in plan(config, LLAMA3, device=card).sentence()  # builtin is here
    free["run"] = 10**6
    assert "checkpoints and result need" in plan(config, LLAMA3, device=card).sentence()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)  # begun: some of it is there
    assert "Not enough" not in plan(config, LLAMA3, device=card).sentence()
