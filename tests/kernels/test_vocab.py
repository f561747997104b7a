"""Match scores, in plain torch, against their definition (`naive.py`) and the authors' values."""

from __future__ import annotations

import math

import pytest
import torch
from cases import starts_of
from golden import Golden, golden_cases

from exlm_dist.kernels import match_scores
from exlm_dist.kernels.vocab import naive
from exlm_dist.kernels.vocab import torch as torch_form


def example(states, targets, width=5, vocabulary=11, extra=2, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    shapes = [(sum(states) + extra, width), (vocabulary, width), (vocabulary,)]
    tensors = tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    ids = torch.randint(0, vocabulary, (sum(targets) + extra,))
    ids[1] = ids[0]  # a repeated target
    return tensors, (ids, starts_of(states), starts_of(targets), max(states), max(targets))


@pytest.fixture(params=["kept", "computed again", "both"])
def budget(request, monkeypatch):
    """Chunks of two rows, of which all, none or some are kept for the backward pass."""
    monkeypatch.setattr(torch_form, "CHUNK_ELEMENTS", 22)
    monkeypatch.setattr(torch_form, "KEEP_ELEMENTS", {"kept": 10**6, "computed again": 0, "both": 60}[request.param])


@pytest.mark.parametrize(("states", "targets"), [([4], [2]), ([2, 6, 4], [1, 3, 2]), ([3, 1], [3, 1])])
def test_equals_the_definition(budget, states, targets):
    tensors, sizes = example(states, targets)
    out, expected = match_scores(*tensors, *sizes), naive.match_scores(*tensors, *sizes)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    cotangent = torch.randn_like(out)
    finite = expected > -math.inf
    ours = torch.autograd.grad((out[finite] * cotangent[finite]).sum(), tensors, retain_graph=True)
    again = torch.autograd.grad((out[finite] * cotangent[finite]).sum(), tensors)
    theirs = torch.autograd.grad((expected[finite] * cotangent[finite]).sum(), tensors)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert all(torch.equal(first, second) for first, second in zip(ours, again))


def test_gradcheck(budget):
    tensors, sizes = example([4, 2], [2, 1])

    def finite(*x):
        out = match_scores(*x, *sizes)
        return out[out > -math.inf]

    assert torch.autograd.gradcheck(finite, tensors)


@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_float32_and_large_logits(scale):
    tensors, sizes = example([8, 4], [4, 2], dtype=torch.float32)
    scaled = (tensors[0] * scale, tensors[1], tensors[2])
    out = match_scores(*scaled, *sizes)
    exact = naive.match_scores(*(tensor.double() for tensor in scaled), *sizes)
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-5 * scale)
    grads = torch.autograd.grad(out[out > -math.inf].sum(), tensors)
    assert all(grad.isfinite().all() for grad in grads)


def test_order_and_other_sequences_of_the_batch_do_not_matter():
    tensors, sizes = example([2, 6, 4], [1, 3, 2], extra=0)
    out = match_scores(*tensors, *sizes)
    ids = sizes[0]
    rows = torch.cat([torch.arange(8, 12), torch.arange(2)])
    moved_ids = torch.cat([ids[4:6], ids[:1]])
    moved = match_scores(tensors[0][rows], *tensors[1:], moved_ids, starts_of([4, 2]), starts_of([2, 1]), 4, 2)
    torch.testing.assert_close(moved[0], out[2, :2, :4], rtol=0, atol=1e-13)
    torch.testing.assert_close(moved[1, :1, :2], out[0, :1, :2], rtol=0, atol=1e-13)


def test_rows_of_no_sequence_get_no_gradient():
    tensors, sizes = example([4, 2], [2, 1], extra=3)
    out = match_scores(*tensors, *sizes)
    grad = torch.autograd.grad(out[out > -math.inf].sum(), tensors[0])[0]
    assert (grad[6:] == 0).all() and (grad[:6] != 0).any()


@pytest.mark.parametrize("case", golden_cases("gather.npz"))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden(case, dtype):
    """Their op takes logits: here hidden = logits, weight = identity, so both gradients are the same thing."""
    case = Golden("gather.npz").case(case)
    logits = case.tensor("in/logits", dtype)
    count, length, vocabulary = logits.shape
    hidden = logits.flatten(0, 1).requires_grad_()
    ids = case.tensor("in/targets")
    targets = ids.shape[1]
    out = match_scores(
        hidden,
        torch.eye(vocabulary, dtype=dtype),
        torch.zeros(vocabulary, dtype=dtype),
        ids.flatten(),
        starts_of([length] * count),
        starts_of([targets] * count),
        length,
        targets,
    )
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5 * max(1.0, case.settings["scale"] / 10)
    torch.testing.assert_close(
        out.double(), case.tensor("out/match_all", torch.float64), rtol=0, atol=max(tolerance, 1e-9)
    )
    (out * case.tensor("in/cot", dtype)).sum().backward()
    expected = case.tensor("grad/logits", torch.float64).flatten(0, 1)
    torch.testing.assert_close(hidden.grad.double(), expected, rtol=0, atol=4e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": torch.zeros(9, 4)}, ["[9, 4]", "5"]),
        ({"bias": torch.zeros(8)}, ["[8]", "9"]),
        ({"target_ids": torch.zeros(3)}, ["int64", "float32"]),
        ({"max_targets": 1}, ["2", "1"]),
        ({"cu_targets": torch.tensor([0, 3])}, ["2", "1"]),
    ],
)
def test_wrong_arguments_are_named(change, words):
    arguments = {
        "hidden": torch.zeros(6, 5),
        "weight": torch.zeros(9, 5),
        "bias": torch.zeros(9),
        "target_ids": torch.zeros(3, dtype=torch.int64),
        "cu_states": torch.tensor([0, 4, 6]),
        "cu_targets": torch.tensor([0, 2, 3]),
        "max_states": 4,
        "max_targets": 3,
    } | change
    with pytest.raises(ValueError) as error:
        match_scores(**arguments)
    assert all(word in str(error.value) for word in words)
