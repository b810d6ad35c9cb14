"""Law 10: a kernel equals its pure-torch reference on random shapes, tails included: those of a GPU
in Triton's interpreter on a CPU and on the device when there is one, those of a CPU in every variant
that runs on it."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.blocks import RMSNorm
from pennyweight.blocks import kernels as layer_kernels
from pennyweight.quant import (
    BLOCK_SIZES,
    NestedScales,
    Quantized4Bit,
    dequantize_4bit,
    kernels,
    quantize_4bit,
    quantize_8bit,
    rowwise,
)
from pennyweight.quant.blockwise import fill_in_torch, nest_in_torch, quantize_in_torch
from pennyweight.quant.kernels import cpu
from pennyweight.quant.kernels.build import variants
from pennyweight.quant.kernels.cpu.adapted import Beside, Layer, adapted, adapted_back
from pennyweight.quant.kernels.cpu.library import SWITCH, Library, chosen
from pennyweight.quant.kernels.trial import tried

TESTS = Path(__file__).resolve().parents[1]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1,), (63,), (33, 257), (512, 130), (1024, 1024), (64 * 257 * 32 + 1,))


def test_kernels_equal_torch_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install -e .[kernels-test]")
    program = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*program, *(str(TESTS / room / "interpreted_kernels.py") for room in ("quant", "blocks"))],
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
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", layer_kernels.KERNELS)
def test_kernels_of_a_layer_agree_with_float64_on_the_device(
    device: torch.device, kernel: str, dtype: torch.dtype
) -> None:
    assert layer_kernels.why_eager(kernel, device) == ""
    assert tried(f"{layer_kernels.__name__}.{kernel}", device, dtype).agrees_with_torch(
        device, dtype
    )


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 4096, 5120, 8192, 16_384])
def test_norms_of_real_widths_are_eager_torchs_on_the_device(
    device: torch.device, width: int
) -> None:
    weight = torch.nn.Parameter(torch.randn(width, device=device).bfloat16(), requires_grad=False)
    layer = RMSNorm(weight, 1e-5)
    x = torch.randn(300, width, device=device).bfloat16().requires_grad_()
    grad = torch.randn(300, width, device=device).bfloat16()
    found = layer(x), *torch.autograd.grad(layer(x), x, grad)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, "off")
        plain = layer(x), *torch.autograd.grad(layer(x), x, grad)
    for one, two in zip(found, plain, strict=True):
        torch.testing.assert_close(one, two, rtol=2e-2, atol=2e-2)


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


@pytest.fixture(scope="module", params=[*variants()])
def compiled(request: pytest.FixtureRequest) -> Library:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, request.param)
        found, why = chosen(), cpu.why_none()
    if found is None:
        built = not any(said in why for said in ("not built", "other sources", "this processor:"))
        (pytest.fail if built else pytest.skip)(why)
    assert found.variant == request.param
    return found


def quantized(
    flat: torch.Tensor, kind: Any, block_size: int, kernel: Library | None
) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.full((-(-flat.numel() // 2),), 255, dtype=torch.uint8)
    absmax = torch.full((-(-flat.numel() // block_size),), torch.nan)
    if kernel is None:
        quantize_in_torch(flat, codes, absmax, kind, block_size)
    else:
        cpu.quantize(kernel, flat, codes, absmax, kind, block_size)
    return codes, absmax


def nested(absmax: torch.Tensor, kernel: Library | None) -> NestedScales:
    codes = torch.full((len(absmax),), 255, dtype=torch.uint8)
    peaks, offset = torch.full((-(-len(absmax) // 256),), torch.nan), absmax.mean()
    if kernel is None:
        nest_in_torch(absmax, offset, codes, peaks)
    else:
        cpu.nest(kernel, absmax, offset, 256, codes, peaks)
    return NestedScales(codes, peaks, offset)


def assert_filled_alike(kernel: Library, value: Any, fill: Any, dtype: torch.dtype) -> None:
    """Into a view that begins beside a multiple of 64 bytes, whose surroundings stay."""
    expected = torch.empty(value.shape, dtype=dtype)
    fill(value, expected)
    for before, after in ((0, 0), (1, 3)):
        buffer = torch.full((before + expected.numel() + after,), 7.0, dtype=dtype)
        view = buffer[before : before + expected.numel()].view(value.shape)
        cpu.fill(kernel, value, view)
        assert torch.equal(view, expected)
        assert (buffer[:before] == 7).all()
        assert (buffer[before + expected.numel() :] == 7).all()


shapes = st.one_of(
    st.tuples(st.integers(1, 200_000)),
    st.tuples(st.integers(1, 200), st.sampled_from([1, 31, 48, 64, 65, 100, 192, 256, 1024])),
)


@settings(deadline=None, max_examples=60)
@given(
    shape=shapes,
    dtype=st.sampled_from(DTYPES),
    out=st.sampled_from(DTYPES),
    kind=st.sampled_from(["nf4", "fp4"]),
    block_size=st.sampled_from(BLOCK_SIZES),
    exponent=st.integers(-43, 4),
)
def test_compiled_kernels_equal_torch(
    compiled: Library, shape: Any, dtype: Any, out: Any, kind: Any, block_size: int, exponent: int
) -> None:
    generator = torch.Generator().manual_seed(sum(shape) + exponent)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0**exponent
    flat = weight.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype).view(-1)
    codes, absmax = quantized(flat, kind, block_size, compiled)
    expected_codes, expected_absmax = quantized(flat, kind, block_size, None)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(absmax, expected_absmax)
    ours, theirs = nested(absmax, compiled), nested(absmax, None)
    assert torch.equal(ours.codes, theirs.codes)
    assert torch.equal(ours.absmax, theirs.absmax)
    for scales in (absmax, ours):
        value = Quantized4Bit(codes, scales, shape, dtype, kind, block_size)
        assert_filled_alike(compiled, value, fill_in_torch, out)


@pytest.mark.parametrize("values", ["zeros", "negative zeros", "subnormal", "huge", "midpoints"])
def test_compiled_kernels_equal_torch_at_the_edges(compiled: Library, values: str) -> None:
    from pennyweight.quant.formats import thresholds

    for kind in ("nf4", "fp4"):
        middles = torch.tensor(thresholds(kind)).repeat(9)[:127]
        beside = [middles, middles.nextafter(torch.tensor(2.0)), middles.nextafter(-torch.ones(()))]
        weight = {
            "zeros": torch.zeros(300),
            "negative zeros": torch.full((300,), -0.0),
            "subnormal": torch.linspace(-1.2e-38, 1.2e-38, 333),
            "huge": torch.linspace(-1.0, 1.0, 333) * 3e38,
            "midpoints": torch.cat([*beside, torch.ones(64)]),
        }[values]
        ours, theirs = quantized(weight, kind, 64, compiled), quantized(weight, kind, 64, None)
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 70, 199])
def test_what_is_not_finite_shows_in_the_scale_of_its_block(
    compiled: Library, bad: float, at: int
) -> None:
    weight = torch.randn(200)
    weight[at] = bad
    _, absmax = quantized(weight, "nf4", 64, compiled)
    assert absmax.isfinite().logical_not().nonzero().tolist() == [[at // 64]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_rows_of_8_bits_equal_torch(compiled: Library, dtype: torch.dtype) -> None:
    for shape in ((1, 1), (33, 257), (130, 64), (3, 4099)):
        assert_filled_alike(
            compiled, quantize_8bit(torch.randn(shape)), rowwise.fill_in_torch, dtype
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [(7, 33), (64, 128), (96, 160), (130, 70), (33, 1100), (9, 1088), (6, 2048), (32, 1600)],
)
def test_compiled_products_are_near_float64_and_blind_to_other_rows(
    compiled: Library, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Rounded as pure torch rounds the weight; each row alone, among few and among many: one result."""
    weight, bias = torch.randn(shape), torch.randn(shape[0])
    values = (
        quantize_8bit(weight),
        quantize_4bit(weight),
        quantize_4bit(weight, block_size=32),
        quantize_4bit(weight, block_size=1024, double_quantization=False),
    )
    for value, transposed in product(values, (False, True)):
        dense = torch.empty(shape, dtype=dtype)
        (rowwise.fill_in_torch if value is values[0] else fill_in_torch)(value, dense)
        x = torch.randn(40, shape[0] if transposed else shape[1]).to(dtype)
        added = None if transposed else bias.to(dtype)
        wide = dense.double() if transposed else dense.double().T
        expected = x.double() @ wide + (0.0 if added is None else added.double())
        ours = cpu.product(compiled, x, value, added, transposed=transposed)
        eps = torch.finfo(dtype).eps
        bound = eps * (4e-4 / eps if dtype == torch.float32 else 1.0) * (1 + expected.abs())
        assert ((ours.double() - expected).abs() <= bound).all()
        for rows in (1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 29):
            part = cpu.product(compiled, x[-rows:], value, added, transposed=transposed)
            assert torch.equal(part, ours[-rows:])


