"""Log-probabilities of a sequence's own targets at its states (maths: README.md beside this file)."""

from __future__ import annotations

from torch import Tensor, int64

from exlm_dist.kernels.backend import implementation
from exlm_dist.kernels.checks import check_segments, check_shape
from exlm_dist.kernels.vocab.shard import VocabShard

__all__ = ["VocabShard", "match_scores"]


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
    shard: VocabShard | None = None,
    backend: str = "auto",
) -> Tensor:
    """match[b, i, u] = log p(target i of sequence b | state u of sequence b), [B, max_targets, max_states].

    p = softmax over the vocabulary of weight @ hidden_u + bias. hidden [S, D]; weight [V, D]; bias [V];
    target_ids [N] int64; cu_states, cu_targets [B+1] int64; max_states, max_targets python ints.
    fp32 (fp64 for fp64 input); -inf outside a sequence's own targets and states. Logits are computed a chunk at a
    time and, beyond a fixed budget, not kept for the backward pass. With a `shard`, weight and bias are this rank's
    shard of the vocabulary and the result is that of the whole (see VocabShard). ValueError on shapes that do not fit.
    """
    check_shape("hidden", hidden, (None, None))
    check_shape("weight", weight, (None, hidden.shape[1]))
    check_shape("bias", bias, (len(weight),))
    check_shape("target_ids", target_ids, (None,))
    if target_ids.dtype != int64:
        raise ValueError(f"target_ids must be int64, got {target_ids.dtype}")
    check_segments("cu_states", cu_states, len(hidden), max_states)
    check_segments("cu_targets", cu_targets, len(target_ids), max_targets)
    if len(cu_states) != len(cu_targets):
        raise ValueError(f"cu_states is of {len(cu_states) - 1} sequences, cu_targets of {len(cu_targets) - 1}")
    chosen = implementation("vocab", backend, hidden.device)
    return chosen.match_scores(
        hidden, weight, bias, target_ids, cu_states, cu_targets, max_states, max_targets, shard=shard
    )
