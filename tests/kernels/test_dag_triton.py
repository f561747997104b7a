"""State-graph likelihood in Triton against its definition in fp64: interpreted at toy sizes, on a GPU at full size."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from cases import random_graph  # noqa: E402
from golden import Golden, golden_cases  # noqa: E402

from exlm_dist.kernels import dag  # noqa: E402
from exlm_dist.kernels.dag import dag_best_path, dag_log_likelihood, naive  # noqa: E402
from exlm_dist.kernels.dag import triton as kernels  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Graph = tuple[Tensor, Tensor, Tensor, Tensor]


def evaluate(graph: Graph, ends: int, dtype: torch.dtype, *, definition: bool = False) -> list[Tensor]:
    """[log-likelihood, gradients of match and transitions, posteriors] by Triton or by definition; each sequence has a
    weight of its own.
    """
    operations, options = (naive, {"ends": ends}) if definition else (dag, {"ends": ends, "backend": "triton"})
    match, transitions, num_targets, num_states = (tensor.to(DEVICE) for tensor in graph)
    inputs = [match.to(dtype).requires_grad_(), transitions.to(dtype).requires_grad_()]
    value = operations.dag_log_likelihood(*inputs, num_targets, num_states, **options)
    weights = torch.linspace(-1, 2, len(value), dtype=dtype, device=DEVICE)
    grads = torch.autograd.grad((value.where(value.isfinite(), 0) * weights).sum(), inputs)
    posteriors = operations.dag_posteriors(*inputs, num_targets, num_states, **options)
    return [value.detach(), *grads, posteriors]


def agree(graph: Graph, ends: int = 1, tolerance: float = 2e-5) -> list[Tensor]:
    """Check every output of the kernels (fp32) against the definition (fp64 of the same numbers)."""
    exact = evaluate((graph[0].float(), graph[1].float(), *graph[2:]), ends, torch.float64, definition=True)
    ours = evaluate(graph, ends, torch.float32)
    finite = exact[0].isfinite()
    assert torch.equal(finite, ours[0].isfinite())
    torch.testing.assert_close(ours[0][finite].double(), exact[0][finite], rtol=1e-6, atol=2e-5)
    for got, want in zip(ours[1:], exact[1:]):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance)
    return ours


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 32 states, so that short sequences have several."""
    monkeypatch.setattr(kernels.Block, "of", classmethod(lambda cls, states, device: cls(32, 16, 16, 2)))


@pytest.mark.parametrize("ends", [1, 4])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_agrees_with_the_definition(small_blocks: None, kind: str, ends: int) -> None:
    agree(random_graph([1, 5, 9, 17], [4, 20, 36, 68], seed=1, kind=kind), ends)


def test_one_state_per_target_and_lengths_around_a_block(small_blocks: None) -> None:
    agree(random_graph([1, 2, 9, 20, 11], [1, 2, 31, 32, 33], seed=2))
    agree(random_graph([33, 3], [33, 65], seed=3))


def test_impossible_alignments_are_minus_infinity_without_gradient(small_blocks: None) -> None:
    match, transitions, num_targets, num_states = random_graph([5, 6, 4], [20, 5, 16], seed=4)
    transitions[2, :, 3:] = -torch.inf  # the last state cannot be reached
    value, grad_match, grad_transitions, posteriors = agree((match, transitions, num_targets, num_states))
    assert value.isneginf().tolist() == [False, True, True]
    assert not any(tensor[1:].any() for tensor in (grad_match, grad_transitions, posteriors))


def test_sharp_scores_take_log_space_and_are_counted(small_blocks: None) -> None:
    before = kernels.fallback_count(DEVICE).item()
    agree(random_graph([12, 9], [48, 36], seed=5), tolerance=2e-5)
    assert kernels.fallback_count(DEVICE).item() == before
    agree(random_graph([9, 6, 1], [36, 24, 4], seed=5, scale=200.0), tolerance=2e-4)
    assert before < kernels.fallback_count(DEVICE).item() <= before + 6  # twice: likelihood and posteriors


