"""The training loss, and what ExLM and the plain masked language model are compared by (docs/metric.md)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from exlm_dist.kernels.dag import dag_log_likelihood, dag_posteriors
from exlm_dist.model.stream import Stream


def diagonal_log_likelihood(match: Tensor, num_targets: Tensor) -> Tensor:
    """Sum of log p(target i | state i) of each sequence, [B]: the plain model has one state per target."""
    scores = match.diagonal(dim1=1, dim2=2)
    inside = torch.arange(scores.shape[1], device=match.device) < num_targets[:, None]
    return torch.where(inside, scores, 0.0).sum(1)


def loss_sum(stream: Stream, reduction: Literal["sequence", "token"]) -> tuple[Tensor, Tensor]:
    """Summed loss of a micro-batch, and which sequences [B] are left out because their likelihood is not finite.

    'sequence': sum of -log P_b / N_b, to be divided by the sequences of the global batch; 'token': sum of -log P_b, to
    be divided by its targets. A sequence left out gets no gradient; the caller counts and reports it.
    """
    valid = torch.isfinite(stream.log_likelihood)
    loss = -torch.where(valid, stream.log_likelihood, 0.0)
    if reduction == "sequence":
        loss = loss / stream.num_targets
    return loss.sum(), ~valid


def prior_marginals(stream: Stream, *, backend: str = "auto") -> Tensor:
    """q_i(u): probability by the transitions alone that state u emits target i, [B, N_max, L_max]; rows sum to 1.

    Paths are weighted by their transitions, given the number of targets; no target token is used.
    The plain masked language model has q_i(u) = [u = i].
    """
    if stream.transitions is None:
        targets, states = stream.match.shape[1:]
        inside = torch.arange(targets, device=stream.match.device) < stream.num_targets[:, None]
        return torch.eye(targets, states, device=stream.match.device) * inside[:, :, None]
    return dag_posteriors(
        torch.zeros_like(stream.match),
        stream.transitions,
        stream.num_targets,
        stream.num_states,
        ends=stream.ends,
        backend=backend,
    )


@torch.no_grad()
def single_log_probs(result: Stream) -> Tensor:
    """log p_i(y_i) of each target by itself, [B, N_max], of a stream that has passed all layers.

    p_i(y_i) = sum_u q_i(u) p_u(y_i): the model's own predictive distribution of position i.
    """
    prior = prior_marginals(result) if result.prior is None else result.prior
    return torch.logsumexp(prior.log() + result.match, dim=-1)


@torch.no_grad()
def joint_log_probs(result: Stream, is_masked: Tensor) -> Tensor:
    """log P of all masked tokens of each sequence at once, [B], of a stream that has passed all layers; is_masked
    [B, N_max] bool.

    Given the number of targets and the anchors: the likelihood of the targets, divided by the same sum over paths in
    which the masked targets may be any token. Of the plain masked language model the product of its distributions.
    """
    anything = result.match.masked_fill(is_masked[:, :, None], 0.0)
    if result.transitions is None:
        return result.log_likelihood - diagonal_log_likelihood(anything, result.num_targets)
    return result.log_likelihood - dag_log_likelihood(
        anything, result.transitions, result.num_targets, result.num_states, ends=result.ends
    )


@torch.no_grad()
def masked_scores(result: Stream, is_masked: Tensor) -> Tensor:
    """Sums over the masked targets of a stream that has passed all layers with `predict`, [3] fp64: -log p_i(y_i) in
    nats, correct predictions, tokens; is_masked [N] bool (False for anchors).

    A prediction is the most probable token of the full distribution.
    """
    chosen = result.by_target(is_masked, False)
    wanted = result.by_target(result.target_ids, -1)
    nll = -torch.where(chosen, single_log_probs(result), 0.0).sum()
    return torch.stack([nll.double(), ((result.predictions == wanted) & chosen).sum().double(), chosen.sum().double()])
