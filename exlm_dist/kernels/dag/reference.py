"""Definition of the likelihood over the state graph, its gradients, posteriors and best path, in log space.

Every alpha row is stored less its own maximum, so that only differences of neighbours are ever rounded to fp32; the
offsets add up in fp64. The backward pass walks the posteriors from the last target to the first: given the state of
target i, the probability of the state before it is a softmax whose denominator the forward pass has stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from exlm_dist.kernels.checks import work_dtype

NEVER = float("-inf")


@dataclass(frozen=True)
class _Graph:
    """A batch of graphs with what the recursions need to know of their sizes."""

    match: Tensor  # [B, N, L]
    moves: Tensor  # [B, L, L], -inf unless v < u
    num_targets: Tensor
    num_states: Tensor
    ends: int

    @classmethod
    def of(cls, match: Tensor, transitions: Tensor, num_targets: Tensor, num_states: Tensor, ends: int) -> _Graph:
        dtype = work_dtype(match)
        states = match.shape[2]
        place = torch.arange(states, device=match.device)
        moves = transitions.to(dtype).masked_fill(place[:, None] >= place, NEVER)
        return cls(match.to(dtype), moves, num_targets, num_states, ends)

    def band(self, i: int) -> Tensor:
        """[B, L] bool: states that target i can sit on, `i <= u <= L_b - N_b + i`; none for i >= N_b."""
        place = torch.arange(self.match.shape[2], device=self.match.device)
        last = (self.num_states - self.num_targets)[:, None] + i
        return (place >= i) & (place <= last) & (self.num_targets > i)[:, None]

    def finals(self) -> Tensor:
        """[B, L] bool: the last `ends` states of each sequence."""
        place = torch.arange(self.match.shape[2], device=self.match.device)
        stop = self.num_states[:, None]
        return (place < stop) & (place >= stop - self.ends)


@dataclass(frozen=True)
class _Alphas:
    """alpha [B, N, L] less `offsets` [B, N] (fp64), `arrivals` [B, N, L]: log-probability of coming to a state."""

    values: Tensor
    arrivals: Tensor
    offsets: Tensor


def dag_log_likelihood(
    match: Tensor, transitions: Tensor, num_targets: Tensor, num_states: Tensor, *, ends: int
) -> Tensor:
    """See `exlm_dist.kernels.dag.dag_log_likelihood`."""
    return _LogLikelihood.apply(match, transitions, num_targets, num_states, ends)


def dag_posteriors(
    match: Tensor, transitions: Tensor, num_targets: Tensor, num_states: Tensor, *, ends: int
) -> Tensor:
    """See `exlm_dist.kernels.dag.dag_posteriors`."""
    graph = _Graph.of(match, transitions, num_targets, num_states, ends)
    return _posteriors(graph, _forward(graph), None)


class _LogLikelihood(torch.autograd.Function):
    @staticmethod
    def forward(ctx, match, transitions, num_targets, num_states, ends):
        graph = _Graph.of(match, transitions, num_targets, num_states, ends)
        alphas = _forward(graph)
        ctx.save_for_backward(match, transitions, num_targets, num_states)
        ctx.ends, ctx.alphas = ends, alphas
        last = _last_row(graph, alphas)
        offset = alphas.offsets.gather(1, num_targets[:, None] - 1)[:, 0]
        return (torch.logsumexp(last, dim=1).double() + offset).to(last.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        match, transitions, num_targets, num_states = ctx.saved_tensors
        graph = _Graph.of(match, transitions, num_targets, num_states, ctx.ends)
        grad_moves = torch.zeros_like(graph.moves)
        gamma = _posteriors(graph, ctx.alphas, grad_moves)
        possible = gamma.sum((1, 2)) > 0
        scale = torch.where(possible, grad_out.to(gamma.dtype), 0)[:, None, None]
        return gamma.mul_(scale).to(match.dtype), grad_moves.mul_(scale).to(match.dtype), None, None, None


def _forward(graph: _Graph) -> _Alphas:
    """alpha[i, u] = match[i, u] + logsumexp_v(alpha[i-1, v] + moves[v, u]) for u in the band of i."""
    count, targets, states = graph.match.shape
    values = torch.full_like(graph.match, NEVER)
    arrivals = torch.full_like(graph.match, NEVER)
    offsets = torch.zeros((count, targets), dtype=torch.float64, device=graph.match.device)
    starts = min(graph.ends, states)
    arrivals[:, 0, :starts] = -torch.log(torch.tensor(float(graph.ends), dtype=graph.match.dtype)).item()
    for i in range(targets):
        if i:
            step = torch.logsumexp(values[:, i - 1, :, None] + graph.moves, dim=1)
            arrivals[:, i] = step
        alpha = (arrivals[:, i] + graph.match[:, i]).masked_fill_(~graph.band(i), NEVER)
        top = alpha.amax(1, keepdim=True)
        top = torch.where(top > NEVER, top, 0)
        values[:, i] = alpha - top
        offsets[:, i] = offsets[:, max(i - 1, 0)] + top[:, 0].double()
    return _Alphas(values, arrivals, offsets)


def _last_row(graph: _Graph, alphas: _Alphas) -> Tensor:
    """alpha of each sequence's last target at its final states, [B, L]."""
    index = (graph.num_targets - 1)[:, None, None].expand(-1, 1, graph.match.shape[2])
    return alphas.values.gather(1, index)[:, 0].masked_fill(~graph.finals(), NEVER)


