"""Products of dense layers against torch's in fp64, for operands of every layout: as accurate as torch's in fp32."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from exlm_dist.kernels import linear as module
from exlm_dist.kernels.linear import (
    BiasPassingLinear,
    Linear,
    add_product,
    linear,
    linear_by_column,
    linear_gelu,
    product,
)

SHAPES = [(1, 1, 1), (2, 3, 5), (63, 64, 65), (191, 256, 96), (746, 32, 257), (3, 513, 2)]


def matrix(rows: int, columns: int, layout: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if layout == "transposed":
        return torch.randn(columns, rows, generator=generator).t()
    if layout == "columns of a wider one":
        return torch.randn(rows, 2 * columns + 1, generator=generator)[:, 1 : columns + 1]
    if layout == "every other row":
        return torch.randn(2 * rows, columns, generator=generator)[::2]
    return torch.randn(rows, columns, generator=generator)


def assert_as_good(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> None:
    """The error against fp64 is no larger than that of torch's own product, plus a few roundings."""
    scale = exact.abs().max().item() + 1e-30
    error, other = ((value.double() - exact).abs().max().item() / scale for value in (ours, theirs))
    assert error <= other + 5e-7


LAYOUTS = ["contiguous", "transposed", "columns of a wider one", "every other row"]


@pytest.fixture(params=["MKL", "oneDNN"], autouse=True)
def library(request, monkeypatch):
    """Either library, whichever processor this is."""
    monkeypatch.setattr(module, "_is_intel", lambda: request.param == "MKL")


@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize(("rows", "inner", "columns"), SHAPES)
def test_product_of_every_layout(rows, inner, columns, left, right):
    a, b = matrix(rows, inner, left, 0), matrix(inner, columns, right, 1)
    exact = a.double() @ b.double()
    for bias in (None, matrix(1, columns, "contiguous", 2)[0]):
        plain = a @ b if bias is None else a @ b + bias
        assert_as_good(product(a, b, bias), plain, exact if bias is None else exact + bias.double())
    total = matrix(rows, columns, "contiguous", 3)
    plain, exact = a @ b + total, exact + total.double()
    assert_as_good(add_product(total, a, b), plain, exact)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("rows", "inner", "columns"), SHAPES)
def test_gelu_of_a_product(rows, inner, columns, layout):
    x, weight = matrix(rows, inner, layout, 0), matrix(columns, inner, layout, 1)
    bias = matrix(1, columns, "contiguous", 2)[0]
    exact = F.gelu(F.linear(x.double(), weight.double(), bias.double()))
    assert_as_good(linear_gelu(x, weight, bias), F.gelu(F.linear(x, weight, bias)), exact)
    assert linear_gelu(x.double(), weight.double(), bias.double()).dtype == torch.float64


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "inner", "columns"), SHAPES)
def test_value_and_gradients(rows, inner, columns, bias):
    values = [matrix(rows, inner, "contiguous", 0), matrix(columns, 2 * inner, "contiguous", 1)]
    values += [matrix(1, columns, "contiguous", 2)[0]] if bias else []
    grad = matrix(rows, columns, "transposed", 3)

    def run(function, dtype):
        leaves = [value.to(dtype).requires_grad_() for value in values]
        weight = leaves[1].split(inner, dim=1)[1]  # as the transition head cuts its weights
        out = function(leaves[0], weight, leaves[2] if bias else None)
        return [out, *torch.autograd.grad(out, leaves, grad.to(dtype))]

    for ours, theirs, exact in zip(
        run(linear, torch.float32), run(F.linear, torch.float32), run(F.linear, torch.float64), strict=True
    ):
        assert_as_good(ours, theirs, exact)
    by_column = run(linear_by_column, torch.float32)
    for ours, theirs, exact in zip(by_column, run(F.linear, torch.float32), run(F.linear, torch.float64), strict=True):
        assert_as_good(ours, theirs, exact)
    assert by_column[0].t().is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_torchs_own(dtype):
    x, weight, bias = (torch.randn(shape, dtype=dtype) for shape in ((7, 12), (5, 12), (5,)))
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert torch.equal(product(x, weight.t()), x @ weight.t())


def test_the_gradient_of_a_transposed_input_lies_as_it_does():
    columns = matrix(48, 63, "contiguous", 0)
    weight, grad = matrix(32, 48, "contiguous", 1), matrix(63, 32, "contiguous", 2)
    x = columns.t().requires_grad_()
    (found,) = torch.autograd.grad(linear(x, weight), x, grad)
    assert found.t().is_contiguous()
    torch.testing.assert_close(found, grad @ weight)


def test_no_rows_give_no_rows_and_zero_gradients():
    layer = Linear(4, 3)
    out = layer(torch.zeros(0, 4))
    out.sum().backward()
    assert out.shape == (0, 3)
    assert not layer.weight.grad.any()


def test_a_bias_that_is_passed_on_has_no_gradient_of_the_output():
    layer, x, grad = BiasPassingLinear(4, 3), torch.randn(7, 4), torch.randn(7, 3)
    out, bias = layer(x)
    plain = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(out, plain)
    found = torch.autograd.grad(out, (layer.weight, layer.bias), grad, allow_unused=True)
    assert found[1] is None
    torch.testing.assert_close(found[0], torch.autograd.grad(plain, layer.weight, grad)[0])
    taken = torch.randn(3)
    assert torch.equal(bias, layer.bias) and torch.equal(torch.autograd.grad(bias, layer.bias, taken)[0], taken)


def test_same_values_on_every_call():
    layer, x = Linear(256, 192), torch.randn(333, 256)
    assert torch.equal(layer(x), layer(x))


def test_ever_new_shapes_do_not_fill_the_memory():
    """Under oneDNN's own limits the code and scratch space of all of them would stay."""
    code = """
import torch
from pathlib import Path
from exlm_dist.kernels import linear as module
from exlm_dist.kernels.linear import linear

module._is_intel = lambda: False

def resident():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in line)

weights = [torch.randn(size, 256, requires_grad=True) for size in (768, 1024)]

def step(rows):
    for weight in weights:
        linear(torch.randn(rows, 256, requires_grad=True), weight).sum().backward()

for rows in range(400, 440):
    step(rows)
before = resident()
for rows in range(440, 640):
    step(rows)
print((resident() - before) / 1024)
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert float(printed.stdout) < 100  # MiB; 600 without limits


def test_without_onednn_torch_multiplies(monkeypatch):
    monkeypatch.setattr(module, "_has_onednn", lambda: False)
    x, weight = torch.randn(9, 8), torch.randn(7, 8)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"x has shape \[2, 3\]"):
        linear(torch.zeros(2, 3), torch.zeros(5, 4))
    with pytest.raises(ValueError, match="b has shape"):
        product(torch.zeros(2, 3), torch.zeros(4, 5))
    with pytest.raises(ValueError, match="bias has shape"):
        product(torch.zeros(2, 3), torch.zeros(3, 5), torch.zeros(4))
    with pytest.raises(ValueError, match="total has shape"):
        add_product(torch.zeros(2, 4), torch.zeros(2, 3), torch.zeros(3, 5))
