"""`match_scores` tuned in plain torch, what a CPU runs: logits of a chunk of rows at a time. (The definition is
`naive.py`.)

The first chunks are kept for the backward pass, up to a fixed budget; those of the other rows are computed again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from exlm_dist.config.vocab_tiles import CHUNK_ELEMENTS, KEEP_ELEMENTS
from exlm_dist.kernels.checks import work_dtype
from exlm_dist.kernels.linear import add_product, product
from exlm_dist.kernels.ragged import Segments
from exlm_dist.kernels.vocab.shard import VocabShard


def match_scores(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target_ids: Tensor,
    cu_states: Tensor,
    cu_targets: Tensor,
    max_states: int,
    max_targets: int,
    *,
    shard: VocabShard | None,
) -> Tensor:
    """See `exlm_dist.kernels.vocab.match_scores`."""
    states = Segments.of(cu_states, max_states, len(hidden))
    targets = Segments.of(cu_targets, max_targets, len(target_ids))
    ids = target_ids[targets.rows]  # [B, N]; past a sequence's end its first target, masked below
    own = states.pack(ids[:, None].expand(-1, max_states, -1), len(hidden))
    scores = states.pad(_TargetScores.apply(hidden, weight, bias, own, shard)).transpose(1, 2)
    inside = targets.valid[:, :, None] & states.valid[:, None, :]
    return torch.where(inside, scores, float("-inf"))


class _TargetScores(torch.autograd.Function):
    """log-softmax of the logits of each row at the columns `ids` [S, N] of that row."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, shard):
        is_local = None
        if shard:
            ids = ids - shard.first_token
            is_local = (ids >= 0) & (ids < len(weight))
            ids = ids.where(is_local, 0)
        dtype = work_dtype(hidden)
        scores = torch.empty(ids.shape, dtype=dtype, device=hidden.device)
        tops, sums = scores.new_empty((2, len(hidden), 1))
        inputs, matrix = _with_bias(hidden, weight, bias, dtype)
        ctx.kept = {}
        for rows in _chunks(len(hidden), len(weight)):
            logits = product(inputs[rows], matrix.t())
            torch.amax(logits, 1, keepdim=True, out=tops[rows])
            scores[rows] = logits.gather(1, ids[rows])
            torch.sum(logits.sub_(tops[rows]).exp_(), 1, keepdim=True, out=sums[rows])
            if any(ctx.needs_input_grad) and rows.stop * len(weight) <= KEEP_ELEMENTS:
                ctx.kept[rows.start] = logits
        lse = tops + sums.log()
        if shard:
            lse = shard.all_reduce_lse(lse[:, 0])[:, None]
            scores = shard.all_reduce_sum(scores.masked_fill_(~is_local, 0))
            sums = (lse - tops).exp_()
        ctx.save_for_backward(hidden, weight, bias, ids, tops, sums, is_local)
        return scores.sub_(lse)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_scores):
        hidden, weight, bias, ids, tops, sums, is_local = ctx.saved_tensors
        dtype = work_dtype(hidden)
        inputs, matrix = _with_bias(hidden, weight, bias, dtype)
        weight_alone, grad_hidden = weight.to(dtype), torch.empty_like(hidden)
        grad_matrix = matrix.new_zeros(matrix.shape[::-1])
        factor = grad_scores.sum(1, keepdim=True).neg_().div_(sums)  # of exp(logit - top) in the gradient of a logit
        if is_local is not None:
            grad_scores = grad_scores.masked_fill(~is_local, 0)
        for rows in _chunks(len(hidden), len(weight)):
            grad = ctx.kept.pop(rows.start, None)
            if grad is None:
                grad = product(inputs[rows], matrix.t()).sub_(tops[rows]).exp_()
            grad.mul_(factor[rows]).scatter_add_(1, ids[rows], grad_scores[rows])
            grad_hidden[rows] = product(grad, weight_alone).to(hidden.dtype)
            grad_matrix = add_product(grad_matrix, inputs[rows].t(), grad)
        grad_weight, grad_bias = grad_matrix[:-1].t().to(weight.dtype), grad_matrix[-1].to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None


def _with_bias(hidden: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """hidden and weight with one more column, 1 and the bias: the products add and differentiate it for nothing."""
    return F.pad(hidden.to(dtype), (0, 1), value=1.0), torch.cat([weight.to(dtype), bias.to(dtype)[:, None]], 1)


def _chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    """Slices of rows whose logits fit in CHUNK_ELEMENTS."""
    step = max(1, CHUNK_ELEMENTS // vocabulary)
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))
