"""Starting a kernel through its compiled form: two calls get the same one only if Triton would compile the same."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import native_specialize_impl  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from exlm_dist.kernels import launch  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def values() -> list[object]:
    """Arguments on both sides of every distinction that Triton makes."""
    rows = [torch.zeros(64, 64, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.int64)]
    whole = [0, 1, 2, 15, 16, 17, -1, -16, 48, 2**31 - 16, 2**31 - 1, 2**31, 2**31 + 16, -(2**31), -(2**31) - 1, 2**40]
    moved = [tensor.view(-1)[step:] for tensor in rows for step in (1, 2, 8, 16)]
    described = [TensorDescriptor.from_tensor(tensor, block) for tensor in rows[:2] for block in ([16, 64], [64, 16])]
    return [*rows, *moved, *described, *whole, 0.0, 1.0, 0.5, None, True, False]


def test_equal_kinds_are_equal_to_triton() -> None:
    backend = make_backend(GPUTarget("cuda", 90, 32))
    distinguished = 0
    for one, other in itertools.combinations(values(), 2):
        forms = [native_specialize_impl(backend, value, False, True, True) for value in (one, other)]
        if launch._kind(one) == launch._kind(other):
            assert forms[0] == forms[1], (one, other)
        distinguished += forms[0] != forms[1]
    assert distinguished > 100  # Triton does distinguish here


def test_sizes_are_those_of_triton() -> None:
    for size in range(1, 70):
        assert launch.next_power_of_2(size) == triton.next_power_of_2(size)
        assert [launch.cdiv(size, part) for part in (1, 7, 64)] == [triton.cdiv(size, part) for part in (1, 7, 64)]


@triton.jit(do_not_specialize=["shift"])
def scaled_kernel(out, x, size, stride, shift, factor, BLOCK: tl.constexpr, TWICE: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.load(x + o * stride, mask=o < size, other=0.0).to(tl.float32) * factor + shift
    if TWICE:
        b *= 2
    tl.store(out + o, b, mask=o < size)


def test_every_combination_of_arguments_gets_its_own_result() -> None:
    """In an order in which a form reused by mistake would get arguments that it was not compiled for; twice."""
    source = torch.arange(200.0, device=DEVICE)
    cases = itertools.product((torch.float32, torch.float16), (0, 1), (1, 2, 16), (3, 16), (1, 5), (True, False))
    for dtype, offset, stride, size, shift, twice in [*cases] * 2:
        x = source.to(dtype)[offset:]
        out = torch.full((32,), -1.0, device=DEVICE)[offset:]
        size = min(size, 8) if stride == 16 else size
        arguments = {"out": out, "x": x, "size": size, "stride": stride, "shift": shift, "factor": 0.5}
        launch.launch(scaled_kernel, (2,), arguments, {"BLOCK": 16, "TWICE": twice}, warps=1)
        want = (x[: size * stride : stride].float() * 0.5 + shift) * (2 if twice else 1)
        assert torch.equal(out[:size], want) and bool((out[size:] == -1).all())
