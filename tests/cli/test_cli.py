"""Verbs parse, call one function and print; every failure has its exit code and no traceback."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pennyweight import cli, errors
from pennyweight.cli import ending, show

VERBS = [
    "init",
    "import",
    "preview",
    "plan",
    "parity",
    "train",
    "compare",
    "evaluate",
    "chat",
    "merge",
    "quickstart",
    "doctor",
    "explain",
    "schema",
]


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out.splitlines()[-1])


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> Ended:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        said = capsys.readouterr()
        return Ended(int(ended.value.code or 0), said.out, said.err)

    return run


def outside(*arguments: str, **environment: str) -> Ended:
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def test_help_names_every_verb_and_imports_nothing_heavy() -> None:
    program = (
        "import sys; sys.argv = ['pennyweight', '--help']\n"
        "from pennyweight.cli import main\n"
        "try: main()\n"
        "except SystemExit: print(*sys.modules, file=sys.stderr)\n"
    )
    ended = outside("-c", program)
    assert all(f"  {verb} " in ended.out for verb in VERBS)
    heavy = {"torch", "transformers", "numpy", "pydantic", "rich", "yaml", "matplotlib"}
    assert heavy.isdisjoint(ended.err.split())


@pytest.mark.parametrize("room", ["", ".errors", ".config", ".report", ".cli", ".doctor"])
def test_light_rooms_import_nothing_heavy(room: str) -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'matplotlib'}"
    ended = outside("-c", f"import sys, pennyweight{room}\nprint({heavy} & set(sys.modules))")
    assert ended.out.strip() == "set()", ended


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_json(run: Any, verb: str) -> None:
    ended = run(verb, "--help")
    assert ended.code == 0
    assert "--json" in ended.out


def test_alone_it_shows_its_help(run: Any) -> None:
    assert "Commands:" in run().out
    assert run("--version").out.strip()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tran"], "No such command"),
        (["train"], "Missing argument 'RUN.YAML'"),
        (["train", "run.yaml", "--fast"], "No such option"),
        (["train", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["explain", "train.lerning_rate"], "did you mean train.learning_rate"),
        (["init", "--method", "lorra"], "'lorra' is not one of 'qlora', 'lora', 'full'"),
        (["init", "--model", ""], "base.model: found ''"),
    ],
)
def test_a_wrong_call_ends_with_2_and_says_why(run: Any, arguments: list[str], said: str) -> None:
    plain, machine = run(*arguments), run(*arguments, "--json")
    assert plain.code == machine.code == 2
    assert said in plain.err
    assert plain.out == ""
    assert machine.json["error"]["exit_code"] == 2
    assert said in machine.json["error"]["message"]


def all_errors(root: type[errors.PennyweightError]) -> list[type[errors.PennyweightError]]:
    """Those that are a message alone: an answer of the server has a status besides."""
    below = [each for each in root.__subclasses__() if "__init__" not in vars(each)]
    return [root, *(error for each in below for error in all_errors(each))]


@pytest.mark.parametrize("kind", all_errors(errors.PennyweightError))
def test_every_error_of_ours_has_its_exit_code(
    kind: type[errors.PennyweightError], capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: Sequence[str]) -> object:
        raise kind.all(["first: mend it", "second"])

    assert ending.run_command(fail, []) == kind.exit_code
    assert capsys.readouterr().err.startswith("first: mend it\nsecond\n")
    assert ending.run_command(fail, ["--json"]) == kind.exit_code
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["kind"] == kind.__name__
    assert error["faults"] == ["first: mend it", "second"]


def test_an_interrupted_run_names_the_command_that_resumes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(arguments: Sequence[str]) -> object:
        raise errors.Interrupted("SIGTERM after step 3 of 9")

    asked = ["train", "my run.yaml", "train.learning_rate=1e-4"]
    monkeypatch.setattr("sys.argv", ["/usr/bin/pennyweight"])
    assert ending.run_command(fail, asked) == 75
    resume = "pennyweight train 'my run.yaml' train.learning_rate=1e-4"
    assert capsys.readouterr().err == f"SIGTERM after step 3 of 9\nresume: {resume}\n"
    monkeypatch.setattr("sys.argv", ["/lib/pennyweight/__main__.py"])
    assert ending.run_command(fail, [*asked, "--json"]) == 75
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["resume"] == f"python -m {resume} --json"


def test_a_full_disk_is_74_and_names_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(arguments: Sequence[str]) -> object:
        raise OSError(28, "No space left on device", "merged/model.safetensors")

    assert ending.run_command(fail, []) == 74
    said = capsys.readouterr().err
    assert said.startswith("merged/model.safetensors: No space left on device; free some space")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_command_prepares_is_75(number: signal.Signals) -> None:
    # A shell's background jobs begin with SIGINT ignored, and it stays so.
    started_with = signal.signal(number, signal.default_int_handler)
    try:
        said = f"{number.name}: nothing was begun"
        with pytest.raises(errors.Interrupted, match=said), ending.not_begun():
            os.kill(os.getpid(), number)
        assert signal.getsignal(number) == signal.default_int_handler
    finally:
        signal.signal(number, started_with)


def test_a_signal_heard_in_a_destructor_is_not_lost() -> None:
    """Python drops what is raised there, and a command that imports has destructors all the time."""

    class Dropped:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    def prepare() -> None:
        Dropped()
        time.sleep(30)

    hook = sys.unraisablehook
    with pytest.raises(errors.Interrupted, match="SIGTERM"), ending.not_begun():
        prepare()
    assert sys.unraisablehook is hook


def test_an_interrupt_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(arguments: Sequence[str]) -> object:
        raise KeyboardInterrupt

    assert ending.run_command(fail, []) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_what_went_wrong_inside_is_short_and_the_traceback_kept(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("PENNYWEIGHT_DEBUG", raising=False)

    def fail(arguments: Sequence[str]) -> object:
        raise RuntimeError("shape mismatch\nand much more")

    assert ending.run_command(fail, []) == 1
    said = capsys.readouterr().err
    (log,) = tmp_path.iterdir()
    assert said.splitlines()[0] == "something went wrong inside: RuntimeError: shape mismatch"
    assert str(log) in said
    assert "Traceback" not in said
    assert "Traceback" in log.read_text()
    monkeypatch.setenv("PENNYWEIGHT_DEBUG", "1")
    assert ending.run_command(fail, []) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m pennyweight schema | head -1",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert done.stderr == ""


def test_init_is_what_train_reads(run: Any, tmp_path: Path) -> None:
    from pennyweight.config import load_run

    ended = run("init", "--model", "Qwen/Qwen3-0.6B", "--data", "my.jsonl")
    path = tmp_path / "run.yaml"
    path.write_text(ended.out, encoding="utf-8")
    config = load_run(path).config
    assert (config.base.model, config.data.train) == ("Qwen/Qwen3-0.6B", "my.jsonl")
    assert run("init", "--json").json["yaml"].startswith("# pennyweight explain")


def test_explain_and_schema(run: Any) -> None:
    assert "number above 0" in run("explain", "train.learning_rate").out
    assert "train" in run("explain").out
    assert run("explain", "seed", "--json").json["key"] == "seed"
    assert json.loads(run("schema").out) == run("schema", "--json").json


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a stand-in for a heavy room in its place."""

    def stand_in(name: str, **functions: Any) -> None:
        monkeypatch.setitem(sys.modules, f"pennyweight.{name}", SimpleNamespace(**functions))

    return stand_in


