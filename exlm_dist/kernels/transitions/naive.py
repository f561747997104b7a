"""The definition of the transition log-probabilities: one sequence after the other, every score stored.

`torch.py` and `triton/` compute the same faster and are tested against this.
Sources: ExLM (arXiv 2501.13397), DA-Transformer (arXiv 2205.07459) section 3.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from exlm_dist.kernels.transitions.prior import JumpPrior


def transition_log_probs(
    query: Tensor | None,
    key: Tensor | None,
    gate: Tensor | None,
    cu_states: Tensor,
    max_states: int,
    *,
    states_per_target: int,
    kind: str = "dense",
    prior: JumpPrior | None = None,
) -> Tensor:
    """log E [B, max_states, max_states], E[v, u] = sum_h softmax_h(gate[v]) softmax_u(q_h[v].k_h[u] / sqrt(P) + prior).

    query, key [S, H, P]; gate [S, H]; cu_states [B+1]. From v every later state u of the sequence is allowed ("dense"
    and "uniform"), or those of the next group of `states_per_target` ("sparse"); log E is -inf elsewhere. "uniform":
    all that is allowed is equally probable, and query, key, gate and prior are not read. In the type of the inputs.
    """
    squares = []
    for begin, end in pairwise(cu_states.tolist()):
        index = torch.arange(end - begin, device=cu_states.device)
        allowed = index[:, None] < index
        if kind == "sparse":
            allowed = index[:, None] // states_per_target + 1 == index // states_per_target
        if kind == "uniform":
            log_e = -allowed.sum(1, keepdim=True).log().expand_as(allowed)
        else:
            bias = 0.0 if prior is None else prior.bias(end - begin, states_per_target, query.dtype, query.device)
            log_e = _mixture(query[begin:end], key[begin:end], gate[begin:end], bias, allowed)
        missing = max_states - (end - begin)
        squares.append(pad(log_e.masked_fill(~allowed, -math.inf), (0, missing, 0, missing), value=-math.inf))
    return torch.stack(squares)


def _mixture(query: Tensor, key: Tensor, gate: Tensor, bias: Tensor | float, allowed: Tensor) -> Tensor:
    """log E [v, u] of one sequence where allowed; arbitrary elsewhere, but without a gradient."""
    scores = torch.einsum("vhp,uhp->hvu", query, key) / math.sqrt(query.shape[-1]) + bias
    log_heads = scores.masked_fill(~allowed, -math.inf).log_softmax(-1)  # NaN where a state has no successor
    return (log_heads + gate.log_softmax(-1).T[:, :, None]).masked_fill(~allowed, 0).logsumexp(0)
