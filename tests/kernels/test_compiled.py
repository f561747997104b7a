"""The tiles that ship, in bf16, at lengths of every range: on a GPU, or run from their PTX (EXLM_EMULATE, tests/ptx).

The interpreter cannot do this: its products of bf16 are wrong, and it knows no warps.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from cases import random_graph, starts_of
from packed import make_batch
from test_attention_triton import BOUNDS, DEVICE, Problem, masked_attention
from test_dag_triton import agree as graph_agrees
from test_elementwise_triton import gelu_case, gelu_results
from test_transitions_triton import agree as transitions_agree
from test_transitions_triton import make
from test_vocab_triton import Case
from test_vocab_triton import agree as match_agrees

from exlm_dist.config.schema import ModelConfig
from exlm_dist.kernels import transition_log_probs
from exlm_dist.kernels.elementwise import naive
from exlm_dist.model.build import build_model
from exlm_dist.model.objective import loss_sum
from exlm_dist.model.stream import Stream

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") == "1", reason="for compiled kernels: a GPU, or EXLM_EMULATE=80 or 90"
)
BF16 = torch.bfloat16


@pytest.mark.parametrize("lengths", [[1, 63, 64, 65, 128], [191, 129], [257, 256]], ids=["short", "middle", "long"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_attention(lengths: list[int], dropout: float) -> None:
    case = Problem(lengths, width=64, dtype=BF16)
    if not dropout:
        return case.check()
    for got, want in zip(case.run(dropout=dropout, seed=5), masked_attention(case, dropout, 5)):
        assert float((got - want).norm() / want.norm()) < BOUNDS[BF16]


@pytest.mark.parametrize("width", [32, 96, 128])
def test_attention_of_other_widths(width: int) -> None:
    Problem([70, 130], width=width, dtype=BF16).check()


@pytest.mark.parametrize("targets, kind, ends", [([21, 2], "dense", 1), ([21, 2], "sparse", 4), ([40], "dense", 1)])
def test_state_graph(targets: list[int], kind: str, ends: int) -> None:
    graph_agrees(random_graph(targets, [4 * n for n in targets], seed=9, kind=kind), ends=ends)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize(
    "lengths, width, heads", [([83, 4], 64, 2), ([84], 64, 2), ([139], 64, 2), ([129], 64, 3), ([20], 128, 2)]
)
def test_transitions(lengths: list[int], width: int, heads: int, kind: str) -> None:
    """One state more than the longest sequence has: rows of 84, 85, 140, 130 and 21 transitions."""
    transitions_agree(make(lengths, heads, width, seed=4), lengths, 4, kind, BF16, 6e-3)


@pytest.mark.parametrize("lengths, prior", [([83, 4], "group"), ([139], "group"), ([84], "gaussian")])
def test_transitions_with_a_prior(lengths: list[int], prior: str) -> None:
    transitions_agree(make(lengths, 2, 64, seed=4), lengths, 4, "dense", BF16, 6e-3, prior)


def test_transitions_too_unlikely_for_probabilities() -> None:
    lengths = [39]
    ours = transitions_agree(make(lengths, 2, 64, seed=5, scale=30.0), lengths, 4, "dense", BF16, 6e-3)
    allowed = ours[0][ours[0].isfinite()]
    assert allowed.min() < math.log(2.0**-149) and allowed.max() > -1


def test_transitions_do_not_depend_on_other_sequences_of_the_batch() -> None:
    """Their rows of transitions have another length, so they are read in other words."""
    lengths = [44, 83]
    inputs = make(lengths, 2, 64, seed=6, padding=0)
    leaves = [tensor.to(DEVICE, BF16).requires_grad_() for tensor in inputs]
    grad = torch.rand(2, 84, 84, device=DEVICE)
    both = transition_log_probs(*leaves, starts_of(lengths).to(DEVICE), 84, states_per_target=4, backend="triton")
    both.backward(grad)
    alone = [tensor[:44].to(DEVICE, BF16).requires_grad_() for tensor in inputs]
    one = transition_log_probs(*alone, starts_of([44]).to(DEVICE), 45, states_per_target=4, backend="triton")
    one.backward(grad[:1, :45, :45])
    assert torch.equal(one[0, :44, :44], both[0, :44, :44])
    assert all(torch.equal(a.grad, b.grad[:44]) for a, b in zip(alone, leaves, strict=True))


def test_vocabulary() -> None:
    match_agrees(Case.make([21, 2], 4, 128, 300, seed=5), BF16, 8e-3)


def test_gelu_gradient() -> None:
    x, grad = gelu_case(70, 520, BF16)
    for ours, other, true in zip(
        gelu_results(x, grad, "triton"),
        gelu_results(x, grad, "torch"),
        naive.gelu_gradient(grad.double(), x.double()),
    ):
        error, bound = ((value.double() - true).abs().max() for value in (ours, other))
        assert error <= bound + 4 * torch.finfo(BF16).eps * true.abs().max()


def test_a_step_of_the_whole_model() -> None:
    """Loss and every gradient: little further from fp64 than plain torch in bf16 is."""
    sizes = {"layers": 2, "width": 64, "heads": 2, "ffn": 96, "max_positions": 128, "init_std": 0.2}
    config = ModelConfig(**sizes, states=4, jump_prior="group", dropout=0.0, attention_dropout=0.0)
    batch = make_batch([20, 61, 34], states=4, anchors=True, vocab_size=70)

    def step(backend: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        model = build_model(config, 70, seed=1, kernel_backend=backend).to(DEVICE, dtype).train()
        loss, invalid = loss_sum(model(Stream.from_batch(batch, DEVICE)), "sequence")
        assert not invalid.any()
        loss.backward()
        return {"loss": loss.detach().double()} | {n: p.grad.double() for n, p in model.named_parameters()}

    exact, plain, ours = step("torch", torch.float64), step("torch", BF16), step("triton", BF16)
    for name, wanted in exact.items():
        size = float(wanted.norm())
        error, other = (float((found[name] - wanted).norm()) for found in (ours, plain))
        assert error <= 1.5 * other + 0.01 * size, (name, error / size, other / size)
