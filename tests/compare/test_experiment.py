"""The whole experiment on the tiny model: what it leaves behind, what it does not do twice, and
what it refuses or leaves out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pennyweight.compare import Comparison, compare
from pennyweight.errors import ConfigError, DataError, DivergedError, Interrupted, MemoryExhausted
from pennyweight.runs import RunFolder, evaluate_run
from tests.compare.conftest import Done, Launched


@pytest.fixture
def quick(description: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Rates are given and nothing is drawn, so that only runs are run."""
    monkeypatch.setattr("pennyweight.compare.page.draw", lambda found, folder: ([], None))

    def run(launched: Launched | None = None, **told: Any) -> tuple[Comparison, Launched]:
        rates = {"full": 1e-3, "lora": 1e-2, "qlora": 1e-2}
        settings = {"learning_rates": rates, "arms": ["full", "lora"], **told}
        launched = launched or Launched()
        config = description(tmp_path / "out", **settings)
        return compare(config, launch=launched, say=lambda text: None), launched

    return run


def test_every_arm_has_its_figures(done: Done) -> None:
    names = [arm.name for arm in done.found.arms]
    assert names == ["full", "lora-r2", "lora-r4", "qlora-r2", "qlora-r4"]
    assert [base.storage for base in done.found.bases] == ["none", "nf4"]
    untuned = {base.storage: base.loss.mean for base in done.found.bases}
    for arm in done.found.arms:
        assert arm.loss.mean < untuned[arm.storage]
        assert arm.loss.documents is not None
        assert arm.loss.documents[0] < arm.loss.mean < arm.loss.documents[1]
        assert arm.kept is not None
        assert arm.answers is not None
        assert arm.bytes > 0
        assert arm.tokens_per_second > 0
    full, lora2, lora4, *_ = done.found.arms
    assert full.kept is not None
    assert full.kept.mean == pytest.approx(1)
    assert lora4.trained_parameters == 2 * lora2.trained_parameters < full.trained_parameters
    assert full.bytes > lora4.bytes > lora2.bytes


def test_arms_see_the_same_tokens_and_are_ordinary_runs(done: Done) -> None:
    assert len({arm.trained_tokens for arm in done.found.arms}) == 1
    assert not any("unequal" in notice for notice in done.found.notices)
    for arm in done.found.arms:
        folder = done.folder / arm.name / "seed-0"
        receipt = json.loads((folder / "receipt.json").read_text())
        assert receipt["result"]["loss_after"] == pytest.approx(arm.loss.mean, rel=1e-5)
    again = evaluate_run(done.folder / "lora-r4" / "seed-0", generate_rows=0)
    assert again["tuned"]["loss"] == pytest.approx(done.found.arms[2].loss.mean, rel=1e-6)
    data = {
        json.loads(path.read_text())["data"]["fingerprint"]
        for path in done.folder.glob("*/seed-0/receipt.json")
    }
    assert len(data) == 1


def test_rates_are_tuned_where_none_is_given(done: Done) -> None:
    assert [curve.label for curve in done.found.ranges] == ["full", "LoRA r 2", "LoRA r 4"]
    for curve in done.found.ranges:
        assert curve.chosen in curve.rates
    rates = {arm.name: (arm.learning_rate, arm.rate_from) for arm in done.found.arms}
    assert rates["qlora-r4"] == (1e-2, "given")
    assert rates["lora-r4"] == (done.found.ranges[2].chosen, "range test")


def test_a_rate_that_no_arm_uses_is_said_to_be_unused(done: Done) -> None:
    (told,) = done.found.notices
    assert told.startswith("train.learning_rate 0.0005 (Python) is not used: the rate of full, ")
    assert "LoRA r 4 is tuned; compare.learning_rates={full: 0.0005} gives one" in told
    assert "QLoRA" not in told  # its rate is given
    assert told in (done.folder / "compare.md").read_text()


def test_effective_ranks_are_within_the_rank(done: Done) -> None:
    for arm in done.found.arms:
        if arm.rank is None:
            assert arm.effective_rank is None
            continue
        assert arm.effective_rank is not None
        assert len(arm.effective_rank) == 14  # 7 linear layers in each of 2
        assert all(0 < each.mean <= arm.rank + 1e-9 for each in arm.effective_rank.values())


def test_the_page_and_the_json_say_the_same(done: Done) -> None:
    told = json.loads((done.folder / "compare.json").read_text())
    assert told == json.loads(json.dumps(done.found.to_dict()))
    page = (done.folder / "compare.md").read_text()
    for arm in done.found.arms:
        assert f"| {arm.label} | {arm.loss.mean:.3f} [" in page


def test_what_is_finished_is_not_done_again_and_a_seed_more_is_its_own_run(quick: Any) -> None:
    first, launched = quick()
    assert launched.asked == [
        "groundwork", "measured", "full/seed-0", "measured", "lora-r4/seed-0", "measured"
    ]  # fmt: skip
    again, launched = quick()
    assert launched.asked == ["groundwork"]
    assert again == first
    more, launched = quick(seeds=[0, 1], arms=["full", "lora"])
    assert launched.asked == [
        "groundwork", "full/seed-1", "measured", "lora-r4/seed-1", "measured"
    ]  # fmt: skip
    assert more.arms[0].loss.by_seed[0] == first.arms[0].loss.by_seed[0]
    assert more.arms[0].loss.seeds is not None


