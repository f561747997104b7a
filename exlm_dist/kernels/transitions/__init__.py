"""Gated multi-head transition log-probabilities over the states of a sequence (maths: README.md beside this file)."""

from __future__ import annotations

from torch import Tensor

from exlm_dist.kernels.backend import implementation
from exlm_dist.kernels.checks import check_segments, check_shape
from exlm_dist.kernels.transitions.prior import JumpPrior

__all__ = ["JumpPrior", "transition_log_probs"]

KINDS = ("dense", "sparse", "uniform")


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
    backend: str = "auto",
) -> Tensor:
    """log E[v, u], the log-probability of moving from state v to state u, [B, max_states, max_states].

    query, key [S, H, P]; gate [S, H] (raw); cu_states [B+1] int64; max_states: no sequence has more states (int).
    kind "dense": to any later state of the sequence, log E = logsumexp_h(log_softmax_h(gate_v) +
    log_softmax_u(q_v.k_u / sqrt(P))); "sparse": only to the states of the next group of `states_per_target`;
    "uniform": to any later state with equal probability, query, key and gate not read (may be None).
    `prior` is added to q_v.k_u / sqrt(P) of every head; uniform transitions have no scores and take none.
    fp32 (fp64 for fp64 input); -inf where a transition is not allowed, also past a sequence's own states; a state
    with no successor has a row of -inf. ValueError on shapes that do not fit.
    Source: ExLM (arXiv 2501.13397), DA-Transformer (arXiv 2205.07459) section 3.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    if states_per_target < 1:
        raise ValueError(f"states_per_target is {states_per_target}, expected at least 1")
    if kind == "uniform":
        if prior is not None:
            raise ValueError("uniform transitions take no prior over jumps: with one they would not be uniform")
        total = int(cu_states[-1]) if cu_states.device.type == "cpu" else 0
        check_segments("cu_states", cu_states, total, max_states)
        chosen = implementation("transitions", backend, cu_states.device)
        return chosen.uniform_log_probs(cu_states, max_states)
    if query is None or key is None or gate is None:
        raise ValueError(f"{kind} transitions need query, key and gate")
    check_shape("query", query, (None, None, None))
    check_shape("key", key, tuple(query.shape))
    check_shape("gate", gate, tuple(query.shape[:2]))
    check_segments("cu_states", cu_states, len(query), max_states)
    chosen = implementation("transitions", backend, query.device)
    return chosen.transition_log_probs(
        query,
        key,
        gate,
        cu_states,
        max_states,
        states_per_target=states_per_target,
        sparse=kind == "sparse",
        prior=prior,
    )
