"""A number by which two computations of the same gradient are compared to the bit, without keeping either."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

#: Integers of the width of each type, to see its bits.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
#: Elements that are digested at once: what it takes is 16 bytes for each of them.
_CHUNK = 1 << 22


class GradientDigest:
    """`with digest.of(loss): ...` around the backward pass of `loss`: then `digest.value()` is of the loss and of all
    gradients that reached the parameters, before they were added to anything or sent to anyone.

    The digest of a tensor is the sum of its bits, as integers, each times an odd number that grows with its place,
    modulo 2^64. A single element that differs always changes it, and it does not depend on the order of the sum.
    """

    def __init__(self, parameters: Sequence[Tensor], *, discard: bool = False) -> None:
        """`discard`: each gradient, once digested, is replaced by zeros that take no memory."""
        self._parameters, self._discard = parameters, discard
        self._parts: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def of(self, loss: Tensor) -> Iterator[None]:
        """Digest `loss` and the gradients of the backward pass inside."""
        self._parts = {0: tensor_digest(loss)}
        hooks = [parameter.register_hook(self._hook(index)) for index, parameter in enumerate(self._parameters, 1)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def value(self) -> int:
        """The digest, 64 bits. Waits for the device."""
        parts = torch.stack([part * (2 * index + 1) for index, part in sorted(self._parts.items())])
        return int(parts.sum()) % 2**64

    def _hook(self, index: int) -> Callable[[Tensor], Tensor | None]:
        def digest(gradient: Tensor) -> Tensor | None:
            self._parts[index] = tensor_digest(gradient)
            return gradient.new_zeros(()).expand_as(gradient) if self._discard else None

        return digest


def tensor_digest(tensor: Tensor) -> Tensor:
    """Digest of one tensor of any floating-point type, 0-dimensional int64 on its device; see `GradientDigest`."""
    bits = tensor.detach().contiguous().view(_BITS[tensor.element_size()]).view(-1)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), _CHUNK):
        chunk = bits[start : start + _CHUNK]
        places = torch.arange(2 * start + 1, 2 * (start + len(chunk)), 2, device=tensor.device)
        total += (chunk * places).sum()
    return total
