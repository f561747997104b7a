"""State-graph likelihood, forward and backward, and the recursion written in torch with autograd (compacted states).

With few sequences either side waits for the host, which launches hundreds of small kernels for the recursion; both are
therefore also timed as replays of a CUDA graph, where only the GPU counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from timing import Case
from torch import Tensor

from exlm_dist.kernels.dag import dag_log_likelihood

UNREACHED = -1e4  # instead of -inf, whose gradient through torch.logsumexp is NaN


def cases(device: torch.device, toy: bool) -> Iterator[Case]:
    """S=128 and S=512 at k=4: 64 sequences, and as many as in a step of `step.py`."""
    for count, targets in ((2, 3),) if toy else ((64, 21), (512, 21), (64, 78), (128, 78)):
        yield from _Graphs(count, targets, 4 * targets, device).cases()


class _Graphs:
    """Random graphs with every forward transition, and the sides that work on them."""

    def __init__(self, count: int, targets: int, states: int, device: torch.device) -> None:
        torch.manual_seed(0)
        match = torch.randn(count, targets, states, device=device).mul(2).log_softmax(1) - 3
        forward = torch.ones(states, states, dtype=torch.bool, device=device).triu(1)
        transitions = torch.randn(count, states, states, device=device).masked_fill(~forward, UNREACHED).log_softmax(-1)
        self.inputs = [match.requires_grad_(), transitions.masked_fill(~forward, UNREACHED).requires_grad_()]
        self.sizes = [torch.full((count,), size, device=device) for size in (targets, states)]
        self.grad = torch.rand(count, device=device) + 0.5
        self.shape = f"B={count}, N={targets}, L={states}"
        self.wanted: list[Tensor] | None = None

    def cases(self) -> Iterator[Case]:
        """As called, and replayed from a graph where there is CUDA."""
        backend = "auto" if self.grad.device.type == "cuda" else "torch"
        sides = {
            "ours": lambda: self._whole(dag_log_likelihood(*self.inputs, *self.sizes, backend=backend)),
            "plain torch": lambda: self._whole(dag_log_likelihood(*self.inputs, *self.sizes, backend="torch")),
            "torch recursion": lambda: self._whole(_recursion(*self.inputs)),
        }
        yield self._case("as called", sides, sides)
        if self.grad.device.type == "cuda":
            replays = {name: _captured(sides[name]) for name in ("ours", "torch recursion")}
            yield self._case("replayed", replays, sides)

    def _case(self, how: str, runs: dict[str, Callable], sides: dict[str, Callable]) -> Case:
        return Case("dag", f"{how}, {self.shape}", "ours", runs, lambda name: self._error(sides[name]()), 1e-3, 20, 100)

    def _whole(self, value: Tensor) -> list[Tensor]:
        return [value, *torch.autograd.grad(value, self.inputs, self.grad)]

    def _error(self, found: list[Tensor]) -> float:
        """Largest difference of a posterior (gradient over incoming gradient) from fp64."""
        if self.wanted is None:
            inputs = [tensor.detach().double().requires_grad_() for tensor in self.inputs]
            value = dag_log_likelihood(*inputs, *self.sizes, backend="torch")
            self.wanted = torch.autograd.grad(value, inputs, self.grad.double())
        scale = self.grad.double()[:, None, None]
        return max(float(((got - want) / scale).abs().max()) for got, want in zip(found[1:], self.wanted))


def _recursion(match: Tensor, transitions: Tensor) -> Tensor:
    """log-likelihood [B]: one step per target over all transitions; sequences of equal length."""
    alpha = torch.full_like(match[:, 0], UNREACHED)
    alpha[:, 0] = match[:, 0, 0]
    for row in match[:, 1:].unbind(1):
        alpha = torch.logsumexp(alpha[:, :, None] + transitions, 1) + row
    return alpha[:, -1]


def _captured(run: Callable[[], object]) -> Callable[[], None]:
    """`run` as the replay of a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
