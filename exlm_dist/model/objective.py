"""The training loss, and what ExLM and the plain masked language model are compared by (docs/metric.md)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from exlm_dist.kernels.dag import dag_log_likelihood
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


def prior_paths(stream: Stream, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """q_i(u) [B, N_max, L_max] and log W [B]: of all paths, given the number of targets, the fraction by weight that
    emits target i at state u, and the logarithm of their weight.

    Paths are weighted by their transitions; no target token is used. Rows of q sum to 1. The plain masked language
    model has a single path, q_i(u) = [u = i].
    """
    if stream.transitions is None:
        targets, states = stream.match.shape[1:]
        inside = torch.arange(targets, device=stream.match.device) < stream.num_targets[:, None]
        identity = torch.eye(targets, states, device=stream.match.device) * inside[:, :, None]
        return identity, torch.zeros_like(stream.log_likelihood)
    with torch.enable_grad():  # q is the gradient of log W: one recursion gives both
        match = torch.zeros_like(stream.match).requires_grad_()
        log_weight = dag_log_likelihood(
            match,
            stream.transitions.detach(),
            stream.num_targets,
            stream.num_states,
            ends=stream.ends,
            backend=backend,
        )
        (prior,) = torch.autograd.grad(log_weight.sum(), match)
    return prior, log_weight.detach()


@torch.no_grad()
def single_log_probs(result: Stream) -> Tensor:
    """log p_i(y_i) of each target by itself, [B, N_max], of a stream that has passed all layers with `predict`.

    p_i(y_i) = sum_u q_i(u) p_u(y_i): the model's own predictive distribution of position i.
    """
    return torch.logsumexp(result.prior.log() + result.match, dim=-1)


@torch.no_grad()
def joint_log_probs(result: Stream, is_masked: Tensor) -> Tensor:
    """log P of all masked tokens of each sequence at once, [B], of a stream that has passed all layers with `predict`;
    is_masked [B, N_max] bool, False for anchors alone.

    Given the number of targets and the anchors: log P(targets) - log W - log P(anchors). Anchors lie at one state
    each, whatever the path. Of the plain masked language model the product of its distributions.
    """
    at_anchors = torch.where((result.prior > 0) & ~is_masked[:, :, None], result.prior * result.match, 0.0)
    return result.log_likelihood - result.log_weight - at_anchors.sum((1, 2))


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