def test_train_gives_one_json_line_and_sends_the_talk_to_stderr(
    run: Any, room: Any, tmp_path: Path
) -> None:
    def finetune(config: Any, *, origin: Any, text: str, device: Any) -> Any:
        print("a library talks on stdout")
        assert text == path.read_text()
        assert origin["seed"] == "command line"
        return SimpleNamespace(to_dict=lambda: {"steps": config.seed, "loss": float("nan")})

    room("finetune", finetune=finetune)
    path = tmp_path / "run.yaml"
    path.write_text("train: {method: lora}\n", encoding="utf-8")
    ended = run("train", str(path), "seed=7", "--json")
    assert ended.out == '{"steps": 7, "loss": "nan"}\n'
    assert ended.err == "a library talks on stdout\n"
    assert "steps  7" in run("train", str(path), "seed=7").out


def test_evaluate_shows_base_and_adapter_side_by_side(run: Any, room: Any) -> None:
    measured = {
        "base": {"loss": 2.5, "loss_interval_95": (2.4, 2.6), "documents": 1200},
        "tuned": {"loss": 1.25, "loss_interval_95": None, "documents": 1200, "exact_match": 0.5},
        "loss_difference": {"difference": -1.25, "interval_95": (-1.5, -1.0), "rows": 1200},
    }
    room("runs", evaluate_run=lambda folder, **limits: measured)
    assert run("evaluate", "runs/my", "--json").json["base"]["loss_interval_95"] == [2.4, 2.6]
    text = run("evaluate", "runs/my").out
    assert "base" in text.splitlines()[1]
    assert "tuned" in text.splitlines()[1]
    assert "loss difference  -1.25  [-1.5, -1], 1,200 rows" in text
    assert "2.5  [2.4, 2.6]" in text
    assert "1,200" in text


