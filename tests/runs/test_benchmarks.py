"""A run, an adapter and a model on benchmarks: side by side, written down whole, from the command line."""

from __future__ import annotations

import json
from importlib import util
from pathlib import Path
from typing import Any

import pytest

if util.find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed: pip install -e .[eval]", allow_module_level=True)

from pennyweight import cli
from pennyweight.errors import AdapterError, ConfigError
from pennyweight.evaluate.tasks import Wanted
from pennyweight.runs import benchmark, merge_run
from tests.evaluate.conftest import benchmarks  # noqa: F401 - fixture
from tests.runs.test_runs import finished  # noqa: F401 - fixture
from tests.test_finetune import description, rows  # noqa: F401 - fixtures


def silent(line: str) -> None:
    pass


@pytest.fixture
def wanted(benchmarks: Path) -> Wanted:  # noqa: F811
    return Wanted(("mmlu_anatomy", "gsm8k"), (benchmarks,), limit=2, num_fewshot=0)


def test_a_run_stands_beside_its_base(finished: Any, wanted: Wanted) -> None:  # noqa: F811
    folder, said = finished(), []
    answer = benchmark(str(folder), wanted, say=said.append)
    assert answer["arms"] == ["base", "tuned"]
    assert answer["quantization"] == "nf4"
    assert list(answer["tasks"]) == ["mmlu_anatomy", "gsm8k"]
    figures = answer["tasks"]["mmlu_anatomy"]["metrics"]["acc"]
    change = figures["difference"]
    assert change["difference"] == pytest.approx(
        figures["tuned"]["value"] - figures["base"]["value"]
    )
    assert change["rows"] == 2
    assert figures["higher_is_better"] is True
    assert said[-1] == "tuned: 2 of 2 answers written"
    out = folder / "benchmarks" / "mmlu_anatomy+gsm8k-limit2-0shot"
    assert answer["written_to"] == str(out)
    written = json.loads((out / "results.json").read_text())
    assert (
        written["tasks"]["mmlu_anatomy"]["metrics"]["acc"]["tuned"]["value"]
        == figures["tuned"]["value"]
    )
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    # gsm8k is read off by two filters.
    assert len(samples) == 2 * (2 + 2 * 2)
    asked = [s for s in samples if s["task"] == "mmlu_anatomy" and s["row"] == 0]
    assert [s["arm"] for s in asked] == ["base", "tuned"]
    assert asked[0]["prompts"] == asked[1]["prompts"]
    assert asked[0]["responses"] != asked[1]["responses"], "the adapter was read"
    assert "| mmlu_anatomy | acc | 2 |" in (out / "table.md").read_text()
    assert (out / "scores.png").stat().st_size > 5000


def test_a_model_tuned_whole_takes_the_place_of_its_base(
    finished: Any,  # noqa: F811
    wanted: Wanted,
) -> None:
    answer = benchmark(str(finished("full")), wanted, chat=True, say=silent)
    assert answer["arms"] == ["base", "tuned"]
    assert answer["written_to"].endswith("-chat")


def test_an_adapter_a_merged_folder_and_a_run_are_one(
    finished: Any,  # noqa: F811
    wanted: Wanted,
    tiny_llama_folder: Path,
    tmp_path: Path,
) -> None:
    folder = finished("lora")
    merge_run(folder, tmp_path / "merged", dtype="float32")
    run = benchmark(str(folder), wanted, say=silent)
    adapter = benchmark(
        str(folder / "adapter"),
        wanted,
        model=str(tiny_llama_folder),
        out=tmp_path / "out",
        say=silent,
    )
    merged = benchmark(str(tmp_path / "merged"), wanted, say=silent)
    assert (adapter["arms"], merged["arms"]) == (["base", "tuned"], ["model"])
    assert "written_to" not in merged
    assert (tmp_path / "out" / "results.json").is_file()
    for task, entry in run["tasks"].items():
        for metric, figures in entry["metrics"].items():
            assert adapter["tasks"][task]["metrics"][metric] == figures
            alone = merged["tasks"][task]["metrics"][metric]["model"]
            assert alone["value"] == figures["tuned"]["value"]


def test_what_does_not_go_together_is_refused(
    finished: Any,  # noqa: F811
    wanted: Wanted,
    tiny_llama_folder: Path,
    tmp_path: Path,
) -> None:
    folder = finished()
    with pytest.raises(ConfigError, match="measured as it was trained"):
        benchmark(str(folder), wanted, quantization="none")
    with pytest.raises(ConfigError, match="only for the folder of an adapter"):
        benchmark(str(tiny_llama_folder), wanted, model="builtin")
    with pytest.raises(ConfigError, match="not the folder of a run, an adapter or a model"):
        benchmark(str(tmp_path), wanted)
    with pytest.raises(AdapterError, match="this base is builtin"):
        benchmark(str(folder / "adapter"), wanted, model="builtin", say=silent)


def test_the_command_line_says_it_in_a_table_and_in_json(
    benchmarks: Path,  # noqa: F811
    tiny_llama_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["evaluate", str(tiny_llama_folder), *arguments])
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    asked = ("--tasks", "mmlu", "--data-dir", str(benchmarks), "--limit", "2")
    code, out, _ = run(*asked)
    assert code == 0
    assert "mmlu_humanities" in out
    assert "mmlu: test.jsonl, dev.jsonl (test rows); 0 examples" in out.replace(
        "dev.jsonl, test.jsonl", "test.jsonl, dev.jsonl"
    )
    assert "the first 2 rows of each task" in out
    assert "mmlu: no rows for marketing" in out
    code, out, err = run(*asked, "--json")
    assert code == 0
    answer = json.loads(out)
    assert answer["tasks"]["mmlu"]["rows"] == 6
    assert answer["tasks"]["mmlu"]["metrics"]["acc"]["model"]["interval_95"][0] >= 0
    assert "continuations scored" in err
    for arguments, fault in (
        (("--limit", "2"), "--limit: only with --tasks"),
        (("--tasks", "mmlu", "--rows", "2"), "--rows: only with no --tasks"),
        (("--tasks", "humaneval"), "--allow-code-execution"),
    ):
        code, _, err = run(*arguments)
        assert code == 2
        assert fault in err
