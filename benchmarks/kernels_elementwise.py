"""Backward pass of the gelu with the column sums, beside torch's three passes and a copy of as many bytes."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from timing import Case
from torch import Tensor

from exlm_dist.kernels.elementwise import gelu_gradient_, naive


def cases(device: torch.device, toy: bool) -> Iterator[Case]:
    """Rows of a full and of a small micro-batch, inner widths of base and of a quarter of it."""
    for rows, width in ((9, 20),) if toy else ((97_792, 3072), (97_792, 768), (12_224, 3072)):
        yield _Gelu(rows, width, device).case()


class _Gelu:
    """One gradient and the argument of the gelu, and the sides that work on them."""

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.x, self.given = torch.randn(2, rows, width, device=device).to(dtype)
        # Overwritten by every run, as in training; its values after many runs do not change the time.
        self.grad, self.out = self.given.clone(), torch.empty_like(self.x)

    def case(self) -> Case:
        """The comparison."""
        sides = {name: functools.partial(self._run, backend) for name, backend in BACKENDS.items()}
        sides |= {"copy": self._copy}
        bound = 1e-2 if self.x.dtype == torch.bfloat16 else 1e-5
        sizes = f"R={len(self.x)}, W={self.x.shape[1]}"
        return Case("gelu gradient", sizes, "ours", sides, self._error, bound)

    def _run(self, backend: str) -> tuple[Tensor, ...]:
        return *gelu_gradient_(self.grad, self.x, backend=backend), self.grad

    def _copy(self) -> None:
        """Two tensors read, two written."""
        self.out.copy_(self.x)
        self.grad.copy_(self.given)

    def _error(self, name: str) -> float | None:
        """Largest relative error (Frobenius) of gelu(x), sums and gradient from the definition in fp64."""
        if name not in BACKENDS:
            return None
        self.grad.copy_(self.given)
        wanted = naive.gelu_gradient(self.given.double(), self.x.double())
        return max(
            float((got.double() - want).norm() / want.norm()) for got, want in zip(self._run(BACKENDS[name]), wanted)
        )


BACKENDS = {"ours": "auto", "torch": "torch"}
