"""Transition log-probabilities: the definition number by number, the tuned form against it and the authors' values."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import prior_score, starts_of, transition_probability
from golden import Golden, golden_cases

from exlm_dist.kernels import transition_log_probs
from exlm_dist.kernels.transitions import JumpPrior, naive
from exlm_dist.kernels.transitions import torch as torch_form

BATCHES = [[4], [2, 6, 4], [1, 8], [2]]
#: Each with jumps at the floor and above it.
PRIORS = {
    "none": None,
    "gaussian": JumpPrior("gaussian", 1.0, 3.0),
    "laplace": JumpPrior("laplace", 1.0, 1.5),
    "group": JumpPrior("group", 0.5, 3.0),
}


def example(lengths, heads=3, width=4, extra=2, dtype=torch.float64, seed=0, scale=1.0):
    torch.manual_seed(seed)
    total = sum(lengths) + extra
    shapes = [(total, heads, width), (total, heads, width), (total, heads)]
    tensors = tuple((torch.randn(shape, dtype=dtype) * scale).requires_grad_() for shape in shapes)
    return tensors, starts_of(lengths), max(lengths)


def finite_sum(logs, cotangent):
    return torch.where(logs > -math.inf, logs * cotangent, 0).sum()


@pytest.mark.parametrize(
    ("kind", "prior"), [*itertools.product(["dense", "sparse"], PRIORS), ("uniform", "none")], ids="-".join
)
def test_definition_number_by_number(kind, prior):
    lengths = [2, 6, 4]
    tensors, starts, longest = example(lengths)
    found = naive.transition_log_probs(*tensors, starts, longest, states_per_target=2, kind=kind, prior=PRIORS[prior])
    expected = torch.full_like(found, -math.inf)
    for b, length in enumerate(lengths):
        own = [tensor[starts[b] : starts[b + 1]] for tensor in tensors]
        for v in range(length):
            allowed = [u for u in range(v + 1, length) if kind != "sparse" or u // 2 == v // 2 + 1]
            for u in allowed:
                bias = [prior_score(PRIORS[prior], v, w, 2) for w in range(length)]
                value = 1 / len(allowed) if kind == "uniform" else transition_probability(*own, v, u, allowed, bias)
                expected[b, v, u] = math.log(value)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 if kind == "uniform" else 1e-13)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("lengths", BATCHES)
def test_equals_the_definition(kind, lengths, prior, monkeypatch):
    monkeypatch.setattr(torch_form, "BLOCK_ELEMENTS", 200)  # several parts even here
    tensors, starts, longest = example(lengths)
    out, expected = (
        run(*tensors, starts, longest, states_per_target=2, kind=kind, prior=PRIORS[prior])
        for run in (transition_log_probs, naive.transition_log_probs)
    )
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    cotangent = torch.randn_like(out)
    if not (out > -math.inf).any():
        return
    ours, theirs = (torch.autograd.grad(finite_sum(logs, cotangent), tensors) for logs in (out, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_uniform_equals_the_definition():
    arguments = (None, None, None, starts_of([5, 1, 3]), 6)
    out, expected = (
        run(*arguments, states_per_target=2, kind="uniform")
        for run in (transition_log_probs, naive.transition_log_probs)
    )
    assert torch.equal(out, expected)


@pytest.mark.parametrize(("kind", "prior"), [("dense", "none"), ("sparse", "none"), ("dense", "gaussian")])
def test_gradcheck(kind, prior):
    tensors, starts, longest = example([2, 6, 4])

    def finite(*x):
        out = transition_log_probs(*x, starts, longest, states_per_target=2, kind=kind, prior=PRIORS[prior])
        return out[out > -math.inf]

    assert torch.autograd.gradcheck(finite, tensors)


@pytest.mark.parametrize("kind", ["dense", "sparse", "uniform"])
def test_rows_are_distributions_over_allowed_transitions(kind):
    tensors, starts, longest = example([6, 4], dtype=torch.float32)
    inputs = (None, None, None) if kind == "uniform" else tensors
    probability = transition_log_probs(*inputs, starts, longest, states_per_target=2, kind=kind).exp()
    has_successor = {
        "dense": [[1] * 5 + [0], [1] * 3 + [0] * 3],
        "uniform": [[1] * 5 + [0], [1] * 3 + [0] * 3],
        "sparse": [[1] * 4 + [0] * 2, [1] * 2 + [0] * 4],
    }[kind]
    torch.testing.assert_close(probability.sum(-1), torch.tensor(has_successor, dtype=torch.float32))
    assert (probability.tril() == 0).all()
    if kind == "uniform":
        torch.testing.assert_close(probability[1, 0, :4], torch.tensor([0, 1, 1, 1]) / 3)
    if kind == "sparse":
        assert probability[0, 0].nonzero().flatten().tolist() == [2, 3]


@pytest.mark.parametrize("scale", [20.0, 200.0])
def test_large_scores(scale):
    """Log space: no transition between states of a sequence is lost, and nothing is NaN."""
    tensors, starts, longest = example([6, 8], dtype=torch.float32, scale=math.sqrt(scale))
    out = transition_log_probs(*tensors, starts, longest, states_per_target=2)
    order = torch.ones(8, 8).triu(1) > 0
    assert out[1][order].isfinite().all()
    grads = torch.autograd.grad(finite_sum(out, torch.ones_like(out)), tensors)
    assert all(grad.isfinite().all() for grad in grads)
    double = tuple(tensor.detach().double().requires_grad_() for tensor in tensors)
    exact = transition_log_probs(*double, starts, longest, states_per_target=2)
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-4)


def test_padding_states_and_other_sequences_of_the_batch():
    tensors, starts, longest = example([3, 5, 4], extra=4)
    with torch.no_grad():
        for tensor in tensors:
            tensor[12:] = math.nan
    out = transition_log_probs(*tensors, starts, longest, states_per_target=1)
    grads = torch.autograd.grad(finite_sum(out, torch.ones_like(out)), tensors)
    assert all((grad[12:] == 0).all() and grad.isfinite().all() for grad in grads)
    rows = torch.cat([torch.arange(8, 12), torch.arange(3)])  # the last and the first sequence only
    moved = transition_log_probs(*(tensor[rows] for tensor in tensors), starts_of([4, 3]), 4, states_per_target=1)
    torch.testing.assert_close(moved[0], out[2, :4, :4], rtol=0, atol=1e-14)
    torch.testing.assert_close(moved[1, :3, :3], out[0, :3, :3], rtol=0, atol=1e-14)


@pytest.mark.parametrize("case", golden_cases("links.npz"))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-6), (torch.float32, 2e-5)])
def test_golden(case, dtype, tolerance):
    """The authors' head at the expanded states. Their other rows (ordinary tokens, padding, the phantom copies of a
    last token, all without allowed successor) are not states here; with `max_transition_length=99999` the last state
    gets their lifted row, so it is left out there. Gradients are those of -1, which has no lifted rows."""
    case = Golden("links.npz").case(case)
    weights = {
        name.removeprefix("encoder."): torch.from_numpy(array).to(dtype).requires_grad_()
        for name, array in case.group("w/").items()
    }
    features = case.tensor("in/features", dtype).requires_grad_()
    inputs = features
    if case.settings["links_feature"] != "feature":
        inputs = torch.cat([features, case.tensor("out/link_pe", dtype)], dim=-1)
    heads, states = case.settings["heads"], case.tensor("in/is_ext_state")
    rows = inputs[states]
    project = lambda name: torch.nn.functional.linear(  # noqa: E731
        rows, weights[f"{name}_linear.weight"], weights[f"{name}_linear.bias"]
    )
    query, key = (project(name).unflatten(-1, (heads, -1)) for name in ("query", "key"))
    lengths = states.sum(1).tolist()
    out = transition_log_probs(
        query, key, project("gate"), starts_of(lengths), max(lengths), states_per_target=case.settings["k"]
    )

    total, cotangents = 0.0, case.tensor("in/cot", dtype)
    for b, length in enumerate(lengths):
        own = states[b].nonzero()[:, 0]
        for mode, count in (("m1", length), ("mx", length - 1)):
            expected = case.tensor(f"out/links_{mode}", torch.float64)[b][own][:, own]
            torch.testing.assert_close(out[b, :count, :length].double(), expected[:count], rtol=0, atol=tolerance)
        total = total + finite_sum(out[b, :length, :length], cotangents[b][own][:, own])
    total.backward()
    ours = {"features": features.grad} | {f"encoder.{name}": w.grad for name, w in weights.items()}
    for name, expected in case.group("grad_m1/").items():
        if "link_positional" in name or name.endswith("key_linear.bias"):
            continue  # the embedding belongs to the model; the gradient of the key bias is 0 but for noise
        expected = torch.from_numpy(expected).double()
        size = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(ours[name].double(), expected, rtol=0, atol=tolerance * size)


def test_the_prior_of_groups_changes_nothing_where_only_the_next_group_is_allowed():
    tensors, starts, longest = example([6, 4])
    plain, with_prior = (
        transition_log_probs(*tensors, starts, longest, states_per_target=2, kind="sparse", prior=prior)
        for prior in (None, PRIORS["group"])
    )
    assert torch.equal(plain, with_prior)


@pytest.mark.parametrize(
    ("name", "width", "floor", "word"),
    [("normal", 1.0, 8.0, "normal"), ("group", 0.0, 8.0, "0.0"), ("group", 1.0, math.inf, "inf")],
)
def test_a_prior_that_is_none_is_named(name, width, floor, word):
    with pytest.raises(ValueError, match=word):
        JumpPrior(name, width, floor)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"key": torch.zeros(6, 2, 8)}, ["[6, 2, 8]", "6, 2, 4"]),
        ({"gate": torch.zeros(6, 3)}, ["[6, 3]", "6, 2"]),
        ({"max_states": 3}, ["4", "3"]),
        ({"kind": "full"}, ["full", "dense"]),
        ({"states_per_target": 0}, ["0", "1"]),
        ({"query": None}, ["query"]),
        ({"kind": "uniform", "prior": PRIORS["group"]}, ["uniform", "prior"]),
    ],
)
def test_wrong_arguments_are_named(change, words):
    arguments = {
        "query": torch.zeros(6, 2, 4),
        "key": torch.zeros(6, 2, 4),
        "gate": torch.zeros(6, 2),
        "cu_states": torch.tensor([0, 4, 6]),
        "max_states": 4,
        "states_per_target": 2,
    } | change
    with pytest.raises(ValueError) as error:
        transition_log_probs(**arguments)
    assert all(word in str(error.value) for word in words)
