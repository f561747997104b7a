"""The elementwise operations, in plain torch, against their definition (`naive.py`)."""

from __future__ import annotations

import pytest
import torch

from exlm_dist.kernels.elementwise import add_norm, dropout_add, gelu_gradient_, naive

KEY = {"dropout": 0.25, "seed": 7, "site": 3, "first_row": 2, "backend": "torch"}


def leaves(rows: int, width: int) -> list[torch.Tensor]:
    """branch, residual, weight, bias in fp64."""
    torch.manual_seed(rows + width)
    shapes = [(rows, width), (rows, width), (width,), (width,)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def mask(rows: int, width: int) -> torch.Tensor:
    """What dropout multiplies a branch by."""
    return dropout_add(torch.ones(rows, width, dtype=torch.float64), None, **KEY)


def assert_equal(ours: torch.Tensor, defined: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    """Values, and the gradients of a random combination of them."""
    torch.testing.assert_close(ours, defined, rtol=0, atol=1e-13)
    cotangent = torch.randn_like(ours)
    grads = (torch.autograd.grad((out * cotangent).sum(), inputs) for out in (ours, defined))
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows,width", [(1, 2), (3, 48), (7, 65)])
@pytest.mark.parametrize("residual", [True, False])
def test_dropout_add(rows, width, residual):
    inputs = leaves(rows, width)[: 2 if residual else 1]
    operands = inputs if residual else (*inputs, None)
    assert_equal(dropout_add(*operands, **KEY), naive.dropout_add(*operands, mask(rows, width)), inputs)


@pytest.mark.parametrize("rows,width", [(1, 2), (3, 48), (7, 65)])
@pytest.mark.parametrize("branch", ["none", "whole", "dropped"])
def test_add_norm(rows, width, branch):
    inputs = leaves(rows, width)
    operands = [None, *inputs[1:]] if branch == "none" else inputs
    dropped = branch == "dropped"
    ours = add_norm(*operands, eps=1e-5, **KEY | ({} if dropped else {"dropout": 0.0}))
    defined = naive.add_norm(*operands, eps=1e-5, mask=mask(rows, width) if dropped else None)
    used = inputs[1:] if branch == "none" else inputs
    assert_equal(torch.stack(ours), torch.stack(defined), used)


def test_gelu_gradient():
    grad, x = torch.randn(2, 31, 17, dtype=torch.float64)
    defined = naive.gelu_gradient(grad, 3 * x)
    ours = (*gelu_gradient_(grad, 3 * x, backend="torch"), grad)
    torch.testing.assert_close(ours, defined, rtol=0, atol=1e-13)
