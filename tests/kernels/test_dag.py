"""The state graph: the definition and the tuned form against every path enumerated, the tuned form against the
definition and the authors' values.
"""

from __future__ import annotations

import math

import pytest
import torch
from cases import path_scores, random_graph
from golden import Golden, golden_cases

from exlm_dist.kernels import dag, dag_best_path, dag_log_likelihood, dag_posteriors
from exlm_dist.kernels.dag import naive, recursion

SIZES = [([3, 2, 3], [7, 5, 3]), ([1], [1]), ([1, 2], [1, 2]), ([4], [4]), ([5, 1, 2, 4], [8, 1, 6, 8])]


#: With log space or plain probabilities as each sequence allows, with log space for all, and the definition.
TUNED = ["either form", "log space"]
tuned = pytest.mark.parametrize("form", TUNED, indirect=True)
tuned_and_definition = pytest.mark.parametrize("form", [*TUNED, "definition"], indirect=True)


@pytest.fixture
def form(request, monkeypatch):
    """The module whose three operations are tested."""
    if request.param == "log space":
        monkeypatch.setattr(recursion, "LEAST_TRANSITION", math.inf)
    return naive if request.param == "definition" else dag


def enumerate_graph(match, transitions, num_targets, num_states, ends):
    """(log-likelihood, gamma, best path, best score) of one graph, written out."""
    chosen, scores = path_scores(match, transitions, num_targets, num_states, ends)
    gamma, best = torch.zeros_like(match), torch.full((match.shape[1],), -1)
    if not chosen or not (scores > -math.inf).any():
        return torch.tensor(-math.inf, dtype=match.dtype), gamma, best, torch.tensor(-math.inf, dtype=match.dtype)
    for path, probability in zip(chosen, torch.softmax(scores, 0)):
        for i, u in enumerate(path):
            gamma[i, u] += probability
    for i, u in enumerate(chosen[int(scores.argmax())]):
        best[u] = i
    return torch.logsumexp(scores, 0), gamma, best, scores.max()


@tuned_and_definition
@pytest.mark.parametrize("ends", [1, 2])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_every_path(form, sizes, kind, ends):
    graph = random_graph(*sizes, kind=kind)
    loglik, gamma = form.dag_log_likelihood(*graph, ends=ends), form.dag_posteriors(*graph, ends=ends)
    path, score = form.dag_best_path(*graph, ends=ends)
    for b in range(len(loglik)):
        expected = enumerate_graph(graph[0][b], graph[1][b], int(graph[2][b]), int(graph[3][b]), ends)
        torch.testing.assert_close(loglik[b], expected[0], rtol=0, atol=1e-11)
        torch.testing.assert_close(gamma[b], expected[1], rtol=0, atol=1e-11)
        assert torch.equal(path[b], expected[2])
        torch.testing.assert_close(score[b], expected[3], rtol=0, atol=1e-11)


@tuned
@pytest.mark.parametrize("ends", [1, 2])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_equals_the_definition(form, kind, ends):
    """Values, both gradients, posteriors and best paths, also of a sequence that is too short for its targets."""
    match, transitions, *sizes = random_graph([20, 7, 12, 4], [60, 28, 12, 3], seed=1, kind=kind)
    inputs = match.requires_grad_(), transitions.requires_grad_()
    found = []
    for operations in (form, naive):
        loglik = operations.dag_log_likelihood(*inputs, *sizes, ends=ends)
        weighted = torch.where(loglik > -math.inf, loglik, 0) * torch.tensor([1.0, -2, 0.5, 3])
        grads = torch.autograd.grad(weighted.sum(), inputs)
        gamma, best = (run(*inputs, *sizes, ends=ends) for run in (operations.dag_posteriors, operations.dag_best_path))
        found.append([loglik, *grads, gamma, *best])
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)


