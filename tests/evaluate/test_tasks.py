"""Tasks through lm-eval: equal to its own model over transformers, refused before anything is loaded."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import pytest

if util.find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed: pip install -e .[eval]", allow_module_level=True)

from pennyweight.config import BaseConfig
from pennyweight.data.chat import Renderer
from pennyweight.errors import ConfigError, DataError
from pennyweight.evaluate.tasks import (
    Tasks,
    TaskScores,
    Wanted,
    catalogue,
    differences,
    load_tasks,
    measure_tasks,
)
from pennyweight.evaluate.tasks.measure import FEWSHOT_SEED
from pennyweight.model import BaseModel, load_base


def opened(folder: Path) -> BaseModel:
    return load_base(BaseConfig(model=str(folder), quantization="none", device="cpu"))


def harness_model(folder: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2)


def harness_results(tasks: Tasks, folder: Path) -> Any:
    """What lm-eval's own model over transformers reaches on the same tasks."""
    from lm_eval.evaluator import evaluate

    for task in tasks.loaded["tasks"].values():
        task.set_fewshot_seed(FEWSHOT_SEED)
    model = harness_model(folder)
    return evaluate(model, tasks.loaded, limit=tasks.wanted.limit, bootstrap_iters=100)


def assert_equal(ours: TaskScores, theirs: Any) -> None:
    """Log-likelihoods within 1e-4, everything else exactly."""
    assert ours.samples.keys() == theirs["samples"].keys()
    for name, samples in ours.samples.items():
        for mine, their in zip(samples, theirs["samples"][name], strict=True):
            assert mine["arguments"] == their["arguments"]
            for one, two in zip(mine["resps"], their["resps"], strict=True):
                if isinstance(two[0], tuple):
                    assert one[0][0] == pytest.approx(two[0][0], abs=1e-4)
                    assert one[0][1] == two[0][1]
                else:
                    assert one == two
    for score in ours.scores:
        figures = theirs["results"][score.task]
        assert score.value == figures[f"{score.metric},{score.filter}"]
        assert score.stderr == figures[f"{score.metric}_stderr,{score.filter}"]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_figures_are_those_of_lm_evals_own_model(
    tiny_model_folder: Callable[[str], Path], benchmarks: Path, family: str
) -> None:
    folder = tiny_model_folder(family)
    tasks = load_tasks(Wanted(("mmlu", "gsm8k"), (benchmarks,), limit=4, num_fewshot=1))
    # lm-eval's model takes no answers as long as its 256 positions.
    short = {"max_gen_toks": 40}
    tasks.loaded["tasks"]["gsm8k"].set_config("generation_kwargs", short, update=True)
    ours = measure_tasks(tasks, opened(folder))
    assert_equal(ours, harness_results(tasks, folder))
    assert {s.task for s in ours.scores} >= {"mmlu", "mmlu_stem", "mmlu_anatomy", "gsm8k"}
    assert ours.num_fewshot["gsm8k"] == 1
    assert any(len(s["resps"][0][0]) > 0 for s in ours.samples["gsm8k"]), "answers were written"


def test_a_real_model_on_a_slice_of_the_real_mmlu(shared_data: Path) -> None:
    folder = shared_data / "models" / "stories260k"
    tasks = load_tasks(Wanted(("mmlu",), (shared_data / "eval",), limit=2))
    ours = measure_tasks(tasks, opened(folder))
    assert_equal(ours, harness_results(tasks, folder))
    (whole,) = (score for score in ours.scores if score.task == "mmlu")
    assert whole.rows == len(whole.by_row or ()) == 57 * 2
    low, high = whole.interval or (1.0, 0.0)
    assert low < whole.value < high
    assert ours.cut > 0, "some questions are longer than 512 tokens"
    assert tasks.notes == ("mmlu: measured on the validation rows; the folder has no test rows",)


def test_whole_texts_are_as_likely(shared_data: Path) -> None:
    from lm_eval.api.instance import Instance

    from pennyweight.evaluate.tasks.lm import ResidentLM

    folder = shared_data / "models" / "stories260k"
    texts = ["Once upon a time there was a dog. " * 90, "Lily", "A cat and a hat sat."]
    asked = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    ours = ResidentLM(opened(folder)).loglikelihood_rolling(asked)
    theirs = harness_model(folder).loglikelihood_rolling(asked)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_the_same_questions_are_asked_again(tiny_llama_folder: Path, benchmarks: Path) -> None:
    """Examples are drawn at random by seed; both arms of a comparison must see the same."""
    base = opened(tiny_llama_folder)
    tasks = load_tasks(Wanted(("gsm8k",), (benchmarks,), limit=3, num_fewshot=2))
    first, again = measure_tasks(tasks, base), measure_tasks(tasks, base)
    assert first.samples == again.samples
    for change in differences(first, again).values():
        assert (change.mean, change.interval, change.rows) == (0.0, (0.0, 0.0), 3)


def test_examples_never_hold_the_question_itself(
    tiny_llama_folder: Path, benchmarks: Path, tmp_path: Path
) -> None:
    (tmp_path / "gsm8k").mkdir()
    rows = (benchmarks / "gsm8k" / "train.jsonl").read_text()
    (tmp_path / "gsm8k" / "train.jsonl").write_text(rows)
    tasks = load_tasks(Wanted(("gsm8k",), (tmp_path,), num_fewshot=5))
    assert tasks.notes == (
        "gsm8k: measured on the train rows; the folder has no test rows",
        "gsm8k: examples are other rows of those measured",
    )
    found = measure_tasks(tasks, opened(tiny_llama_folder))
    for sample in found.samples["gsm8k"]:
        prompt = sample["arguments"][0][0]
        assert prompt.count("Question:") == 6
        assert prompt.count(f"Question: {sample['doc']['question']}") == 1


