"""Whatever a run's description is made of, the answer is a run or a ConfigError."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pennyweight.config import RunConfig, load_run, resolve, to_yaml
from pennyweight.config.explain import written
from pennyweight.config.keys import KEYS
from pennyweight.errors import ConfigError

WHOLE = to_yaml(resolve(RunConfig()), commented=False)
MANY = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
FEW = settings(MANY, max_examples=40)

scalars: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["no", "on", "1e-5", "<<", "~", "-", "'", "{{x}}", "\x1b[31m"]),
)
values = st.recursive(
    scalars,
    lambda inside: (
        st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=8), inside, max_size=3)
    ),
    max_leaves=6,
)


Edit = tuple[str, int, int, str, Any]

edits = st.lists(
    st.tuples(
        st.sampled_from(["drop", "double", "swap", "indent", "character", "value"]),
        st.integers(0, 30),
        st.integers(0, 30),
        st.sampled_from([" ", "   ", "\t", "- "]) | st.characters(),
        values,
    ),
    min_size=1,
    max_size=4,
)


def mutate(text: str, edits: list[Edit]) -> str:
    """The text with a few of its characters or lines gone wrong."""
    lines = text.split("\n")
    for kind, at, other, character, value in edits:
        at, other = at % len(lines), other % len(lines)
        line = lines[at]
        match kind:
            case "drop":
                lines[at] = ""
            case "double":
                lines.insert(at, line)
            case "swap":
                lines[at], lines[other] = lines[other], line
            case "indent":
                lines[at] = character + line
            case "character":
                lines[at] = line[:other] + character + line[other + 1 :]
            case "value":
                lines[at] = f"{line.split(':')[0]}: {written(value)}"
    return "\n".join(lines)


@MANY
@given(edits=edits)
def test_a_mutated_file_is_a_run_or_a_config_error(tmp_path: Path, edits: list[Edit]) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(mutate(WHOLE, edits).encode("utf-8", "surrogatepass"))
    answer_is_clean(path)


def answer_is_clean(path: Path, *overrides: str) -> None:
    try:
        run = load_run(path, overrides)
    except ConfigError as error:
        for line in str(error).splitlines():
            assert line.startswith(("run.yaml:", "command line:", str(path)))
            assert line.isprintable()
    else:
        assert resolve(run.config) == run.config


@FEW
@given(key=st.sampled_from(sorted(KEYS)) | st.text(max_size=12), value=values)
def test_any_override_is_a_run_or_a_config_error(tmp_path: Path, key: str, value: Any) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("", encoding="utf-8")
    answer_is_clean(path, f"{key}={written(value)}")


names = st.text(min_size=1, max_size=10)
rows = st.one_of(
    names,
    st.fixed_dictionaries({"path": names}, optional={"split": names, "weight": st.just(0.5)}),
)
runs = st.fixed_dictionaries(
    {},
    optional={
        "base": st.fixed_dictionaries({"model": names}),
        "adapter": st.fixed_dictionaries(
            {
                "r": st.integers(1, 64),
                "lora_alpha": st.floats(1e-9, 1e9),
                "target_modules": st.lists(names, min_size=1, max_size=3),
                "rank_pattern": st.dictionaries(names, st.integers(1, 9), max_size=2),
            }
        ),
        "data": st.fixed_dictionaries(
            {
                "train": rows | st.lists(rows, min_size=1, max_size=3),
                "system": st.none() | st.text(max_size=20),
                "columns": st.dictionaries(names, names, max_size=2),
            }
        ),
        "train": st.fixed_dictionaries(
            {
                "method": st.just("qlora"),
                "learning_rate": st.floats(1e-300, 1),
                "max_steps": st.none() | st.integers(1, 10**6),
                "report_to": st.lists(st.sampled_from(["wandb", "tensorboard"]), max_size=2),
            }
        ),
        "output_dir": names,
        "seed": st.integers(0, 2**32 - 1),
    },
)


@FEW
@given(tree=runs, commented=st.booleans())
def test_what_is_written_is_read_back(tmp_path: Path, tree: Any, commented: bool) -> None:
    run = resolve(RunConfig.model_validate(tree))
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(run, commented=commented), encoding="utf-8")
    assert load_run(path).config == run


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_what_init_writes_is_read_back(tmp_path: Path, method: str) -> None:
    run = resolve(RunConfig.model_validate({"train": {"method": method, "max_steps": 9}}))
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(run), encoding="utf-8")
    assert load_run(path).config == run