def _posteriors(graph: _Graph, alphas: _Alphas, grad_moves: Tensor | None) -> Tensor:
    """gamma [B, N, L]; adds the expected number of times each move is made to `grad_moves` [B, L, L]."""
    targets = graph.match.shape[1]
    last = _last_row(graph, alphas)
    ending = torch.softmax(last, dim=1).masked_fill_(last == NEVER, 0)
    gamma = torch.zeros_like(graph.match)
    for i in range(targets - 1, -1, -1):
        gamma[:, i] += torch.where((graph.num_targets == i + 1)[:, None], ending, 0)
        if i == 0:
            break
        arrival = alphas.arrivals[:, i]
        arrival = torch.where(arrival == NEVER, -NEVER, arrival)  # unreachable: no weight, and no NaN
        came = (alphas.values[:, i - 1, :, None] + graph.moves).sub_(arrival[:, None]).exp_()
        came.mul_(gamma[:, i, None])
        gamma[:, i - 1] = came.sum(2)
        if grad_moves is not None:
            grad_moves += came
    return gamma


def dag_best_path(
    match: Tensor, transitions: Tensor, num_targets: Tensor, num_states: Tensor, *, ends: int
) -> tuple[Tensor, Tensor]:
    """See `exlm_dist.kernels.dag.dag_best_path`."""
    graph = _Graph.of(match, transitions, num_targets, num_states, ends)
    return _trace_back(graph, *_best_scores(graph))


def _best_scores(graph: _Graph) -> tuple[Tensor, Tensor]:
    """Score [B, N, L] of the best path to (target i, state u), and the state before it."""
    scores = torch.full_like(graph.match, NEVER)
    before = torch.zeros(graph.match.shape, dtype=torch.int64, device=graph.match.device)
    reach = torch.full_like(graph.match[:, 0], NEVER)
    reach[:, : graph.ends] = -torch.log(torch.tensor(float(graph.ends), dtype=reach.dtype))
    for i in range(graph.match.shape[1]):
        if i:
            reach, before[:, i] = (scores[:, i - 1, :, None] + graph.moves).max(dim=1)
        scores[:, i] = (reach + graph.match[:, i]).masked_fill(~graph.band(i), NEVER)
    return scores, before


def _trace_back(graph: _Graph, scores: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    count, targets, states = scores.shape
    index = (graph.num_targets - 1)[:, None, None].expand(-1, 1, states)
    score, end = scores.gather(1, index)[:, 0].masked_fill(~graph.finals(), NEVER).max(dim=1)
    path = torch.full((count, states + 1), -1, dtype=torch.int64, device=scores.device)  # the last column is waste
    state = end
    for i in range(targets - 1, -1, -1):
        active = (i < graph.num_targets) & (score > NEVER)
        state = torch.where(graph.num_targets == i + 1, end, state)
        path.scatter_(1, torch.where(active, state, states)[:, None], i)
        state = torch.where(active, before[:, i].gather(1, state[:, None])[:, 0], state)
    return path[:, :states], score
