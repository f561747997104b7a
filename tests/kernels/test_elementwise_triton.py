"""The Triton form of the elementwise operations against their definition: interpreted, or compiled on a GPU."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
triton = pytest.importorskip("triton")

from exlm_dist.kernels.elementwise import (  # noqa: E402
    add_norm,
    dropout_add,
    gelu_gradient_,
    naive,  # noqa: E402
)
from exlm_dist.kernels.elementwise import triton as triton_form  # noqa: E402
from exlm_dist.kernels.launch import record_launches  # noqa: E402
from exlm_dist.model.feedforward import FeedForward  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEED = (5 << 40) + 12345


def leaves(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(DEVICE).requires_grad_() for shape in shapes]


def mask(rows: int, width: int, dropout: float, seed: int = SEED, first_row: int = 0) -> torch.Tensor:
    """What the Triton form multiplies a branch by."""
    key = {"dropout": dropout, "seed": seed, "first_row": first_row}
    return dropout_add(torch.ones(rows, width, device=DEVICE), None, **key, backend="triton")


@pytest.mark.parametrize("rows,width", [(1, 1), (3, 48), (7, 64), (2, 1030)])
@pytest.mark.parametrize("branch", [False, True])
def test_add_norm_is_the_definition(rows, width, branch):
    inputs = leaves((rows, width), (rows, width), (width,), (width,))
    weights = torch.randn(2, rows, width, generator=torch.Generator().manual_seed(width)).to(DEVICE)
    if branch:
        ours = add_norm(*inputs, eps=1e-5, dropout=0.25, seed=SEED, backend="triton")
        defined = naive.add_norm(*inputs, eps=1e-5, mask=mask(rows, width, 0.25))
    else:
        ours = add_norm(None, *inputs[1:], eps=1e-5, backend="triton")
        defined = naive.add_norm(None, *inputs[1:], eps=1e-5)
    used = inputs if branch else inputs[1:]
    results = (
        [*out, *torch.autograd.grad((out[0] * weights[0] + out[1] * weights[1]).sum(), used)] for out in (ours, defined)
    )
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)


def test_norm_alone_may_be_used():
    x, residual, weight, bias = leaves((5, 64), (5, 64), (64,), (64,))
    _, expected = naive.add_norm(x, residual, weight, bias, eps=1e-5)
    _, normed = add_norm(x, residual, weight, bias, eps=1e-5, backend="triton")
    torch.testing.assert_close(normed, expected, rtol=1e-5, atol=1e-5)
    for ours, other in zip(*(torch.autograd.grad(out.square().sum(), (x, residual)) for out in (normed, expected))):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)


def test_dropout_add_and_its_gradient_use_one_mask():
    x, residual = leaves((9, 70), (9, 70))
    factor = mask(9, 70, 0.25)
    out = dropout_add(x, residual, dropout=0.25, seed=SEED, backend="triton")
    torch.testing.assert_close(out, naive.dropout_add(x, residual, factor))
    grads = torch.autograd.grad(out.sum(), (x, residual))
    assert torch.equal(grads[0], factor) and torch.equal(grads[1], torch.ones_like(residual))


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_mask_is_a_pure_function_with_the_right_fraction(dropout):
    first = mask(64, 1024, dropout)
    assert torch.equal(first, mask(64, 1024, dropout))
    assert torch.equal(first[:10], mask(10, 1024, dropout))
    fraction = (first == 0).double().mean().item()
    assert abs(fraction - dropout) < 5 * (dropout * (1 - dropout) / first.numel()) ** 0.5
    torch.testing.assert_close(first.max().item(), 1 / (1 - dropout))
    signs = torch.where(first == 0, -1.0, 1.0)
    centred = signs - signs.mean()
    for lag in (1, 2, 3, 1024, 1025):
        assert abs((centred.flatten()[lag:] * centred.flatten()[:-lag]).mean().item()) < 0.02
    for other in (SEED + 1, SEED ^ (1 << 45)):
        assert abs((centred * (mask(64, 1024, dropout, other) == 0)).mean().item()) < 0.02


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_rows_of_one_rank_have_the_mask_of_the_whole(backend):
    key = {"dropout": 0.25, "seed": SEED, "backend": backend}
    inputs = leaves((11, 30), (11, 30), (30,), (30,))
    hidden, normed = add_norm(*inputs, eps=1e-5, **key)
    grads = torch.autograd.grad((hidden * normed).sum(), inputs[:2])
    for rows in (slice(0, 3), slice(3, 8), slice(8, 11)):
        part = [tensor[rows].detach().requires_grad_() for tensor in inputs[:2]]
        own = add_norm(*part, *inputs[2:], eps=1e-5, **key, first_row=rows.start)
        torch.testing.assert_close(own, (hidden[rows], normed[rows]))
        for ours, whole in zip(torch.autograd.grad((own[0] * own[1]).sum(), part), grads):
            torch.testing.assert_close(ours, whole[rows])
        alone = dropout_add(part[0], None, **key, first_row=rows.start)
        torch.testing.assert_close(alone, dropout_add(inputs[0], None, **key)[rows])


@pytest.fixture
def fresh_nans(monkeypatch):
    """Fresh buffers hold NaN, so that an element which no program writes shows."""
    for name in ("empty", "empty_like"):
        made = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, made=made, **kwargs: made(*args, **kwargs).fill_(torch.nan))


def gelu_case(rows: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x, with values far out where the gelu is flat, and a gradient."""
    x, grad = (tensor.detach().to(dtype) for tensor in leaves((rows, width), (rows, width)))
    return x * 3, grad