def test_improbable_but_only_way(small_blocks: None) -> None:
    """A transition of probability e^-100 and one of e^-150 that every path must take."""
    match, transitions, num_targets, num_states = random_graph([6, 6], [24, 24], seed=6)
    for b, size in enumerate((-100.0, -150.0)):
        transitions[b, :10, 10:] = size
    agree((match, transitions, num_targets, num_states), tolerance=1e-4)


def test_never_reads_what_it_did_not_write(small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = random_graph([5, 12, 9], [20, 48, 36], seed=7)
    for b in range(3):
        graph[0][b, graph[2][b] :] = torch.nan
        graph[0][b, :, graph[3][b] :] = torch.nan
        graph[1][b, graph[3][b] :] = torch.nan
        graph[1][b, :, graph[3][b] :] = torch.nan
    empty = torch.empty

    def poisoned(*shape, **options):
        tensor = empty(*shape, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.fill_(-(2**30))

    clean = [graph[0].nan_to_num(nan=-torch.inf), graph[1].nan_to_num(nan=-torch.inf), *graph[2:]]
    expected = evaluate(clean, 1, torch.float64, definition=True)
    monkeypatch.setattr(torch, "empty", poisoned)
    ours = evaluate(graph, 1, torch.float32)
    for got, want in zip(ours, expected):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=2e-5)


def test_other_sequences_and_their_order_change_nothing(small_blocks: None) -> None:
    graph = random_graph([5, 12, 9], [20, 48, 36], seed=8)
    order = torch.tensor([2, 0, 1])
    whole = evaluate(graph, 1, torch.float32)
    permuted = evaluate(tuple(tensor[order] for tensor in graph), 1, torch.float32)
    assert torch.equal(permuted[0], whole[0][order]) and torch.equal(permuted[3], whole[3][order])
    alone = evaluate(tuple(tensor[1:2] for tensor in graph), 1, torch.float32)
    assert torch.equal(alone[0], whole[0][1:2]) and torch.equal(alone[3], whole[3][1:2])


@pytest.mark.parametrize("case", golden_cases("dag.npz"))
def test_golden(case: str) -> None:
    golden = Golden("dag.npz").case(case)
    match, transitions = golden.tensor("in/match_all"), golden.tensor("in/links")
    if match.shape[2] > 16 and DEVICE.type == "cpu":
        pytest.skip("too large for the interpreter")
    sizes = [golden.tensor(f"in/{name}_length").long() for name in ("target", "output")]
    graph = (match, transitions, *sizes)
    value, grad_match, grad_transitions, _ = evaluate(graph, 1, torch.float32)
    valid = ~golden.tensor("out/invalid").bool().to(DEVICE)
    assert torch.equal(value.isfinite(), valid)
    want = golden.tensor("out/loglik").to(DEVICE)
    torch.testing.assert_close(value[valid].double(), want[valid].double(), rtol=1e-6, atol=2e-5)
    path, score = dag_best_path(*(tensor.to(DEVICE) for tensor in graph), ends=1, backend="triton")
    assert torch.equal(path[valid], golden.tensor("out/path").long().to(DEVICE)[valid])


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [[1, 2, 16, 21, 48], [78, 64, 191, 186], [400, 120]], ids=["short", "middle", "long"])
def test_full_size(sizes: list[int]) -> None:
    agree(random_graph(sizes, [4 * n for n in sizes], seed=9), tolerance=2e-5)
    agree(random_graph(sizes, [4 * n for n in sizes], seed=10, kind="sparse"), ends=4, tolerance=2e-5)


@pytest.mark.gpu
def test_many_sequences_and_no_host_synchronisation() -> None:
    match, transitions, num_targets, num_states = (
        t.to(DEVICE) for t in random_graph([21, 5] * 256, [84, 20] * 256, seed=11)
    )
    inputs = [match.float().requires_grad_(), transitions.float().requires_grad_()]
    dag_log_likelihood(*inputs, num_targets, num_states).sum().backward()  # compiled outside the guarded part
    torch.cuda.set_sync_debug_mode("error")
    try:
        dag_log_likelihood(*inputs, num_targets, num_states).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    agree((match.cpu(), transitions.cpu(), num_targets.cpu(), num_states.cpu()))