@tuned
@pytest.mark.parametrize("ends", [1, 2])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_gradcheck(form, kind, ends):
    match, transitions, *sizes = random_graph([3, 2, 4], [7, 5, 6], kind=kind)
    match.requires_grad_()
    allowed = transitions > -math.inf
    free = transitions[allowed].requires_grad_()

    def run(match, free):
        filled = torch.full_like(transitions, -math.inf).masked_scatter(allowed, free)
        out = form.dag_log_likelihood(match, filled, *sizes, ends=ends)
        return out[out > -math.inf]

    assert torch.autograd.gradcheck(run, (match, free))


@tuned
def test_gradient_of_match_is_the_posterior(form):
    match, transitions, *sizes = random_graph([3, 5], [9, 12])
    match.requires_grad_()
    form.dag_log_likelihood(match, transitions, *sizes).sum().backward()
    gamma = form.dag_posteriors(match, transitions, *sizes)
    torch.testing.assert_close(match.grad, gamma)
    torch.testing.assert_close(gamma.sum(2), torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).double())
    assert not gamma.requires_grad


@tuned_and_definition
def test_impossible_has_no_gradient_and_no_nan(form):
    """Fewer states than targets; a target that no state emits; no transition allowed; and one healthy sequence."""
    match, transitions, *sizes = random_graph([4, 3, 3, 3], [3, 6, 6, 6])
    match[1, 1] = -math.inf
    transitions[2] = -math.inf
    transitions[3, 2, 4] = match[3, 1, 3] = -math.inf
    match, transitions = match.float().requires_grad_(), transitions.float().requires_grad_()
    out = form.dag_log_likelihood(match, transitions, *sizes)
    assert (out[:3] == -math.inf).all() and out[3].isfinite()
    loss = torch.where(out.isfinite(), out, 0).sum()
    for grad in (
        *torch.autograd.grad(loss, (match, transitions), retain_graph=True),
        *torch.autograd.grad(out.sum(), (match, transitions)),
    ):
        assert (grad[:3] == 0).all() and grad.isfinite().all() and (grad[3] != 0).any()
    path, score = form.dag_best_path(match, transitions, *sizes)
    assert (path[:3] == -1).all() and (score[:3] == -math.inf).all()
    assert (form.dag_posteriors(match, transitions, *sizes)[:3] == 0).all()


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("scale", [1.0, 20.0, 200.0])
def test_float32_stays_close_to_float64(kind, scale):
    match, transitions, *sizes = random_graph([20, 7, 30], [60, 28, 30], scale=scale, kind=kind)
    runs = []
    for dtype in (torch.float64, torch.float32):
        inputs = (match.float().to(dtype).requires_grad_(), transitions.float().to(dtype).requires_grad_())
        out = dag_log_likelihood(*inputs, *sizes)
        runs.append([out, *torch.autograd.grad(torch.where(out.isfinite(), out, 0).sum(), inputs)])
    for exact, rounded in zip(*runs):
        assert not rounded.isnan().any()
        torch.testing.assert_close(rounded.double(), exact, rtol=1e-6, atol=2e-5 * max(1.0, scale / 20))


def test_probabilities_agree_with_log_space_on_a_long_graph(monkeypatch):
    """Far corners of the band lie 170 nats below the middle here: the fast form must be taken, and be exact."""
    match, transitions, *sizes = random_graph([78, 60], [312, 240])
    assert recursion.forward(recursion.Graph.of(match.float(), transitions.float(), *sizes, 1)).linear.all()
    fast = dag_log_likelihood(match, transitions, *sizes), dag_posteriors(match, transitions, *sizes)
    monkeypatch.setattr(recursion, "LEAST_TRANSITION", math.inf)
    slow = dag_log_likelihood(match, transitions, *sizes), dag_posteriors(match, transitions, *sizes)
    torch.testing.assert_close(fast, slow, rtol=1e-11, atol=1e-11)