def gelu_results(x: torch.Tensor, grad: torch.Tensor, backend: str) -> tuple[torch.Tensor, ...]:
    """gelu(x), the sums, and the gradient of x."""
    grad = grad.clone()
    return *gelu_gradient_(grad, x, backend=backend), grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [1, 63, 64, 65, 3072])
@pytest.mark.parametrize("rows", [1, 2, 191, 1000])
def test_gelu_gradient_and_its_sums(rows, width, dtype, monkeypatch, fresh_nans):
    """No further from fp64 than torch in the same precision, plus roundings."""
    monkeypatch.setattr(triton_form, "GELU_PROGRAMS", 48)
    x, grad = gelu_case(rows, width, dtype)
    results = (gelu_results(x, grad, backend) for backend in ("triton", "torch"))
    for ours, plain, exact in zip(*results, naive.gelu_gradient(grad.double(), x.double())):
        assert ours.dtype == dtype and ours.shape == exact.shape
        error, bound = ((value.double() - exact).abs().max() for value in (ours, plain))
        assert error <= bound + 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_gelu_gradient_has_the_same_bits_every_time(monkeypatch):
    monkeypatch.setattr(triton_form, "GELU_PROGRAMS", 20)
    case = gelu_case(191, 300, torch.float32)
    first = gelu_results(*case, "triton")
    for _ in range(3):
        assert all(map(torch.equal, first, gelu_results(*case, "triton")))


@pytest.mark.parametrize(
    "rows, width", [(0, 5), (1, 5), (4, 256), (257, 300), (12_224, 3072), (97_792, 3072), (131_072, 4096)]
)
def test_gelu_gradient_programs_are_few_and_have_every_row_once(rows, width):
    x, grad = (torch.empty(rows, width, dtype=torch.bfloat16, device="meta") for _ in range(2))
    with record_launches((9, 0)) as launches:
        _, sums = gelu_gradient_(grad, x, backend="triton")
    (item,) = launches
    span, programs = item.arguments["span"], len(item.arguments["sums"])
    assert (programs - 1) * span < max(rows, 1) <= max(programs, 1) * span and span % triton_form.GELU_ROWS == 0
    assert programs * triton.cdiv(width, triton_form.GELU_COLUMNS) <= triton_form.GELU_PROGRAMS
    assert span >= triton_form.GELU_SPAN
    assert sums.shape == (width,) and sums.dtype == x.dtype


def test_gelu_gradient_refuses_other_shapes():
    x = torch.zeros(3, 4, device=DEVICE)
    for wrong in (torch.zeros(3, 5, device=DEVICE), torch.zeros(12, device=DEVICE)):
        with pytest.raises(ValueError, match="grad"):
            gelu_gradient_(wrong, x, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows, width", [(97_792, 3072), (32_771, 1000), (5, 16_384)])
def test_gelu_gradient_at_full_size(rows, width, dtype):
    x, grad = gelu_case(rows, width, dtype)
    first = gelu_results(x, grad, "triton")
    assert all(map(torch.equal, first, gelu_results(x, grad, "triton")))
    plain, exact = gelu_results(x, grad, "torch"), naive.gelu_gradient(grad.double(), x.double())
    for ours, other, true in zip(first, plain, exact):
        error, bound = ((value.double() - true).abs().max() for value in (ours, other))
        assert error <= bound + 4 * torch.finfo(dtype).eps * true.abs().max()


@pytest.mark.gpu
def test_feed_forward_has_the_gradients_of_torch():
    layer, (x, grad) = FeedForward(48, 80).to(DEVICE), leaves((77, 48), (77, 48))
    parameters = (x, *layer.parameters())
    up, down = layer.up, layer.down
    plain = F.linear(F.gelu(F.linear(x, up.weight, up.bias)), down.weight, down.bias)
    for ours, other in zip(*(torch.autograd.grad(out, parameters, grad) for out in (layer(x), plain))):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)
