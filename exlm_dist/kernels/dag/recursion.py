"""The forward recursion over the graph and the walk back through the posteriors.

Both exist in log space and with plain probabilities (matrix products, several times faster), in fp64. A sequence takes
the second form only where it loses nothing. Rows of probabilities have maximum 1 and are stored times e^SHIFT, so terms
below e^-1008 are dropped. If no transition is less likely than e^LEAST_TRANSITION, and every state of the band is
reached with more than e^LEAST_ARRIVAL, then no transition underflows, what is dropped is less than L * e^-400 of any
state, and nothing overflows. All other sequences (unreachable states, very unequal scores) take the first form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from exlm_dist.kernels.dag.graph import NEVER, Alphas, Graph

SHIFT = 300.0
LEAST_TRANSITION = -300.0
LEAST_ARRIVAL = -600.0


def forward(graph: Graph) -> Alphas:
    """alpha[i, u] = match[i, u] + logsumexp_v(alpha[i-1, v] + transitions[v, u]) for u in the band of i."""
    if graph.match.device.type != "cpu":  # choosing a form per sequence would wait for the device
        return _forward(graph, linear=False)
    alphas = _forward(graph, linear=True)
    slow = (~alphas.linear).nonzero()[:, 0]
    if len(slow):
        exact = _forward(graph.take(slow), linear=False)
        for name in ("values", "arrivals"):
            getattr(alphas, name)[slow] = getattr(exact, name)
    return alphas


def walk_back(graph: Graph, alphas: Alphas) -> tuple[Tensor, Tensor]:
    """(gamma [B, N, L], expected number of times that each transition is taken [B, L, L])."""
    if graph.match.device.type != "cpu" or not bool(alphas.linear.any()):
        return _walk_back_log(graph, alphas)
    if bool(alphas.linear.all()):
        return _walk_back_linear(graph, alphas)
    gamma, taken = torch.empty_like(graph.match), torch.empty_like(graph.transitions)
    for chosen, walk in ((alphas.linear, _walk_back_linear), (~alphas.linear, _walk_back_log)):
        index = chosen.nonzero()[:, 0]
        part = Alphas(alphas.values[index], alphas.arrivals[index], chosen[index])
        gamma[index], taken[index] = walk(graph.take(index), part)
    return gamma, taken


def _forward(graph: Graph, linear: bool) -> Alphas:
    values = torch.full(graph.match.shape, NEVER, dtype=torch.float64, device=graph.match.device)
    arrivals = torch.full_like(values, NEVER)
    good, transitions = torch.zeros_like(graph.num_targets, dtype=torch.bool), graph.transitions
    if linear:
        good, transitions = graph.least_transition() > LEAST_TRANSITION, torch.exp(transitions.double())
    arrivals[:, 0] = graph.starts()
    for i in range(graph.match.shape[1]):
        band = graph.band(i)
        if i:
            before, here = graph.window(i - 1), graph.window(i)
            row, top = _normalised(values[:, i - 1, before])
            step = _step_linear if linear else _step_log
            arrival = step(row, transitions[:, before, here])
            good &= ((arrival > LEAST_ARRIVAL) | ~band[:, here]).all(1)
            arrivals[:, i, here] = arrival + top
        values[:, i] = (arrivals[:, i] + graph.match[:, i]).masked_fill_(~band, NEVER)
    return Alphas(values, arrivals, good)


def _normalised(row: Tensor) -> tuple[Tensor, Tensor]:
    """`row` [B, W] minus its maximum, and the maximum [B, 1] (0 where everything is impossible)."""
    top = row.amax(1, keepdim=True)
    top = torch.where(top > NEVER, top, 0)
    return row - top, top


def _step_log(row: Tensor, transitions: Tensor) -> Tensor:
    return torch.logsumexp(row.to(transitions.dtype)[:, :, None] + transitions, dim=1).double()


def _step_linear(row: Tensor, transitions: Tensor) -> Tensor:
    return torch.bmm((row + SHIFT).exp_()[:, None], transitions)[:, 0].log_().sub_(SHIFT)


def _ending(graph: Graph, alphas: Alphas) -> Tensor:
    """Posterior [B, L] of the state that a path stops at; 0 in a sequence without a path."""
    last = graph.last(alphas.values)
    return torch.softmax(last, dim=1).masked_fill_(last == NEVER, 0)


def _walk_back_log(graph: Graph, alphas: Alphas) -> tuple[Tensor, Tensor]:
    """Given the state of target i, the state before it is a softmax whose denominator is `arrivals`."""
    dtype = graph.transitions.dtype
    ending = _ending(graph, alphas).to(dtype)
    gamma, taken = torch.zeros_like(graph.match), torch.zeros_like(graph.transitions)
    for i in range(graph.match.shape[1] - 1, -1, -1):
        gamma[:, i] += torch.where((graph.num_targets == i + 1)[:, None], ending, 0)
        if i == 0:
            break
        before, here = graph.window(i - 1), graph.window(i)
        row, top = _normalised(alphas.values[:, i - 1, before])
        arrival = alphas.arrivals[:, i, here]
        arrival = torch.where(arrival == NEVER, -NEVER, arrival - top)  # unreachable: neither weight nor NaN
        joint = row.to(dtype)[:, :, None] + graph.transitions[:, before, here]
        joint = joint.sub_(arrival.to(dtype)[:, None]).exp_().mul_(gamma[:, i, None, here])
        gamma[:, i - 1, before] = joint.sum(2)
        taken[:, before, here] += joint
    return gamma, taken


def _walk_back_linear(graph: Graph, alphas: Alphas) -> tuple[Tensor, Tensor]:
    """The same with plain probabilities: how often transitions are taken is one matrix product over the targets."""
    ending, transitions = _ending(graph, alphas), torch.exp(graph.transitions.double())
    gamma, ratio = torch.zeros_like(alphas.values), torch.zeros_like(alphas.values)
    row, top = _normalised(alphas.values.flatten(0, 1))
    weight, top = (row + SHIFT).exp_().view_as(gamma), top.unflatten(0, gamma.shape[:2])
    for i in range(gamma.shape[1] - 1, -1, -1):
        gamma[:, i] += torch.where((graph.num_targets == i + 1)[:, None], ending, 0)
        if i == 0:
            break
        before, here = graph.window(i - 1), graph.window(i)
        inverse = (top[:, i - 1] - alphas.arrivals[:, i, here]).sub_(SHIFT).exp_()
        ratio[:, i, here] = torch.where(gamma[:, i, here] > 0, gamma[:, i, here] * inverse, 0)
        spread = torch.bmm(ratio[:, i, None, here], transitions[:, before, here].mT)[:, 0]
        gamma[:, i - 1, before] = weight[:, i - 1, before] * spread
    taken = transitions.mul_(torch.bmm(weight[:, :-1].mT, ratio[:, 1:]))
    return gamma.to(graph.match.dtype), taken.to(graph.transitions.dtype)