def test_compare_takes_its_lists_as_options(run: Any, room: Any, tmp_path: Path) -> None:
    def compare(config: Any, *, origin: Any) -> Any:
        assert origin["compare.range_steps"] == "run.yaml:1"
        return SimpleNamespace(to_dict=lambda: config.compare.model_dump())

    room("compare", compare=compare)
    path = tmp_path / "run.yaml"
    path.write_text("compare: {seeds: [9], range_steps: 5}\n", encoding="utf-8")
    lists = ["--ranks", "4,8", "--seeds", "0,1", "--arms", "lora,full"]
    said = run("compare", str(path), "compare.range_rows=7", *lists, "--json").json
    assert (said["ranks"], said["seeds"], said["arms"]) == ([4, 8], [0, 1], ["lora", "full"])
    assert (said["range_steps"], said["range_rows"]) == (5, 7)
    wrong = run("compare", str(path), "--arms", "lora,qlroa")
    assert wrong.code == 2
    assert "compare.arms" in wrong.err
    assert "compare-part" not in run("--help").out


def test_figures_are_said_with_their_units() -> None:
    said = show.facts(
        {
            "peak_memory_bytes": 497_618_944,
            "disk_bytes": 5.3e9,
            "steps": 4000,
            "loss": 1.23456,
            "untied": False,
            "notices": (),
            "resumed_from": None,
            "change": {
                "before": 2.0,
                "difference": {"difference": -1, "interval_95": None, "rows": 1},
            },
        }
    )
    assert said.splitlines() == [
        "peak memory  497.6 MB",
        "disk         5.30 GB",
        "steps        4,000",
        "loss         1.235",
        "untied       no",
        "change       before 2, difference -1, 1 rows",
    ]


