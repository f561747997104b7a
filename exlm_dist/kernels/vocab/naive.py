"""The definition of `match_scores`: all logits of a sequence's states, log-softmax, gather; gradients by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


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
    """match[b, i, u] = log softmax(weight @ hidden_u + bias)[y_i] for target i and state u of sequence b.

    hidden [S, D]; weight [V, D]; bias [V]; target_ids (y) [N] int64. Sequence b owns states cu_states[b]:cu_states[b+1]
    and targets cu_targets[b]:cu_targets[b+1]. Returns [B, max_targets, max_states] in the type of hidden; -inf outside
    a sequence's own targets and states.
    Source: ExLM (arXiv 2501.13397) section 3, P(y_i | state u).
    """
    match = hidden.new_full((len(cu_states) - 1, max_targets, max_states), float("-inf"))
    for b in range(len(match)):
        states = hidden[cu_states[b] : cu_states[b + 1]]
        targets = target_ids[cu_targets[b] : cu_targets[b + 1]]
        log_probs = torch.log_softmax(states @ weight.t() + bias, dim=-1)
        match[b, : len(targets), : len(states)] = log_probs[:, targets].t()
    return match