@pytest.mark.parametrize("ranks", [(2,), (24,), (16, 4, 0), (0, 18)])
@pytest.mark.parametrize("inputs", [32, 160, 1600])
@pytest.mark.parametrize("dense", [False, True])
def test_products_of_bf16_take_adapters_along(
    compiled: Library, dense: bool, inputs: int, ranks: tuple[int, ...]
) -> None:
    """Layers of other sizes and ranks, some without an adapter, that read the same rows: values and
    gradients near float64's, from sums that are rounded once. More inputs than a tile holds, more
    rows than a block of sums, and an odd one."""
    x = torch.randn(601, inputs).bfloat16()
    if compiled.adapted_bf16 is None:
        pytest.skip(f"{compiled.variant} multiplies in float32")
    layers, weights, held = [], [], []
    for rank, outputs in zip(ranks, (1600, 96, 32), strict=False):
        plain = (torch.randn(outputs, inputs) / 8).bfloat16()
        value = quantize_4bit(plain)
        held += [plain, value]
        factors = torch.randn(rank, inputs) / 8, torch.randn(outputs, rank) / 8
        beside = Beside(*(f.requires_grad_() for f in factors), 0.5) if rank else None
        weight = cpu.dense(plain) if dense else cpu.stored(value, torch.bfloat16)
        weights.append((plain if dense else dequantize_4bit(value, torch.bfloat16)).double())
        layers.append(Layer(weight, torch.randn(outputs), beside))
    ys, zs = adapted(compiled, x, layers)
    grads, wide = [torch.randn(y.shape).bfloat16() for y in ys], x.double()
    of_x, of_factors = adapted_back(compiled, grads, layers, x, zs, of_x=True)
    exact_x, wanted, narrow = torch.zeros_like(wide), [], iter(zs)
    for layer, dense_weight, y, grad in zip(layers, weights, ys, grads, strict=True):
        exact = wide @ dense_weight.T + layer.bias.double()
        exact_x += grad.double() @ dense_weight
        if layer.beside is not None:
            a, b = (f.detach().bfloat16().double() for f in (layer.beside.a, layer.beside.b))
            z, dz = next(narrow).double(), 0.5 * grad.double() @ b
            assert (z - wide @ a.T).norm() <= 2**-8 * z.norm()
            exact += 0.5 * z @ b.T
            exact_x += dz @ a
            wanted += [dz.T @ wide, 0.5 * grad.double().T @ z]
        assert ((y - exact).abs() <= 2**-8 * exact.abs() + 2e-4).all()
    for found, exact in zip((of_x, *of_factors), (exact_x, *wanted), strict=True):
        assert (found - exact).norm() <= 2**-8 * exact.norm()
    few, of_few = adapted(compiled, x[:3], layers)
    assert all(map(torch.equal, (*few, *of_few), (each[:3] for each in (*ys, *zs))))
    again, _ = adapted_back(
        compiled, [g[:3] for g in grads], layers, x[:3], [z[:3] for z in zs], of_x=True
    )
    assert torch.equal(again, of_x[:3])
    assert not adapted(compiled, x, layers, narrow_only=True)[0]
    alone = [adapted(compiled, x, [layer])[0][0] for layer in layers]
    assert all(map(torch.equal, alone, ys))


