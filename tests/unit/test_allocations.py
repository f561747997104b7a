"""The counter of live bytes, on which other tests rely."""

from __future__ import annotations

import torch
from allocations import Allocations


def test_a_storage_counts_once_while_it_is_alive() -> None:
    before = torch.empty(1000, device="meta")
    with Allocations() as allocations:
        view = before[:10].view(2, 5)  # a view of a tensor from before does not count
        one = torch.empty(100, device="meta")  # 400 bytes
        row = one.view(10, 10)[3]
        one.add_(1)
        assert (allocations.live, allocations.peak) == (400, 400)
        two = one + before[:100]
        del one
        assert allocations.live == 800  # a view keeps the first alive
        del row
        assert (allocations.live, allocations.peak) == (400, 800)
    del two, view
    assert (allocations.live, allocations.peak) == (0, 800)


def test_what_the_backward_pass_allocates_counts() -> None:
    weight = torch.empty(8, 4, device="meta", requires_grad=True)
    with Allocations() as allocations:
        out = torch.empty(16, 4, device="meta") @ weight.t()
        (grad,) = torch.autograd.grad(out, [weight], torch.empty_like(out))
    assert grad.shape == weight.shape
    assert allocations.peak >= 4 * (16 * 8 + 16 * 8 + 8 * 4)
