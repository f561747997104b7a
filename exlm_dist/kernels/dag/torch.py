"""Likelihood over the state graph, its gradients, posteriors and best path in plain torch: tuned, what a CPU runs.

What it computes is defined in `naive.py`. Batched; nothing of [N, L, L] is stored; gradients come from the posteriors.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from exlm_dist.kernels.dag.graph import NEVER, Alphas, Graph
from exlm_dist.kernels.dag.recursion import forward, walk_back


def dag_log_likelihood(
    match: Tensor, transitions: Tensor, num_targets: Tensor, num_states: Tensor, *, ends: int
) -> Tensor:
    """See `exlm_dist.kernels.dag.dag_log_likelihood`."""
    return _LogLikelihood.apply(match, transitions, num_targets, num_states, ends)


def dag_posteriors(match: Tensor, transitions: Tensor, num_targets: Tensor, num_states: Tensor, *, ends: int) -> Tensor:
    """See `exlm_dist.kernels.dag.dag_posteriors`."""
    graph = Graph.of(match, transitions, num_targets, num_states, ends)
    return walk_back(graph, forward(graph))[0]


class _LogLikelihood(torch.autograd.Function):
    @staticmethod
    def forward(ctx, match, transitions, num_targets, num_states, ends):
        graph = Graph.of(match, transitions, num_targets, num_states, ends)
        alphas = forward(graph)
        ctx.ends = ends
        variables = alphas.values, alphas.arrivals, alphas.linear
        ctx.save_for_backward(match, transitions, num_targets, num_states, *variables)
        return torch.logsumexp(graph.last(alphas.values), dim=1).to(graph.match.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        match, transitions, num_targets, num_states, *variables = ctx.saved_tensors
        graph = Graph.of(match, transitions, num_targets, num_states, ctx.ends)
        gamma, taken = walk_back(graph, Alphas(*variables))
        possible = gamma.sum((1, 2)) > 0
        scale = torch.where(possible, grad_out, 0)[:, None, None]
        return gamma.mul_(scale).to(match.dtype), taken.mul_(scale).to(match.dtype), None, None, None


def dag_best_path(
    match: Tensor, transitions: Tensor, num_targets: Tensor, num_states: Tensor, *, ends: int
) -> tuple[Tensor, Tensor]:
    """See `exlm_dist.kernels.dag.dag_best_path`."""
    graph = Graph.of(match, transitions, num_targets, num_states, ends)
    return _trace_back(graph, *_best_scores(graph))


def _best_scores(graph: Graph) -> tuple[Tensor, Tensor]:
    """Score [B, N, L] (fp64) of the best path to (target i, state u), and the state before it."""
    scores = torch.full(graph.match.shape, NEVER, dtype=torch.float64, device=graph.match.device)
    before = torch.zeros(graph.match.shape, dtype=torch.int64, device=graph.match.device)
    reach = graph.starts().double()
    for i in range(graph.match.shape[1]):
        if i:
            reach, before[:, i] = (scores[:, i - 1, :, None] + graph.transitions).max(dim=1)
        scores[:, i] = (reach + graph.match[:, i]).masked_fill(~graph.band(i), NEVER)
    return scores, before


def _trace_back(graph: Graph, scores: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """(path [B, L], score [B]) from the scores and the states before."""
    count, targets, states = scores.shape
    score, end = graph.last(scores).max(dim=1)
    path = torch.full((count, states + 1), -1, dtype=torch.int64, device=scores.device)  # the last column is discarded
    state = end
    for i in range(targets - 1, -1, -1):
        active = (i < graph.num_targets) & (score > NEVER)
        state = torch.where(graph.num_targets == i + 1, end, state)
        path.scatter_(1, torch.where(active, state, states)[:, None], i)
        state = torch.where(active, before[:, i].gather(1, state[:, None])[:, 0], state)
    return path[:, :states], score.to(graph.match.dtype)
