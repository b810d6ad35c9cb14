"""The GPU's table of planned and measured memory, made here on a CPU with toy shapes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from benchmarks import gpu, gpu_kernels, gpu_steps
from benchmarks.in_turn import Answer
from benchmarks.random_llama import SHAPES, fill_with_noise, write_hollow
from benchmarks.steps import side

from pennyweight.config import BaseConfig
from pennyweight.model import load_base

ROOT = Path(__file__).resolve().parents[1]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


def test_rows_are_planned_measured_and_added_to_the_page(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--tiny", "--only", "128", "--results", str(tmp_path)]
    assert gpu.main(words) == 0
    page = (tmp_path / "gpu-plan.md").read_text(encoding="utf-8")
    rows = [row.split(" | ") for row in page.splitlines() if row.startswith("| tiny")]
    assert [(row[1], row[3]) for row in rows] == [
        ("qlora", "none"),
        ("qlora", "full"),
        ("lora", "none"),
        ("lora", "full"),
    ]
    for *_, planned, found, ratio in rows:
        predicted, counted = (int(cell.replace(",", "")) for cell in (planned, found))
        assert counted > 0
        assert float(ratio.rstrip(" |")) == pytest.approx(predicted / counted, abs=1e-3)
    assert gpu.main([*words, "--deadline", "0"]) == 0
    again = (tmp_path / "gpu-plan.md").read_text(encoding="utf-8")
    assert again.startswith(page)
    assert again.count("no time left") == 4


def test_a_case_that_fails_is_told_and_the_next_ones_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(base: object, case: gpu.Case, config: object) -> int:
        if case.recompute:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
        return 1000

    monkeypatch.setattr(gpu, "measured", measured)
    words = ["--device", "cpu", "--tiny", "--only", "qlora 128", "--results", str(tmp_path)]
    assert gpu.main(words) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert "| 1,000 |" in first
    assert "OutOfMemoryError: CUDA out of memory. Tried to allocate" in second


def test_a_hollow_model_takes_no_room_and_its_noise_is_like_weights(tmp_path: Path) -> None:
    folder = write_hollow(SHAPES["tiny"], tmp_path / "m")
    weights = (folder / "model.safetensors").stat()
    assert weights.st_size > 2_000_000
    if hasattr(weights, "st_blocks") and sys.platform.startswith("linux"):
        assert weights.st_blocks * 512 < 65_536
    base = load_base(BaseConfig(model=str(folder), dtype="float32", device="cpu"))
    fill_with_noise(base, seed=0)
    layer = base.module.get_submodule("model.layers.0.mlp.up_proj")
    dense = layer.dequantize()
    assert 0.005 < float(dense.std()) < 0.02
    assert 0.005 < float(base.head.weight.std()) < 0.02
    ids = torch.arange(6)
    with torch.inference_mode(), base.route.over((0, 6), (None,)):
        logits = base.logits(base.hidden(ids, ids))
    assert torch.isfinite(logits).all()
    assert float(logits.std()) > 0


@no_gpu
def test_without_a_gpu_nothing_is_done_and_the_exit_code_is_2(tmp_path: Path) -> None:
    assert gpu.main(["--results", str(tmp_path)]) == 2
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "gpu"), "--results", str(tmp_path)],
        env=os.environ | {"PENNYWEIGHT_GPU_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "nothing was done" in done.stderr
    assert not list(tmp_path.iterdir())


def test_figures_of_a_cpu_stay_out_of_the_committed_table() -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--tiny"])


def test_the_matrix_is_predicted_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--dry-run", "--only", "8B qlora 2048"]) == 0
    (plain, recompute) = capsys.readouterr().out.splitlines()
    assert plain.endswith(" GB")
    assert float(recompute.split()[-2]) < float(plain.split()[-2]) < 40


def test_kernels_are_timed_beside_their_floors(tmp_path: Path) -> None:
    assert gpu_kernels.main(["--device", "cpu", "--tiny", "--results", str(tmp_path)]) == 0
    lines = (tmp_path / "gpu-kernels.md").read_text().splitlines()
    rows = [line.split(" | ") for line in lines if " x " in line or " tokens |" in line]
    ours = [row for row in rows if row[0].endswith(": here")]  # where the CPU's library is built
    assert len(rows) == 14 + 12 + len(ours)
    assert all(float(row[2].replace(",", "")) > 0 for row in rows)
    assert sum("forward: eager" in row[0] for row in rows) == 3


def test_elementwise_gradients_that_are_timed_are_autograds() -> None:
    from benchmarks.gpu_elementwise import (
        _gated_backward,
        _gated_forward,
        _norm_backward,
        _norm_forward,
        _turned,
        _turned_back,
    )

    x, gate, up, grad = (torch.randn(6, 16, requires_grad=i < 3) for i in range(4))
    weight = torch.randn(16)
    y, inverse = _norm_forward(x, weight)
    (wanted,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(_norm_backward(grad, x, weight, inverse), wanted)
    slopes = torch.autograd.grad(_gated_forward(gate, up), (gate, up), grad)
    torch.testing.assert_close(_gated_backward(grad, gate, up), slopes)
    heads = [torch.randn(1, n, 5, 8, requires_grad=True) for n in (4, 2)]
    grads = [torch.randn_like(each) for each in heads]
    angles = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    turned = torch.autograd.grad(_turned(*heads, *angles), heads, grads)
    torch.testing.assert_close(tuple(_turned_back(*grads, *angles)), turned)


def test_each_side_gets_its_program() -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    ways = {name: vars(side._program(name, "cpu")) for name in gpu_steps.NEEDS if name != "unsloth"}
    assert ways["peft"]["_way"] == ""
    assert ways["peft liger"]["_way"] == "liger"
    assert ways["torchao"]["_way"] == "torchao"
    assert ways["trl liger"]["_liger"]
    assert {name for _, name in gpu_steps.ORDER} == gpu_steps.NEEDS.keys()


def test_steps_on_a_toy_become_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our side alone, in this process in place of one of its own, with the words a GPU's would get."""

    def here(module: str, words: Sequence[str], *, timeout_s: float) -> Answer:
        assert module == side.__name__
        side.main(words)
        return Answer({}, 0, 1.0)

    monkeypatch.setattr(gpu_steps, "ask", here)
    monkeypatch.setattr(gpu_steps, "TOY", gpu_steps.TOY[:1])
    words = ["--device", "cpu", "--tiny", "--results", str(tmp_path)]
    assert gpu_steps.main(words) == 0
    page = (tmp_path / "gpu-steps.md").read_text()
    assert "| qlora | 128 recomputed | pennyweight |" in page
    assert "| lora16 | 128 | pennyweight |" in page
    assert "Error" not in page
    assert gpu_steps.main([*words, "--deadline", "1"]) == 0
    assert "no time left" in (tmp_path / "gpu-steps.md").read_text()


@no_gpu
def test_without_a_gpu_no_step_and_no_kernel_is_timed(tmp_path: Path) -> None:
    assert gpu_steps.main(["--results", str(tmp_path)]) == 2
    assert gpu_kernels.main(["--results", str(tmp_path)]) == 2
    assert gpu_steps.main(["--device", "cpu", "--results", str(tmp_path)]) == 2
    assert not list(tmp_path.iterdir())


def test_peers_get_noise_that_norms_let_through() -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    from benchmarks.steps.peers import _fill_with_noise

    hollow = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.RMSNorm(8))
    for parameter in hollow.parameters():
        parameter.data.zero_()
    _fill_with_noise(hollow)
    assert hollow(torch.ones(8)).all()
