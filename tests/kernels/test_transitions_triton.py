"""Transitions in Triton against their definition in fp64: interpreted at toy sizes, on a GPU at full size."""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from cases import starts_of  # noqa: E402

from exlm_dist.kernels import transition_log_probs  # noqa: E402
from exlm_dist.kernels.transitions import JumpPrior, naive  # noqa: E402

PRIORS = {
    "none": None,
    "gaussian": JumpPrior("gaussian", 1.5, 8.0),
    "laplace": JumpPrior("laplace", 1.0, 8.0),
    "group": JumpPrior("group", 0.125, 12.0),
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make(
    lengths: list[int], heads: int, width: int, *, seed: int = 0, scale: float = 1.0, padding: int = 3
) -> list[Tensor]:
    """[query, key, gate] of the sequences, and `padding` rows of NaN that belong to none."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(lengths) + padding
    query, key = (torch.randn(rows, heads, width, generator=generator) for _ in range(2))
    inputs = [query * scale, key, torch.randn(rows, heads, generator=generator)]
    for tensor in inputs:
        tensor[sum(lengths) :] = torch.nan
    return inputs


def evaluate(
    inputs: list[Tensor], lengths: list[int], k: int, kind: str, dtype: torch.dtype, *, prior: str = "none",
    definition: bool = False,
) -> list[Tensor]:  # fmt: skip
    """[log E, gradients of query, key, gate], by Triton or by definition; the gradient that Triton gets is NaN where a
    transition is not allowed.
    """
    leaves = [tensor.detach().to(DEVICE, dtype).requires_grad_() for tensor in inputs]
    run = naive.transition_log_probs if definition else partial(transition_log_probs, backend="triton")
    starts = starts_of(lengths).to(DEVICE)
    out = run(*leaves, starts, max(lengths) + 1, states_per_target=k, kind=kind, prior=PRIORS[prior])
    grad = torch.linspace(0, 1, out.numel(), dtype=torch.float64).view_as(out).to(out)
    out.backward(grad.where(out.isfinite(), 0.0 if definition else torch.nan))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def agree(
    inputs: list[Tensor], lengths: list[int], k: int, kind: str, dtype: torch.dtype, tolerance: float,
    prior: str = "none",
) -> list[Tensor]:  # fmt: skip
    """Relative error of each output within `tolerance` of the definition on the same (rounded) inputs in fp64."""
    rounded = [tensor.to(dtype).double().nan_to_num() for tensor in inputs]
    exact = evaluate(rounded, lengths, k, kind, torch.float64, prior=prior, definition=True)
    ours = evaluate(inputs, lengths, k, kind, dtype, prior=prior)
    assert torch.equal(exact[0].isfinite(), ours[0].isfinite())
    allowed = exact[0].isfinite()
    torch.testing.assert_close(ours[0][allowed].double(), exact[0][allowed], rtol=2e-6, atol=2e-5)
    for got, want in zip(ours[1:], exact[1:]):
        assert (got.double() - want).norm() <= tolerance * want.norm() + 1e-12
        assert not got[sum(lengths) :].any()
    return ours


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("heads, width", [(3, 24), (2, 32)])
def test_agrees_with_the_definition(kind: str, heads: int, width: int, prior: str) -> None:
    lengths = [12, 4, 36, 8]
    agree(make(lengths, heads, width), lengths, 4, kind, torch.float32, 2e-6, prior)


def test_half_precision() -> None:
    lengths = [1, 2, 65, 64, 63]
    agree(make(lengths, 2, 32, seed=1), lengths, 1, "dense", torch.float16, 1e-3)


@pytest.mark.parametrize("scale", [20.0, 200.0])
def test_large_scores(scale: float) -> None:
    """Probabilities far below what fp32 represents still have their logarithm and their gradient."""
    lengths = [9, 33]
    inputs = make(lengths, 2, 16, seed=2, scale=scale)
    exact = evaluate([t.double().nan_to_num() for t in inputs], lengths, 1, "dense", torch.float64, definition=True)
    ours = evaluate(inputs, lengths, 1, "dense", torch.float32)
    allowed = exact[0].isfinite()
    torch.testing.assert_close(ours[0][allowed].double(), exact[0][allowed], rtol=2e-6, atol=1e-3)
    for got, want in zip(ours[1:], exact[1:]):
        assert (got.double() - want).norm() <= 1e-4 * want.norm()


def test_the_gate_of_a_single_head_has_no_gradient() -> None:
    """Not even that of rounding, which an optimiser would scale up."""
    lengths = [9, 4]
    grads = evaluate(make(lengths, 1, 16, seed=7), lengths, 1, "dense", torch.float32)[1:]
    assert grads[0].any() and not grads[2].any()


def test_uniform() -> None:
    starts = starts_of([5, 3]).to(DEVICE)
    arguments = {"states_per_target": 1, "kind": "uniform"}
    ours = transition_log_probs(None, None, None, starts, 6, **arguments, backend="triton")
    assert torch.equal(ours, naive.transition_log_probs(None, None, None, starts, 6, **arguments))


def test_other_sequences_and_their_order_change_nothing() -> None:
    lengths, order = [12, 33, 8], [2, 0, 1]
    inputs = make(lengths, 2, 16, seed=3, padding=0)
    parts = [tensor.split(lengths) for tensor in inputs]
    whole = evaluate(inputs, lengths, 1, "dense", torch.float32)[0]
    permuted = evaluate(
        [torch.cat([part[b] for b in order]) for part in parts],
        [lengths[b] for b in order],
        1,
        "dense",
        torch.float32,
    )[0]
    assert torch.equal(permuted, whole[order])
    alone = evaluate([part[0] for part in parts], lengths[:1], 1, "dense", torch.float32)[0]
    assert torch.equal(alone[0, :12, :12], whole[0, :12, :12])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize(
    "width, prior", [(32, "none"), *((64, prior) for prior in PRIORS), (96, "group"), (128, "none")]
)
def test_full_size(kind: str, width: int, prior: str) -> None:
    lengths = [84, 312, 4, 8, 252, 764] * 4
    inputs = make(lengths, 12, width, seed=4)
    agree(inputs, lengths, 4, kind, torch.bfloat16, 6e-3, prior)
    agree(inputs, lengths, 4, kind, torch.float32, 5e-6, prior)


@pytest.mark.gpu
def test_no_host_synchronisation() -> None:
    lengths = [84] * 512
    leaves = [tensor.to(DEVICE, torch.bfloat16).requires_grad_() for tensor in make(lengths, 12, 64, padding=0)]
    starts = starts_of(lengths).to(DEVICE)
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            out = transition_log_probs(*leaves, starts, 84, states_per_target=4, prior=PRIORS["group"])
            out.backward(torch.zeros_like(out))
        finally:
            torch.cuda.set_sync_debug_mode("default")
