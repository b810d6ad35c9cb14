"""How fast rows of many adapters are generated beside one base, and what the adapters cost.

    python -m benchmarks.serving [--models builtin llama] [--weights none nf4 "nf4 bf16"] [--no-peer]
    python -m benchmarks.serving --quick             # two small cases, to see that it runs
    python -m benchmarks.serving --device cuda --models 1B 8B --no-peer

A case is so many requests at once, each with a prompt of the same length and the same number of
new tokens, spread over so many adapters (rank 16 on every linear layer; 16 are always resident).
Cases of one model take turns, forwards and backwards, and the median of a case stands in the
table. The peer is transformers' `generate` with PEFT's mixed batch (`adapter_names=`), given the
same rows in one batch without padding; over no adapter it is transformers alone, over one it is
PEFT with that adapter set. The page says how many of its greedy ids are ours too.

Weights are float32, NF4 with products in float32, or NF4 with products in bf16. On a processor that
has those, bitsandbytes multiplies NF4 in bf16 whatever is asked for, once a model is in evaluation mode.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from benchmarks.machine import circumstances, in_words
from benchmarks.random_llama import SHAPES, LlamaShape, fill_with_noise, write_hollow

__all__ = ["Case", "Measured", "main"]

PACKAGES = ("pennyweight", "torch", "transformers", "peft", "bitsandbytes")
# By the name in the table: quantization, and the type of products on a CPU.
WEIGHTS = {"none": ("none", "float32"), "nf4": ("nf4", "float32"), "nf4 bf16": ("nf4", "bfloat16")}
RANK = 16
RESIDENT = 16
REQUESTS = (1, 4, 8, 16)
ADAPTERS = (0, 1, 4, 16)
OURS, PEER = "pennyweight", "transformers + PEFT"
# The shape of the measurements of docs/performance.md.
SMALL = LlamaShape(512, 1408, 8, 8, 8, 8192, max_position_embeddings=2048)
HEADER = (
    "| model | weights | who | requests | adapters | tokens/s | kept | first token, ms | "
    "per token, ms: median | 95 % |\n|---|---|---|---:|---:|---:|---:|---:|---:|---:|\n"
)


@dataclass(frozen=True, slots=True)
class Case:
    """So many requests at once, over so many adapters, by one of the two."""

    who: str
    requests: int
    adapters: int

    def adapter(self, row: int) -> str | None:
        return f"a{row % self.adapters}" if self.adapters else None


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of a case: when each row had its tokens, in seconds from the start, and which."""

    times: tuple[tuple[float, ...], ...]
    ids: tuple[tuple[int, ...], ...]

    @property
    def tokens_per_s(self) -> float:
        return sum(map(len, self.times)) / max(row[-1] for row in self.times)

    @property
    def first_ms(self) -> float:
        return 1e3 * statistics.median(row[0] for row in self.times)

    @property
    def gaps_ms(self) -> list[float]:
        return [1e3 * (b - a) for row in self.times for a, b in pairwise(row)]


@dataclass(frozen=True, slots=True)
class Asked:
    """What every request of a model's cases is: a prompt and a number of new tokens."""

    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int


Runner = Callable[[Case, Asked], Measured]


def ours(base: Any) -> Runner:
    from pennyweight.generate import Decoding, Request

    def run(case: Case, asked: Asked) -> Measured:
        decoding = Decoding(base, batch_size=case.requests)
        requests = [
            Request(prompt, asked.new_tokens, stop_ids=(), adapter=case.adapter(row))
            for row, prompt in enumerate(asked.prompts[: case.requests])
        ]
        times: list[list[float]] = [[] for _ in requests]
        ids: list[list[int]] = [[] for _ in requests]
        begun = time.perf_counter()
        decoding.add(requests)
        while decoding.busy:
            tokens = decoding.step()
            now = time.perf_counter() - begun
            for token in tokens:
                times[token.number].append(now)
                ids[token.number].append(token.id)
        return Measured(tuple(map(tuple, times)), tuple(map(tuple, ids)))

    return run


def peer(model: Any) -> Runner:
    import torch
    from transformers import LogitsProcessorList

    def run(case: Case, asked: Asked) -> Measured:
        device = next(model.parameters()).device
        prompts = torch.tensor(asked.prompts[: case.requests], device=device)
        how: dict[str, Any] = {}
        if case.adapters > 1:
            how["adapter_names"] = [case.adapter(row) for row in range(case.requests)]
        steps: list[float] = []

        def note(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if device.type == "cuda":
                torch.cuda.synchronize()
            steps.append(time.perf_counter() - begun)
            return scores

        begun = time.perf_counter()
        with torch.inference_mode():
            found = model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                max_new_tokens=asked.new_tokens,
                min_new_tokens=asked.new_tokens,
                pad_token_id=0,
                logits_processor=LogitsProcessorList([note]),
                **how,
            )
        ids = tuple(map(tuple, found[:, prompts.shape[1] :].tolist()))
        return Measured((tuple(steps),) * case.requests, ids)

    def chosen(case: Case, asked: Asked) -> Measured:
        if case.adapters == 0:
            with model.disable_adapter():
                return run(case, asked)
        model.set_adapter("a0")
        return run(case, asked)

    return chosen


