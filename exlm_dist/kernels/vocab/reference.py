"""Definition of `match_scores` in torch: logits of a chunk of rows at a time, made again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from exlm_dist.kernels.checks import work_dtype
from exlm_dist.kernels.ragged import Segments

# Logits [rows, V] held at a time, in elements.
CHUNK_ELEMENTS = 1 << 21


def match_scores(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target_ids: Tensor,
    cu_states: Tensor,
    cu_targets: Tensor,
    max_states: int,
    max_targets: int,
) -> Tensor:
    """See `exlm_dist.kernels.vocab.match_scores`."""
    states = Segments.of(cu_states, max_states, len(hidden))
    targets = Segments.of(cu_targets, max_targets, len(target_ids))
    ids = target_ids[targets.rows]  # [B, N]; a repeated own target past the own end, masked below
    own = states.pack(ids[:, None].expand(-1, max_states, -1), len(hidden))
    scores = states.pad(_TargetScores.apply(hidden, weight, bias, own)).transpose(1, 2)
    inside = targets.valid[:, :, None] & states.valid[:, None, :]
    return torch.where(inside, scores, float("-inf"))


class _TargetScores(torch.autograd.Function):
    """log-softmax of the logits of each row at the columns `ids` [S, N] of that row."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids):
        dtype = work_dtype(hidden)
        scores = torch.empty(ids.shape, dtype=dtype, device=hidden.device)
        log_total = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        for rows, logits in _logit_chunks(hidden, weight, bias):
            scores[rows] = logits.gather(1, ids[rows])
            top = logits.amax(1, keepdim=True)
            log_total[rows] = logits.sub_(top).exp_().sum(1).log_().add_(top[:, 0])
        ctx.save_for_backward(hidden, weight, bias, ids, log_total)
        return scores.sub_(log_total[:, None])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_scores):
        hidden, weight, bias, ids, log_total = ctx.saved_tensors
        dtype = work_dtype(hidden)
        matrix = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(matrix)
        grad_bias = torch.zeros_like(bias, dtype=dtype)
        mass = grad_scores.sum(1, keepdim=True).neg_()
        for rows, logits in _logit_chunks(hidden, weight, bias):
            grad = logits.sub_(log_total[rows, None]).exp_().mul_(mass[rows])
            grad.scatter_add_(1, ids[rows], grad_scores[rows])
            grad_hidden[rows] = (grad @ matrix).to(hidden.dtype)
            grad_weight.addmm_(grad.t(), hidden[rows].to(dtype))
            grad_bias += grad.sum(0)
        return grad_hidden, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), None


def _logit_chunks(hidden: Tensor, weight: Tensor, bias: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, logits [rows, V]) through all rows; each yielded buffer is overwritten by the next."""
    dtype = work_dtype(hidden)
    matrix, offset = weight.to(dtype).t(), bias.to(dtype)
    step = max(1, CHUNK_ELEMENTS // len(weight))
    buffer = torch.empty((min(step, len(hidden)), len(weight)), dtype=dtype, device=hidden.device)
    for first in range(0, len(hidden), step):
        rows = slice(first, min(first + step, len(hidden)))
        logits = buffer[: rows.stop - rows.start]
        torch.addmm(offset, hidden[rows].to(dtype), matrix, out=logits)
        yield rows, logits
