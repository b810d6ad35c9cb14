"""Law 10: a kernel equals its pure-torch reference on random shapes, tails included, in Triton's
interpreter on a CPU and on the device when there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from pennyweight.quant import BLOCK_SIZES, dequantize_4bit, kernels, quantize_4bit
from pennyweight.quant.blockwise import fill_in_torch

TESTS = Path(__file__).resolve().parents[1]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1,), (63,), (33, 257), (512, 130), (1024, 1024), (64 * 257 * 32 + 1,))


def test_kernels_equal_torch_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install -e .[kernels-test]")
    program = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*program, str(TESTS / "quant" / "interpreted_kernels.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.fixture
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    if why := kernels.why_pure_torch(device):
        pytest.fail(why)
    return device


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_equal_torch_on_the_device(device: torch.device, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = ("nf4", "fp4")
    for shape, block_size, kind, nested in product(SHAPES, BLOCK_SIZES, kinds, (False, True)):
        weight = torch.randn(shape, generator=generator).to(device)
        q = quantize_4bit(weight, format=kind, block_size=block_size, double_quantization=nested)
        expected = torch.empty(shape, dtype=dtype, device=device)
        fill_in_torch(q, expected)
        assert torch.equal(dequantize_4bit(q, dtype), expected)
        # A view that begins beside a multiple of 16 bytes, with its surroundings.
        buffer = torch.full((expected.numel() + 4,), 7.0, dtype=dtype, device=device)
        dequantize_4bit(q, out=buffer[1:-3].view(shape))
        assert torch.equal(buffer[1:-3], expected.view(-1))
        assert (buffer[:1] == 7).all()
        assert (buffer[-3:] == 7).all()


@pytest.mark.gpu
def test_elements_beyond_2_to_the_31_are_in_their_places(device: torch.device) -> None:
    if torch.cuda.mem_get_info(device)[0] < 16e9:
        pytest.skip("less than 16 GB of device memory is free")
    part = quantize_4bit(torch.randn(1 << 24, device=device), double_quantization=False)
    repeats = 129
    assert isinstance(part.absmax, torch.Tensor)
    whole = part.with_tensors(
        {"codes": part.codes.repeat(repeats), "absmax": part.absmax.repeat(repeats)}
    )
    out = torch.empty(repeats << 24, dtype=torch.bfloat16, device=device)
    kernel = kernels.dequantize_4bit_kernel(out)
    assert kernel is not None
    kernel(whole, out)
    expected = dequantize_4bit(part, torch.bfloat16)
    assert all(torch.equal(piece, expected) for piece in out.view(repeats, -1))