def test_chat_prompts_are_those_of_training(tiny_llama_folder: Path, benchmarks: Path) -> None:
    from pennyweight.evaluate.tasks.lm import ResidentLM

    base = opened(tiny_llama_folder)
    renderer = Renderer(base.tokenizer)
    tasks = load_tasks(Wanted(("mmlu_anatomy",), (benchmarks,), limit=1, num_fewshot=1))
    found = measure_tasks(tasks, base, renderer=renderer)
    (sample,) = found.samples["mmlu_anatomy"]
    prompt = sample["arguments"][0][0]
    system, example, question = prompt.split("<|im_start|>user\n")
    assert "multiple choice questions (with answers) about anatomy" in system
    assert "<|im_start|>assistant\n" in example
    messages = [
        {"role": "system", "content": system.split("\n", 1)[1].rpartition("<|im_end|>")[0]},
        {"role": "user", "content": example.split("<|im_end|>")[0]},
        {"role": "assistant", "content": example.split("assistant\n")[1].split("<|im_end|>")[0]},
        {"role": "user", "content": question.split("<|im_end|>")[0]},
    ]
    lm = ResidentLM(base, renderer=renderer)
    assert lm.tok_encode(prompt) == renderer.prompt(messages)
    begun = lm.apply_chat_template([*messages, {"role": "assistant", "content": "The"}], False)
    assert begun == prompt + "The"


def test_settings_of_generation_that_are_not_known_are_refused(tiny_llama_folder: Path) -> None:
    from lm_eval.api.instance import Instance

    from pennyweight.evaluate.tasks.lm import ResidentLM

    lm = ResidentLM(opened(tiny_llama_folder))
    beams = Instance("generate_until", {}, ("the", {"until": ["."], "num_beams": 4}), 0)
    with pytest.raises(DataError, match="num_beams"):
        lm.generate_until([beams])
    drawn = Instance(
        "generate_until", {}, ("the", {"until": [], "do_sample": True, "temperature": 1.0}), 0
    )
    first, second = lm.generate_until([drawn, drawn])
    assert first != second, "the same prompt again is another draw"
    assert [first, second] == lm.generate_until([drawn, drawn])


def test_programs_pass_or_fail_by_their_tests(
    tiny_llama_folder: Path, benchmarks: Path, problem: dict[str, Any]
) -> None:
    from lm_eval.api.model import LM
    from lm_eval.evaluator import evaluate

    class Writer(LM):
        """Right once, then wrong."""

        def loglikelihood(self, requests: Any) -> Any:
            raise NotImplementedError

        def loglikelihood_rolling(self, requests: Any) -> Any:
            raise NotImplementedError

        def generate_until(self, requests: Any) -> list[str]:
            texts = [problem["canonical_solution"], "    return x * x\n"]
            return [texts[i % 2] for i in range(len(requests))]

    names = ("humaneval", "humaneval_instruct")
    tasks = load_tasks(Wanted(names, (benchmarks,), allow_code_execution=True))
    assert tasks.confinement is not None
    found = evaluate(Writer(), tasks.loaded, confirm_run_unsafe_code=True)
    for name in names:
        assert found["results"][name]["pass@1,create_test"] == 0.5
    assert "lm_eval.tasks.humaneval.utils" not in sys.modules, "its import runs a program"
    ours = measure_tasks(tasks, opened(tiny_llama_folder))
    assert {score.value for score in ours.scores} == {0.0}


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (Wanted(()), "no task is named"),
        (Wanted(("mmlu_anatomi",)), 'knows no task .*did you mean "mmlu_anatomy"'),
        (Wanted(("humaneval",)), "--allow-code-execution runs them in separate, limited processes"),
        (Wanted(("mmlu", "humaneval_64")), "--allow-code-execution"),
        (
            Wanted(("humaneval_plus",), allow_code_execution=True),
            "inside this process, which Pennyweight never does",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(
    wanted: Wanted, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All of lm-eval's names take ten seconds to read; a few folders stand for them.
    few = catalogue._manager_of(("mmlu", "humaneval"))
    monkeypatch.setattr(catalogue, "_manager_of", lambda names: few)
    with pytest.raises(ConfigError, match=said):
        load_tasks(wanted)


def test_rows_that_are_nowhere_name_both_ways_out(
    benchmarks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests are offline: HF_HUB_OFFLINE is set, and no cache holds these."""
    with pytest.raises(DataError, match=r"--data-dir FOLDER.*unset HF_HUB_OFFLINE") as caught:
        load_tasks(Wanted(("gsm8k",)))
    assert "gsm8k" in str(caught.value)
    with pytest.raises(DataError, match=r"no file of rows in .*gsm8k"):
        load_tasks(Wanted(("gsm8k",), (benchmarks / "mmlu",)))


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'pennyweight\[eval\]'"):
        load_tasks(Wanted(("mmlu",)))


def test_nothing_of_lm_eval_is_imported_before_it_is_asked_for() -> None:
    program = (
        "import sys\nimport pennyweight.evaluate.tasks, pennyweight.runs, pennyweight.cli\n"
        "print({'lm_eval', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