def prepared(name: str, weights: str, device: str, work: Path) -> tuple[Any, Path]:
    """The base with 16 adapters resident, and the folder that holds the model itself."""
    import torch

    from pennyweight.builtin import model_folder
    from pennyweight.config import BaseConfig, LoraConfig
    from pennyweight.lora import attach, trained_parameters
    from pennyweight.model import load_base

    quantization, dtype = WEIGHTS[weights]
    if device != "cpu":
        dtype = "bfloat16"

    def load(folder: Path, how: str = quantization, dtype: str = dtype) -> Any:
        return load_base(
            BaseConfig(model=str(folder), quantization=how, device=device, dtype=dtype)  # type: ignore[arg-type]
        )

    if name == "builtin":
        folder = model_folder()
        base = load(folder)
    elif name == "llama":
        folder = work / name
        if not folder.exists():
            hollow = load(write_hollow(SMALL, work / "hollow"), "none", "float32")
            fill_with_noise(hollow, seed=0)
            hollow.write_folder(folder)
        base = load(folder)
    else:
        folder = write_hollow(SHAPES[name], work / name)
        base = load(folder)
        fill_with_noise(base, seed=0)
    config = LoraConfig(r=RANK, target_modules="all-linear")
    generator = torch.Generator(base.device).manual_seed(0)
    for number in range(RESIDENT):
        attach(base, config, name=f"a{number}", seed=number, trainable=False)
        with torch.no_grad():
            for parameter in trained_parameters(base, f"a{number}").values():
                parameter.normal_(0.0, 0.02, generator=generator)
    return base, folder


def peer_model(base: Any, folder: Path, weights: str, work: Path) -> Any:
    """The same weights and the same adapters in PEFT."""
    import torch
    from peft import PeftModel

    from benchmarks.peft_oracle import dense_model, four_bit_model
    from pennyweight.config import LoraConfig
    from pennyweight.lora import adapter_of
    from pennyweight.lora.binding import described

    quantized, dtype = weights != "none", getattr(torch, WEIGHTS[weights][1])
    model: Any = four_bit_model(folder, dtype) if quantized else dense_model(folder)
    model.generation_config.eos_token_id = None
    wrapped: Any = None
    for number in range(RESIDENT):
        name = f"a{number}"
        config = LoraConfig(r=RANK, target_modules="all-linear")
        saved = described(adapter_of(base, name, config), base).save(work / "adapters" / name)
        if wrapped is None:
            wrapped = PeftModel.from_pretrained(model, saved, adapter_name=name)
        else:
            wrapped.load_adapter(saved, adapter_name=name)
    return wrapped.eval()


