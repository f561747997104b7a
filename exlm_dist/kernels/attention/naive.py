"""The definition of `attention`: one sequence after another, every weight written out, gradients by autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, angles: Tensor, cu_tokens: Tensor, masks: Sequence[Tensor] | None = None
) -> Tensor:
    """out_i = sum_j M_ij softmax_j(q'_i . k'_j / sqrt(P)) v_j within each sequence; q', k' are q, k rotated.

    q, k, v [T, H, P]; angles [T, P/2]; sequence b owns rows cu_tokens[b]:cu_tokens[b+1], the other rows give 0.
    masks: M [H, n, n] of each sequence of n tokens, what dropout multiplies a weight by: 0, or 1 / (1 - p) for those
    that are kept (None: 1). Returns [T, H, P].
    Source: Vaswani et al. 2017; ExLM (arXiv 2501.13397) section 3 for the angles (`rotary_angles`).
    """
    out = torch.zeros_like(v)
    for b, (start, stop) in enumerate(pairwise(cu_tokens.tolist())):
        own = slice(start, stop)
        query, key = rotation(q[own], angles[own]), rotation(k[own], angles[own])
        weights = torch.einsum("ihp,jhp->hij", query, key).div(math.sqrt(q.shape[-1])).softmax(-1)
        if masks is not None:
            weights = masks[b] * weights
        out[own] = torch.einsum("hij,jhp->ihp", weights, v[own])
    return out


def rotation(x: Tensor, angles: Tensor) -> Tensor:
    """[x1 cos - x2 sin, x2 cos + x1 sin] of the halves x1, x2 of each head: x [n, H, P], angles [n, P/2].

    Source: Su et al. 2021 (rotary positions), the pairs being (j, j + P/2).
    """
    cos, sin = angles.to(x.dtype).cos()[:, None], angles.to(x.dtype).sin()[:, None]
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)