def test_a_changed_description_is_refused_with_every_difference(quick: Any) -> None:
    quick()
    launched = Launched()
    with pytest.raises(ConfigError) as refused:
        quick(launched, train={"max_steps": 5})
    told = str(refused.value).splitlines()
    assert [line.split(": ", 1)[1] for line in told[:2]] == [
        "train.eval_steps: 4 then, 5 now",
        "train.max_steps: 4 then, 5 now",
    ]
    assert "another output_dir" in told[-1]
    assert launched.asked == ["groundwork"]


def test_changed_rows_are_refused(quick: Any, description: Any, tmp_path: Path) -> None:
    quick(arms=["lora"])
    receipt = tmp_path / "out" / "lora-r4" / "seed-0" / "receipt.json"
    told = json.loads(receipt.read_text())
    receipt.write_text(json.dumps({**told, "data": {"fingerprint": "other"}}))
    with pytest.raises(ConfigError, match="data: the content is another"):
        quick(arms=["lora"])


def test_what_cannot_fit_is_said_and_the_others_go_on(quick: Any) -> None:
    def does_not_fit(arguments: Sequence[str], answer: dict[str, Any]) -> None:
        if arguments[-1] == "groundwork":
            answer["plans"]["full"] |= {"fits": False, "sentence": "Cannot: needs 56 GB of 24 GB."}

    found, launched = quick(Launched(after=does_not_fit))
    assert found.left_out == {"full": "Cannot: needs 56 GB of 24 GB."}
    assert [arm.name for arm in found.arms] == ["lora-r4"]
    assert found.arms[0].kept is None
    assert not any(name.startswith("full") for name in launched.asked)


@pytest.mark.parametrize("failure", [MemoryExhausted, DivergedError])
def test_an_arm_that_runs_out_of_memory_or_diverges_is_left_out(quick: Any, failure: Any) -> None:
    def fails(arguments: Sequence[str]) -> None:
        if "full" in arguments[-1]:
            raise failure("that was that")

    found, _ = quick(Launched(before=fails))
    assert found.left_out == {"full": "that was that"}
    assert [arm.name for arm in found.arms] == ["lora-r4"]


def test_a_base_that_fits_only_quantized_is_compared_against(quick: Any) -> None:
    asked = []

    def fails(arguments: Sequence[str]) -> None:
        asked.append(arguments[-1])
        if asked.count("measured") == 1 and arguments[-1] == "measured":
            raise MemoryExhausted("the plain base is too large")

    found, _ = quick(Launched(before=fails), arms=["qlora"])
    assert [base.storage for base in found.bases] == ["nf4"]
    assert "base" in found.left_out


def test_other_faults_end_it_and_a_stop_is_resumed(quick: Any) -> None:
    def stopped(arguments: Sequence[str]) -> None:
        if arguments[-1].endswith("lora-r4/seed-0.yaml"):
            raise Interrupted("SIGTERM")

    with pytest.raises(Interrupted):
        quick(Launched(before=stopped))
    _, launched = quick()
    assert launched.asked == ["groundwork", "lora-r4/seed-0", "measured"]
    with pytest.raises(DataError, match=r"compare\.general_text: nowhere.txt: no such file"):
        quick(general_text="nowhere.txt")


def test_general_text_of_ones_own(quick: Any, tmp_path: Path) -> None:
    file = tmp_path / "prose.jsonl"
    file.write_text("".join(json.dumps({"text": f"A day like day {i}."}) + "\n" for i in range(9)))
    found, _ = quick(arms=["lora"], general_text=str(file), general_rows=5)
    assert found.general_documents == 5


def test_a_torn_range_test_goes_on_with_the_rates_it_has(description: Any, tmp_path: Path) -> None:
    config = description(tmp_path / "out", arms=["lora"])
    whole = compare(config, launch=Launched(), say=lambda text: None)
    file = tmp_path / "out" / "lora-r4" / "range_test.json"
    kept = json.loads(file.read_text())
    tried = kept["answer"]["tried"]
    first = min(tried.values(), key=lambda point: point["learning_rate"])
    marked = {**first, "loss": first["loss"] + 1e-9}
    kept["answer"] = {"tried": {"0.001": marked}}
    file.write_text(json.dumps(kept))
    again = compare(config, launch=(launched := Launched()), say=lambda text: None)
    assert launched.asked == ["groundwork", "range_test"]
    assert again.ranges[0].losses[0] == marked["loss"]
    assert again.ranges[0].losses[1:] == whole.ranges[0].losses[1:]


def test_runs_open_like_any_other(done: Done) -> None:
    config, base = RunFolder(done.folder / "qlora-r2" / "seed-0").open()
    assert config.adapter.r == 2
    assert config.adapter.lora_alpha == 4
    assert base.quantization == "nf4"
