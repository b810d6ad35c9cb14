"""The memory that `plan` says before a run, beside what the run's process took, on CPU shapes.

    python -m benchmarks.plan_cpu [--quick] [--data FOLDER] [--results FOLDER]

Random Llamas in 16-bit files; each case is an ordinary run in a process of its own: two steps,
held-out rows, checkpoints. Both figures are those of the run's receipt. With `--data`, a folder of
real models and data, the yardstick's three runs come first (stories260k on E2E, 40 steps).
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

from benchmarks.e2e import METHODS, described_run, write_first_references
from benchmarks.machine import circumstances, in_words
from pennyweight.config import to_yaml

__all__ = ["Case", "Measured", "cases", "measure", "measure_real", "write_model"]

PACKAGES = ("pennyweight", "torch", "transformers")
VOCABULARY = 32_000
STEPS = 2
REAL_STEPS = 40


@dataclass(frozen=True, slots=True)
class Case:
    """One run: a Llama of this width and depth, trained this way on so many tokens a step."""

    hidden: int
    layers: int
    method: str
    tokens: int
    recompute: bool = False

    @property
    def name(self) -> str:
        recompute = ", recompute" if self.recompute else ""
        return f"{self.hidden} / {self.layers}, {self.method}, {self.tokens:,} tokens{recompute}"


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes: predicted before the run, and the high-water mark of its process."""

    name: str
    planned: int
    measured: int

    @property
    def ratio(self) -> float:
        return self.planned / self.measured


def cases(*, quick: bool) -> Iterator[Case]:
    shapes = [(512, 8)] if quick else [(512, 8), (1024, 12)]
    for (hidden, layers), method, tokens in product(
        shapes, ("qlora", "lora", "full"), (64, 256, 2048)
    ):
        yield Case(hidden, layers, method, tokens)
        if tokens == 2048:
            yield Case(hidden, layers, method, tokens, recompute=True)


def write_model(folder: Path, case: Case) -> Path:
    """A random Llama with the built-in tokenizer, in bfloat16 as models are published."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from pennyweight.builtin import model_folder

    made = folder / f"llama-{case.hidden}-{case.layers}"
    if made.exists():
        return made
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=case.hidden,
        intermediate_size=case.hidden * 11 // 4,
        num_hidden_layers=case.layers,
        num_attention_heads=case.hidden // 64,
        num_key_value_heads=case.hidden // 64,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(made)
    AutoTokenizer.from_pretrained(model_folder()).save_pretrained(made)
    return made


def write_rows(path: Path, tokens: int) -> Path:
    """Rows of text of nearly `tokens` tokens each: a word and its space are two."""
    drawn = random.Random(0)
    words = ["value", "return", "self", "number", "list", "name", "index", "other"]
    rows = [" ".join(drawn.choices(words, k=tokens // 2 - 1)) for _ in range(40)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def measure(case: Case, work: Path) -> Measured:
    """Run it, and read its receipt."""
    rows_a_step = 1 if case.tokens <= 256 else 4
    settings = [
        f"base.model={write_model(work, case)}",
        "base.device=cpu",
        f"data.train={write_rows(work / 'rows.jsonl', case.tokens // rows_a_step)}",
        f"data.max_length={case.tokens // rows_a_step}",
        f"train.batch_size={rows_a_step}",
        f"train.method={case.method}",
        f"train.max_steps={STEPS}",
        f"train.gradient_checkpointing={str(case.recompute).lower()}",
        "evaluate.max_rows=2",
    ]
    return _run(case.name, "seed: 0\n", settings, work)


def measure_real(method: str, data: Path, work: Path) -> Measured:
    """One arm of the yardstick, `benchmarks.yardstick`, for a few steps."""
    write_first_references(data, work)
    loaded = described_run(method, data, work, seed=0, settings=[f"train.max_steps={REAL_STEPS}"])
    text = to_yaml(loaded.config, commented=False)
    return _run(f"stories260k on E2E, {method}, 16 pairs", text, ["base.device=cpu"], work)


def _run(name: str, described: str, settings: list[str], work: Path) -> Measured:
    """`pennyweight train` in a process of its own, and its receipt."""
    with tempfile.TemporaryDirectory(dir=work) as output:
        file = Path(output) / "run.yaml"
        file.write_text(described)
        command = [sys.executable, "-m", "pennyweight", "train", str(file), *settings]
        command += [f"output_dir={output}/run", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: exit {done.returncode}\n{done.stdout}{done.stderr[-3000:]}")
    said = json.loads(done.stdout.splitlines()[-1])
    return Measured(name, said["planned_peak_bytes"], said["peak_memory_bytes"])


def page(found: list[Measured]) -> str:
    rows = [
        f"| {m.name} | {m.planned / 1e6:,.0f} | {m.measured / 1e6:,.0f} | {m.ratio:.2f} |"
        for m in found
    ]
    return "\n".join(
        [
            "# Planned and measured memory on a CPU",
            "",
            "Llamas with random weights (hidden / layers), vocabulary 32,000, adapters of rank 16 on "
            "all linear layers; and a real one of 260,032 parameters on its own task; the peak of the whole process in MB, as `pennyweight plan` says it "
            "before the run and as the run's receipt has it after.",
            "",
            "| run | planned | measured | ratio |",
            "|---|---:|---:|---:|",
            *rows,
            "",
            in_words(circumstances(PACKAGES)),
            "",
            "`python -m benchmarks.plan_cpu` makes this table.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="the smaller shape alone")
    parser.add_argument("--data", type=Path, help="real models and data")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    asked = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        runs: dict[str, Callable[[], Measured]] = {}
        if asked.data is not None:
            for method in METHODS:
                runs[f"stories260k {method}"] = partial(measure_real, method, asked.data, work)
        runs |= {case.name: partial(measure, case, work) for case in cases(quick=asked.quick)}
        for name, run in runs.items():
            if asked.only not in name:
                continue
            found.append(last := run())
            print(f"{last.name:45} {last.planned / 1e6:8,.0f} {last.measured / 1e6:8,.0f} {last.ratio:.2f}", flush=True)  # fmt: skip
            asked.results.mkdir(parents=True, exist_ok=True)
            (asked.results / "plan_cpu.md").write_text(page(found))


if __name__ == "__main__":
    main()