def test_sequence_values_do_not_depend_on_the_batch():
    """Also where one sequence needs log space and the other does not."""
    match, transitions, *sizes = random_graph([4, 6, 5], [16, 20, 12])
    transitions[1] *= 1000
    runs = recursion.forward(recursion.Graph.of(match, transitions, *sizes, 1))
    assert runs.linear.tolist() == [True, False, True]
    out, gamma = dag_log_likelihood(match, transitions, *sizes), dag_posteriors(match, transitions, *sizes)
    order = torch.tensor([2, 0, 1])
    moved = [tensor[order] for tensor in (match, transitions, *sizes)]
    torch.testing.assert_close(dag_log_likelihood(*moved), out[order], rtol=1e-13, atol=0)
    torch.testing.assert_close(dag_posteriors(*moved), gamma[order], rtol=0, atol=1e-13)
    for b in range(3):
        targets, states = int(sizes[0][b]), int(sizes[1][b])
        own = slice(b, b + 1)
        alone = match[own, :targets, :states], transitions[own, :states, :states], sizes[0][own], sizes[1][own]
        torch.testing.assert_close(dag_log_likelihood(*alone), out[own], rtol=1e-13, atol=0)


@tuned_and_definition
def test_transitions_to_earlier_states_are_not_read(form):
    match, transitions, *sizes = random_graph([3], [6])
    noise = torch.where(torch.ones(6, 6).tril() > 0, torch.tensor(5.0).double(), transitions)
    expected = form.dag_log_likelihood(match, transitions, *sizes)
    assert torch.equal(form.dag_log_likelihood(match, noise, *sizes), expected)


@pytest.mark.parametrize("case", golden_cases("dag.npz"))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden(case, dtype):
    """All link patterns of the authors: full, limited reach, windows, sparse, ragged, impossible, times 20 and 200."""
    case = Golden("dag.npz").case(case)
    match = case.tensor("in/match_all", dtype).requires_grad_()
    transitions = case.tensor("in/links", dtype).requires_grad_()
    sizes = case.tensor("in/target_length"), case.tensor("in/output_length")
    valid, large = ~case.tensor("out/invalid"), case.settings["scale"] > 1
    out = dag_log_likelihood(match, transitions, *sizes)
    assert torch.equal(out > -math.inf, valid)
    expected = case.tensor("out/loglik", torch.float64)
    exact = dtype == torch.float64
    limits = {"rtol": 1e-12 if exact else 1e-7, "atol": 1e-10 if exact else 2e-5}
    torch.testing.assert_close(out[valid].double(), expected[valid], **limits)

    torch.where(valid, out * case.tensor("in/cot", dtype), 0).sum().backward()
    for name, tensor in (("match_all", match), ("links", transitions)):
        limit = 1e-6 if exact else 2e-4 if large else 4e-6
        torch.testing.assert_close(tensor.grad.double(), case.tensor(f"grad/{name}", torch.float64), rtol=0, atol=limit)

    path, score = dag_best_path(match, transitions, *sizes)
    assert torch.equal(path[valid], case.tensor("out/path")[valid])
    assert (path[~valid] == -1).all()  # theirs is arbitrary there
    torch.testing.assert_close(score[valid].double(), case.tensor("out/best_score", torch.float64)[valid], **limits)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"transitions": torch.zeros(2, 6, 5)}, ["[2, 6, 5]", "2, 6, 6"]),
        ({"num_targets": torch.tensor([3, 4])}, ["3", "[3, 4]"]),
        ({"num_states": torch.tensor([0, 6])}, ["6", "[0, 6]"]),
        ({"num_states": torch.tensor([6])}, ["[1]", "2"]),
        ({"ends": 0}, ["0", "1"]),
        ({"transitions": torch.zeros(2, 6, 6).double()}, ["float32", "float64"]),
    ],
)
@pytest.mark.parametrize("operation", [dag_log_likelihood, dag_posteriors, dag_best_path])
def test_wrong_arguments_are_named(operation, change, words):
    arguments = {
        "match": torch.zeros(2, 3, 6),
        "transitions": torch.zeros(2, 6, 6),
        "num_targets": torch.tensor([3, 2]),
        "num_states": torch.tensor([6, 5]),
    } | change
    with pytest.raises(ValueError) as error:
        operation(**arguments)
    assert all(word in str(error.value) for word in words)