def test_chat_says_one_thing_or_many(run: Any, room: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_chat(folder: Path, adapter: str | None, **_: Any) -> Any:
        return SimpleNamespace(send=lambda text: iter([str(adapter), ": ", text]))

    room("runs", open_chat=open_chat)
    assert run("chat", "runs/my", "-m", "hi").out == "default: hi\n"
    assert run("chat", "runs/my", "--adapter", "none", "-m", "hi", "--json").json == {
        "adapter": "none",
        "message": "hi",
        "reply": "None: hi",
    }
    lines = iter(["one", "", "two"])

    def typed(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    assert run("chat", "runs/my").out == "default: one\ndefault: two\n\n"


def test_what_a_row_or_an_answer_holds_never_commands_the_terminal(
    run: Any, room: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = "gr\u00fcn\t\u200f\u05d0 \U0001f469\u200d\U0001f680\n"
    hostile = told + "\x1b]0;title\x07\x1b[2J\x9b1m\r\b\u202egpj"
    shown = told + r"\x1b]0;title\x07\x1b[2J\x9b1m\r\x08\u202egpj"
    assert show.visible(hostile) == shown

    def open_chat(folder: Path, adapter: str | None, **_: Any) -> Any:
        return SimpleNamespace(send=lambda text: iter([hostile]))

    room("runs", open_chat=open_chat)
    assert run("chat", "runs/my", "-m", "hi").out == shown + "\n"
    assert run("chat", "runs/my", "-m", "hi", "--json").json["reply"] == hostile
    lines = iter(["one"])

    def typed(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    assert run("chat", "runs/my").out == shown + "\n\n"
    segment = SimpleNamespace(text=hostile, trained=True, cut=False)
    row = SimpleNamespace(
        source="a\x1b.jsonl:1",
        tokens=9,
        trained_tokens=4,
        length_before_cut=9,
        part="train",
        dropped=None,
        segments=(segment,),
    )
    show._console().print(show.preview([row], ["warning: \x1b"]))
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(capsys.readouterr().out)

    def fail(arguments: Sequence[str]) -> object:
        raise errors.DataError("my.jsonl:1: role '\x1b[2J'")

    ending.run_command(fail, [])
    assert capsys.readouterr().err == "my.jsonl:1: role '\\x1b[2J'\n"


def test_merge_shows_every_candidate_beside_the_adapter(run: Any, room: Any) -> None:
    asked: dict[str, Any] = {}
    figures = {"loss": 0.5, "tuning_kept": 0.999, "mean_kl": 1e-9, "top1_agreement": 1.0}
    figures |= {"max_logit_difference": 2e-5}
    figures |= {"loss_difference": {"difference": 0.01, "interval_95": (0.0, 0.02), "rows": 9}}
    answer = {
        "folder": "merged",
        "onto": "as-trained",
        "why": "its predictions are closest to the adapter's",
        "dtype": "as stored",
        "update_kept": 1.0,
        "rows": 9,
        "measured_on": "held-out rows of the run",
        "agreement": {"tokens": 1234},
        "models": (
            {"name": "adapter", **figures},
            {"name": "as-trained", **figures},
            {"name": "original", "refused": "only 1% survives"},
            {"name": "base", **figures, "tuning_kept": None},
        ),
        "notices": ("original was refused: only 1% survives",),
    }

    def merge_folder(folder: Path, out: Path, **how: Any) -> Any:
        asked.update(how)
        return SimpleNamespace(to_dict=lambda: answer)

    room("runs", merge_folder=merge_folder)
    said = run("merge", "runs/my", "--out", "merged", "--base", "original", "--json").json
    assert said["models"][1]["name"] == "as-trained"
    assert asked["base"] == "original"
    text = run("merge", "runs/my", "--out", "merged", "--rows", "9", "--model", "m").out
    assert (asked["base"], asked["rows"], asked["model"]) == ("auto", 9, "m")
    for part in (
        "adapter, unmerged",
        "as-trained  written",
        "original",
        "refused",
        "base, bare",
        "0.01  [0, 0.02]",
        "99.9%",
        "1e-09",
        "as-trained: its predictions are closest",
        "9 held-out rows of the run, 1,234 tokens",
        "note: original was refused",
    ):
        assert part in text


def test_preview_colours_what_is_trained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    row = SimpleNamespace(
        source="my.jsonl:1",
        tokens=9,
        trained_tokens=4,
        length_before_cut=12,
        part="train",
        dropped=None,
        segments=(
            SimpleNamespace(text="what? [x]", trained=False, cut=False),
            SimpleNamespace(text="that", trained=True, cut=False),
            SimpleNamespace(text=" and this", trained=True, cut=True),
        ),
    )
    gone = SimpleNamespace(**{**vars(row), "dropped": "too long", "part": "eval", "segments": ()})
    terminal = Console(force_terminal=True, color_system="standard", width=80)
    monkeypatch.setattr(show, "_console", lambda: terminal)
    terminal.print(show.preview([row, gone], ["train: 1 of 2 rows"]))
    said = capsys.readouterr().out
    assert "my.jsonl:1: 9 tokens, 4 trained, 3 cut off" in said
    assert "my.jsonl:1 (held out): left out: too long" in said
    assert "\x1b[2mwhat? [x]" in said
    assert "\x1b[32mthat" in said
    assert "\x1b[31m and this" in said
    assert "train: 1 of 2 rows" in said
    # Where nothing is coloured, marks stand in its place.
    monkeypatch.setattr(show, "_console", lambda: Console(width=80))
    show._console().print(show.preview([row], []))
    assert "what? [x]⟦that⟧✂⟦ and this⟧" in capsys.readouterr().out


def test_preview_shows_rows_and_then_refuses(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENNYWEIGHT_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"p{i}", "completion": "" if i > 5 else f"c{i}"} for i in range(10)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    described = tmp_path / "run.yaml"
    described.write_text(
        f"data: {{train: {tmp_path / 'my.jsonl'}, eval_fraction: 0}}\noutput_dir: {tmp_path / 'run'}\n"
    )
    preview = ("preview", str(described), "--row", "my.jsonl:2", "--out", str(tmp_path / "seen"))
    ended = run(*preview)
    assert ended.code == 65
    assert "c1" in ended.out
    assert "data.max_dropped_share: 4 of 10 rows (40.00%)" in ended.err
    assert (tmp_path / "seen" / "ledger.jsonl").read_text().count("\n") == 10
    told, error = run(*preview, "--json").out.splitlines()
    assert json.loads(told)["shown"][0]["source"] == "my.jsonl:2"
    assert json.loads(error)["error"]["exit_code"] == 65
    trained = run("train", str(described))
    assert trained.code == 65
    assert trained.err.splitlines()[-4:] == ended.err.splitlines()[-4:]
    assert run(*preview, "data.max_dropped_share=0.5").code == 0


def test_doctor_and_plan_make_tables(run: Any, room: Any, tmp_path: Path) -> None:
    check = SimpleNamespace(name="disk", ok=False, found="[1 GB]", mend="free space")
    room("doctor", doctor=lambda: [check])
    assert "MEND" in run("doctor").out
    assert "[1 GB]" in run("doctor").out


def test_import_writes_a_run_and_accounts_for_the_file(run: Any, tmp_path: Path) -> None:
    theirs, ours = tmp_path / "axolotl.yml", tmp_path / "new" / "run.yaml"
    theirs.write_text(
        "base_model: a/b\nadapter: lora\nlora_r: 4\nlora_alpha: 8\nlearning_rate: 1e-4\n"
        "datasets: [{path: rows.jsonl, type: completion}]\nneftune_noise_alpha: 5\nflavour: 1\n"
    )
    ended = run("import", str(theirs))
    assert ended.code == 0
    assert "r: 4  # axolotl.yml:3 lora_r" in ended.out
    assert "NOT carried (2)" in ended.err
    assert "axolotl.yml:7: neftune_noise_alpha: 5" in ended.err
    told = run("import", str(theirs), "--out", str(ours), "--from", "axolotl", "--json").json
    assert told["out"] == str(ours)
    assert {entry["fate"] for entry in told["entries"]} >= {"carried", "NOT carried", "unknown"}
    assert ours.read_text().startswith("# Imported from axolotl.yml")
    again = run("import", str(theirs), "--out", str(ours))
    assert (again.code, "exists" in again.err) == (2, True)
    assert run("import", str(theirs), "--from", "llama-factory").code == 2


def test_init_names_the_schema_it_writes(run: Any, tmp_path: Path) -> None:
    schema = tmp_path / "run.schema.json"
    written = run("init", "--schema", str(schema)).out
    assert written.startswith(f"# yaml-language-server: $schema={schema.as_posix()}\n")
    assert "properties" in json.loads(schema.read_text())