def test_compiled_products_are_as_near_to_float64_as_torchs(compiled: Library) -> None:
    """A long sum is taken in parts: all in a row would be several times further away."""
    value = quantize_4bit(torch.randn(2048, 2048))
    dense, x = dequantize_4bit(value), torch.randn(4, 2048)
    for transposed, wide in ((False, dense.T), (True, dense)):
        exact = x.double() @ wide.double()
        ours = cpu.product(compiled, x, value, None, transposed=transposed)
        assert (ours - exact).norm() <= 2 * (x @ wide - exact).norm()


def test_groups_of_any_size_are_read(compiled: Library) -> None:
    """Nested scales of foreign checkpoints need not come in groups of a power of two."""
    value = quantize_4bit(torch.randn(40, 256))
    assert isinstance(value.absmax, NestedScales)
    for group in (96, 100, 32):
        peaks = torch.rand(-(-len(value.absmax.codes) // group))
        scales = NestedScales(value.absmax.codes, peaks, value.absmax.offset, group)
        other = Quantized4Bit(value.codes, scales, value.shape, value.dtype, "nf4")
        assert_filled_alike(compiled, other, fill_in_torch, torch.float32)


def test_rows_beyond_the_packing_buffer_come_in_turn(compiled: Library) -> None:
    value = quantize_4bit(torch.randn(4, 40_000))
    x = torch.randn(70, 40_000)
    y = cpu.product(compiled, x, value, None, transposed=False)
    torch.testing.assert_close(y, x @ dequantize_4bit(value).T, rtol=1e-4, atol=1e-2)
    assert torch.equal(cpu.product(compiled, x[63:], value, None, transposed=False), y[63:])