class Page:
    """A table that rows are added to as they are known, and the same numbers as JSON lines."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.page, self.numbers = folder / "serving.md", folder / "serving.jsonl"
        self.begun = False

    def add(self, cells: Sequence[str], facts: dict[str, Any]) -> None:
        row = "| " + " | ".join(cells) + " |\n"
        print(row, end="", flush=True)
        if not self.begun:
            self.begun = True
            title = "" if self.page.exists() else f"# Serving speed\n\n{__doc__}"
            row = f"{title}\n{in_words(circumstances(PACKAGES))}\n\n{HEADER}{row}"
        with self.page.open("a", encoding="utf-8") as file:
            file.write(row)
        with self.numbers.open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")

    def say(self, line: str) -> None:
        print(line, flush=True)
        with self.page.open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")


def measure(
    runners: dict[str, Runner], cases: Sequence[Case], asked: Asked, *, rounds: int
) -> dict[Case, list[Measured]]:
    """Every case once to warm up, then in turn, forwards and backwards."""
    found: dict[Case, list[Measured]] = {case: [] for case in cases}
    short = Asked(asked.prompts, 3)
    for case in cases:
        runners[case.who](case, short)
    for number in range(rounds):
        for case in cases if number % 2 == 0 else reversed(cases):
            found[case].append(runners[case.who](case, asked))
    return found


def tell(page: Page, model: str, weights: str, found: dict[Case, list[Measured]]) -> None:
    """A row for each case; `kept` is its speed over that of the same requests without adapters."""
    speeds = {c: statistics.median(m.tokens_per_s for m in runs) for c, runs in found.items()}
    for case, runs in found.items():
        gaps = sorted(gap for run in runs for gap in run.gaps_ms)
        first = statistics.median(run.first_ms for run in runs)
        kept = speeds[case] / speeds[Case(case.who, case.requests, 0)]
        spread = [round(run.tokens_per_s, 1) for run in runs]
        median, slow = gaps[len(gaps) // 2], gaps[int(len(gaps) * 0.95)]
        cells = (
            *(model, weights, case.who, str(case.requests), str(case.adapters)),
            *(f"{speeds[case]:,.0f}", f"{kept:.0%}" if case.adapters else "", f"{first:.1f}"),
            *(f"{median:.2f}", f"{slow:.2f}"),
        )
        facts = {"model": model, "weights": weights, **asdict(case), "kept": kept}
        facts |= {"tokens_per_s": spread, "first_ms": first, "median_ms": median, "p95_ms": slow}
        page.add(cells, facts)


def agreement(found: dict[Case, list[Measured]]) -> str:
    """How far the two wrote the same greedy text: tokens before the first that differs."""
    alike = total = 0
    for case, runs in found.items():
        theirs = found.get(Case(PEER, case.requests, case.adapters))
        if case.who == OURS and theirs:
            for one, other in zip(runs[0].ids, theirs[0].ids, strict=True):
                pairs = list(zip(one, other, strict=True))
                total += len(pairs)
                alike += next((at for at, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return f"Of {total:,} greedy tokens, {alike / total:.1%} come before any difference from the peer's." if total else ""  # fmt: skip


def draw(numbers: Path, picture: Path) -> bool:
    """Tokens a second over requests at once, a panel for each model; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    lines = numbers.read_text(encoding="utf-8").splitlines()
    facts = {
        tuple(fact[key] for key in ("model", "weights", "who", "adapters", "requests")): fact
        for fact in map(json.loads, lines)
    }
    panels = sorted({key[:2] for key in facts})
    figure = Figure(figsize=(4.2 * len(panels), 4.0), dpi=100, layout="constrained")
    grid: Any = figure.subplots(1, len(panels), squeeze=False)
    colours = {0: "#1f2933", 1: "#2b6cb0", 4: "#d1495b", 16: "#e8a33d"}
    for axes, (model, weights) in zip(grid[0], panels, strict=True):
        for who, line in ((OURS, "-"), (PEER, ":")):
            for adapters, colour in colours.items():
                keys = sorted(k for k in facts if k[:4] == (model, weights, who, adapters))
                speeds = [statistics.median(facts[key]["tokens_per_s"]) for key in keys]
                if keys:
                    label = f"{adapters} adapters, {who}"
                    axes.plot([k[4] for k in keys], speeds, line, color=colour, label=label)
        axes.set_title(f"{model}, weights {weights}", loc="left", fontsize=11)
        axes.set_xlabel("requests at once")
        axes.set_ylim(bottom=0)
        axes.grid(color="#e4e7eb")
    grid[0][0].set_ylabel("new tokens a second")
    grid[0][-1].legend(frameon=False, fontsize=7)
    figure.savefig(picture)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what was asked for, model by model, and append it to the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving")
    parser.add_argument("--models", nargs="+", default=["builtin", "llama"], choices=["builtin", "llama", *SHAPES])  # fmt: skip
    parser.add_argument("--weights", nargs="+", default=list(WEIGHTS), choices=WEIGHTS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    asked = parser.parse_args(arguments)
    import torch

    if asked.threads:
        torch.set_num_threads(asked.threads)
    requests, adapters = REQUESTS, ADAPTERS
    if asked.quick:
        asked.models, asked.weights, asked.rounds = ["builtin"], ["none"], 1
        asked.new_tokens, requests, adapters = 4, (1, 4), (0, 4)
    page = Page(asked.results)
    with tempfile.TemporaryDirectory() as work:
        for model, weights in product(asked.models, asked.weights):
            base, folder = prepared(model, weights, asked.device, Path(work))
            drawn = torch.Generator().manual_seed(0)
            shape = (max(requests), asked.prompt_tokens)
            drawn_ids = torch.randint(5, base.vocab_size, shape, generator=drawn).tolist()
            what = Asked(tuple(map(tuple, drawn_ids)), asked.new_tokens)
            runners = {OURS: ours(base)}
            if not asked.no_peer:
                runners[PEER] = peer(peer_model(base, folder, weights, Path(work)))
            cases = [Case(*each) for each in product(runners, requests, adapters)]
            found = measure(runners, cases, what, rounds=asked.rounds)
            tell(page, model, weights, found)
            if said := agreement(found):
                page.say(said)
            del base, runners
            gc.collect()
    draw(page.numbers, asked.results / "serving.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
