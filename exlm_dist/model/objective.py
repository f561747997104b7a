"""The training loss, and the metric by which ExLM and the plain masked language model are compared (docs/metric.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from exlm_dist.kernels.dag import dag_posteriors
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
def masked_token_scores(stream: Stream, is_masked: Tensor) -> tuple[Tensor, Tensor]:
    """-log p_i(y_i) summed over the masked targets, and their number; is_masked [N] bool (False for anchors).

    p_i(y_i) = sum_u q_i(u) p_u(y_i): the model's own predictive distribution of masked position i.
    """
    prior = prior_marginals(stream)
    scores = torch.logsumexp(prior.log() + stream.match, dim=-1)
    chosen = stream.padded(is_masked, stream.cu_targets, stream.max_targets, False)
    return -torch.where(chosen, scores, 0.0).sum(), chosen.sum()


@dataclass(frozen=True)
class MaskedScores:
    """Sums over masked tokens: negative log-likelihood in nats, correct predictions, tokens (0-dim tensors)."""

    nll: Tensor
    correct: Tensor
    count: Tensor

    def stacked(self) -> Tensor:
        """The three as one tensor, [3] fp64."""
        return torch.stack([self.nll.double(), self.correct.double(), self.count.double()])


@torch.no_grad()
def masked_scores(result: Stream, is_masked: Tensor) -> MaskedScores:
    """Scores of the masked targets of a stream that has passed all layers with `predict`; is_masked [N] bool.

    The accuracy is that of the full distribution.
    """
    nll, count = masked_token_scores(result, is_masked)
    wanted = result.padded(result.target_ids, result.cu_targets, result.max_targets, -1)
    chosen = result.padded(is_masked, result.cu_targets, result.max_targets, False)
    return MaskedScores(nll, ((result.predictions == wanted) & chosen).sum(), count)


@torch.no_grad()
def evaluate_masked(model: Callable[[Stream], Stream], stream: Stream, is_masked: Tensor) -> MaskedScores:
    """Run `model` on `stream` and score its masked targets."""
    return masked_scores(model(stream.replace(predict=True)), is_masked)
