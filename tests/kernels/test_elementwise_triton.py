"""The Triton form of the elementwise operations against the definition: interpreted, or compiled on a GPU."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from exlm_dist.kernels.elementwise import add_norm, dropout_add, gelu_gradient_  # noqa: E402

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
    weights = torch.randn(2, rows, width, device=DEVICE)
    factor = mask(rows, width, 0.25)
    results = []
    for backend in ("triton", "reference"):
        x, residual, weight, bias = (tensor.detach().clone().requires_grad_() for tensor in inputs)
        if backend == "triton":
            key = {"dropout": 0.25, "seed": SEED} if branch else {}
            out = add_norm(x if branch else None, residual, weight, bias, eps=1e-5, backend=backend, **key)
        else:
            out = add_norm(x * factor if branch else None, residual, weight, bias, eps=1e-5, backend=backend)
        used = (x, residual, weight, bias) if branch else (residual, weight, bias)
        results.append([*out, *torch.autograd.grad((out[0] * weights[0] + out[1] * weights[1]).sum(), used)])
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)


def test_norm_alone_may_be_used():
    x, residual, weight, bias = leaves((5, 64), (5, 64), (64,), (64,))
    expected = torch.nn.functional.layer_norm(residual + x, (64,), weight, bias)
    _, normed = add_norm(x, residual, weight, bias, eps=1e-5, backend="triton")
    torch.testing.assert_close(normed, expected, rtol=1e-5, atol=1e-5)
    for ours, other in zip(*(torch.autograd.grad(out.square().sum(), (x, residual)) for out in (normed, expected))):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)


def test_dropout_add_and_its_gradient_use_one_mask():
    x, residual = leaves((9, 70), (9, 70))
    factor = mask(9, 70, 0.25)
    out = dropout_add(x, residual, dropout=0.25, seed=SEED, backend="triton")
    torch.testing.assert_close(out, residual + x * factor)
    grads = torch.autograd.grad(out.sum(), (x, residual))
    assert torch.equal(grads[0], factor) and torch.equal(grads[1], torch.ones_like(residual))


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_mask_is_a_pure_function_with_the_right_share(dropout):
    first = mask(64, 1024, dropout)
    assert torch.equal(first, mask(64, 1024, dropout))
    assert torch.equal(first[:10], mask(10, 1024, dropout))
    share = (first == 0).double().mean().item()
    assert abs(share - dropout) < 5 * (dropout * (1 - dropout) / first.numel()) ** 0.5
    torch.testing.assert_close(first.max().item(), 1 / (1 - dropout))
    signs = torch.where(first == 0, -1.0, 1.0)
    centred = signs - signs.mean()
    for lag in (1, 2, 3, 1024, 1025):
        assert abs((centred.flatten()[lag:] * centred.flatten()[:-lag]).mean().item()) < 0.02
    for other in (SEED + 1, SEED ^ (1 << 45)):
        assert abs((centred * (mask(64, 1024, dropout, other) == 0)).mean().item()) < 0.02


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_rows_held_apart_have_the_mask_of_all(backend):
    key = {"dropout": 0.25, "seed": SEED, "backend": backend}
    inputs = leaves((11, 30), (11, 30), (30,), (30,))
    hidden, normed = add_norm(*inputs, eps=1e-5, **key)
    grads = torch.autograd.grad((hidden * normed).sum(), inputs[:2])
    for rows in (slice(0, 3), slice(3, 8), slice(8, 11)):
        part = [tensor[rows].detach().requires_grad_() for tensor in inputs[:2]]
        own = add_norm(*part, *inputs[2:], eps=1e-5, **key, first_row=rows.start)
        torch.testing.assert_close(own, (hidden[rows], normed[rows]))
        for ours, all_rows in zip(torch.autograd.grad((own[0] * own[1]).sum(), part), grads):
            torch.testing.assert_close(ours, all_rows[rows])
        alone = dropout_add(part[0], None, **key, first_row=rows.start)
        torch.testing.assert_close(alone, dropout_add(inputs[0], None, **key)[rows])


def test_gelu_gradient():
    x, grad = leaves((33, 100), (33, 100))
    (expected,) = torch.autograd.grad(torch.nn.functional.gelu(x), x, grad)
    ours = grad.detach().clone()
    activated = gelu_gradient_(ours, x.detach(), backend="triton")
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(activated, torch.nn.functional.gelu(x))
