"""Transition log-probabilities in plain torch: tuned, what a CPU runs. What it computes is defined in `naive.py`.

A few sequences at a time, with the gradients in closed form; nothing of [L, L, H] is stored.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from exlm_dist.kernels.checks import work_dtype
from exlm_dist.kernels.ragged import Segments
from exlm_dist.kernels.transitions.prior import JumpPrior

# Scores [sequences, H, L, L] in memory at a time, in elements.
BLOCK_ELEMENTS = 1 << 19
NEVER = float("-inf")


def transition_log_probs(
    query: Tensor, key: Tensor, gate: Tensor, cu_states: Tensor, max_states: int, *,
    states_per_target: int, sparse: bool, prior: JumpPrior | None,
) -> Tensor:  # fmt: skip
    """Dense or sparse log E; see `exlm_dist.kernels.transitions`."""
    group = states_per_target if sparse else None
    bias = prior and prior.bias(max_states, states_per_target, work_dtype(query), query.device)
    return _Transitions.apply(query, key, gate, cu_states, max_states, group, bias)


def uniform_log_probs(cu_states: Tensor, max_states: int) -> Tensor:
    """log 1/(number of later states of the own sequence), fp32 [B, max_states, max_states]."""
    segments = Segments.of(cu_states, max_states, max_states)
    allowed = _allowed(segments, None)
    return torch.where(allowed, -allowed.sum(-1, keepdim=True).float().log(), NEVER)


def _allowed(segments: Segments, group: int | None) -> Tensor:
    """[B, L, L] bool: may state u follow state v."""
    index = torch.arange(segments.longest, device=segments.valid.device)
    if group is None:
        order = index[:, None] < index
    else:
        order = index[:, None] // group + 1 == index // group
    return order & segments.valid[:, None, :] & segments.valid[:, :, None]


class _Transitions(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, gate, cu_states, max_states, group, bias):
        ctx.save_for_backward(query, key, gate, cu_states, bias)
        ctx.settings = (max_states, group)
        heads = query.shape[1]
        segments = Segments.of(cu_states, max_states, len(query))
        out = torch.empty((segments.count, max_states, max_states), dtype=work_dtype(query), device=query.device)
        for rows, part in _parts(segments, heads):
            log_heads, _, log_gate = _head_log_probs(query, key, gate, part, group, bias)
            out[rows] = torch.logsumexp(log_heads.add_(log_gate), dim=1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        query, key, gate, cu_states, bias = ctx.saved_tensors
        max_states, group = ctx.settings
        segments = Segments.of(cu_states, max_states, len(query))
        grads = [torch.zeros_like(tensor, dtype=work_dtype(query)) for tensor in (query, key, gate)]
        for rows, part in _parts(segments, query.shape[1]):
            for total, piece in zip(grads, _part_grads(query, key, gate, part, group, bias, grad_out[rows])):
                total += part.pack(piece, len(total))
        return *(grad.to(query.dtype) for grad in grads), None, None, None, None


def _parts(segments: Segments, heads: int) -> Iterator[tuple[slice, Segments]]:
    """Consecutive sequences whose scores fit in BLOCK_ELEMENTS."""
    step = max(1, BLOCK_ELEMENTS // max(1, heads * segments.longest**2))
    for first in range(0, segments.count, step):
        last = min(first + step, segments.count)
        yield slice(first, last), segments.part(first, last)


def _head_log_probs(
    query: Tensor, key: Tensor, gate: Tensor, part: Segments, group: int | None, bias: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """log p_h[v, u] as [b, H, L, L], the (query, key) it came from as [b, H, L, P], log-gates as [b, H, L, 1].

    bias [L, L] is added to the scores.
    """
    dtype = work_dtype(query)
    padded_query = part.pad(query).to(dtype).transpose(1, 2)
    padded_key = part.pad(key).to(dtype).transpose(1, 2)
    forbidden = ~_allowed(part, group)[:, None]
    scores = (padded_query @ padded_key.transpose(2, 3)).mul_(query.shape[-1] ** -0.5)
    if bias is not None:
        scores += bias
    log_heads = torch.log_softmax(scores.masked_fill_(forbidden, NEVER), dim=-1)
    log_heads.masked_fill_(forbidden, NEVER)  # the row of a state without successor came out as NaN
    log_gate = torch.log_softmax(part.pad(gate).to(dtype), dim=-1).transpose(1, 2)[..., None]
    return log_heads, (padded_query, padded_key), log_gate


def _part_grads(
    query: Tensor,
    key: Tensor,
    gate: Tensor,
    part: Segments,
    group: int | None,
    bias: Tensor | None,
    grad_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query and key [b, L, H, P] and gate [b, L, H] for the sequences of `part`."""
    log_heads, (padded_query, padded_key), log_gate = _head_log_probs(query, key, gate, part, group, bias)
    joint = log_heads + log_gate
    total = torch.logsumexp(joint, dim=1, keepdim=True)
    impossible = total == NEVER
    # The responsibility of each head for the transition v -> u, times the gradient; impossible ones have neither.
    weighted = joint.sub_(total).exp_().mul_(grad_out[:, None]).masked_fill_(impossible, 0)
    row_sums = weighted.sum(-1, keepdim=True)
    grad_scores = weighted.sub_(log_heads.exp_() * row_sums).mul_(query.shape[-1] ** -0.5)
    grad_query = (grad_scores @ padded_key).transpose(1, 2)
    grad_key = (grad_scores.transpose(2, 3) @ padded_query).transpose(1, 2)
    row_sums = row_sums[..., 0].transpose(1, 2)
    grad_gate = row_sums - torch.softmax(part.pad(gate).to(row_sums.dtype), dim=-1) * row_sums.sum(-1, keepdim=True)
    return grad_query, grad_key, grad_gate
