"""Which states the masked tokens lie at: how sharp prior and posterior are, and whether the k states of a mask differ.

Prior: q_i(u) of docs/metric.md, by the transitions alone. Posterior: given the targets. The own states of target i are
those of its mask, k i to k i + k - 1 in its sequence. Definitions of the metrics: docs/evaluation.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from exlm_dist.kernels.dag import dag_posteriors
from exlm_dist.model.stream import Stream


@dataclass(frozen=True)
class AlignmentTotals:
    """Sums over masked tokens of ExLM, of sequences with a finite likelihood; all 0 for the plain model."""

    tokens: float
    prior_entropy: float  # nats
    posterior_entropy: float
    prior_own: float  # probability of the own states
    posterior_own: float
    within: float  # squared distance of hidden states from the mean of their mask, averaged over the states of the mask
    between: float  # squared distance of the mean of a mask from that of its sequence, where it has several
    token_spread: float  # total variation between the tokens of a state and of its mask, averaged over its states
    clones: tuple[float, ...]  # posterior probability of each of the k own states

    @staticmethod
    def size(states: int) -> int:
        """Number of values, each clone's counted."""
        return len(fields(AlignmentTotals)) - 1 + states

    @classmethod
    def of(cls, values: Sequence[float]) -> AlignmentTotals:
        """From all values in one row, those of the clones last."""
        single = len(fields(cls)) - 1
        return cls(*values[:single], clones=tuple(values[single:]))

    def means(self) -> dict[str, float]:
        """The metrics `alignment_...` of docs/evaluation.md; none for the plain model."""
        if not self.tokens:
            return {}
        sums = {
            "prior_entropy": self.prior_entropy,
            "posterior_entropy": self.posterior_entropy,
            "prior_own": self.prior_own,
            "posterior_own": self.posterior_own,
            "token_spread": self.token_spread,
        }
        values = {name: value / self.tokens for name, value in sums.items()}
        values["states_used"] = effective_number(self.clones)
        values["hidden_spread"] = self.within / self.between if self.between else math.nan
        return {f"alignment_{name}": value for name, value in values.items()}


def effective_number(weights: tuple[float, ...]) -> float:
    """exp of the entropy of `weights` as a distribution: 1 if all weight is on one, their number if they are equal; nan
    without weight."""
    total = sum(weights)
    if not total > 0:
        return math.nan
    return math.exp(-sum(one / total * math.log(one / total) for one in weights if one > 0))


@torch.no_grad()
def alignment_sums(result: Stream, is_masked: Tensor) -> Tensor:
    """The fields of `AlignmentTotals`, [8 + k] fp64, of a stream that has passed all layers with `predict`; is_masked
    [B, N_max] bool."""
    if result.transitions is None:
        return torch.zeros(AlignmentTotals.size(result.states), dtype=torch.float64, device=is_masked.device)
    posterior = dag_posteriors(
        result.match, result.transitions, result.num_targets, result.num_states, ends=result.ends
    )
    chosen = is_masked & torch.isfinite(result.log_likelihood)[:, None]
    prior_own, posterior_own = (own_states(one, result.states) for one in (result.prior, posterior))
    within, between = hidden_distances(result, is_masked)
    by_target = torch.stack(
        [
            torch.ones_like(within),
            torch.special.entr(result.prior).sum(2),
            torch.special.entr(posterior).sum(2),
            prior_own.sum(2),
            posterior_own.sum(2),
            within,
            between,
            result.token_spread,
            *posterior_own.unbind(2),
        ]
    )
    return torch.where(chosen, by_target, 0.0).double().sum((1, 2))


def own_states(weights: Tensor, states: int) -> Tensor:
    """weights [B, N, k N] of targets at states -> those of each target at its own k states, [B, N, k]."""
    return weights.unflatten(2, (-1, states)).diagonal(dim1=1, dim2=2).mT


def hidden_distances(result: Stream, is_masked: Tensor) -> tuple[Tensor, Tensor]:
    """(within, between) of each masked target, [B, N_max] fp32, as in `AlignmentTotals`; 0 in a sequence with a single
    one, which says nothing about how far masks are apart. is_masked [B, N_max] bool."""
    features = result.padded(result.hidden.float(), result.cu_states, result.max_states, 0.0)
    groups = features.unflatten(1, (-1, result.states))  # [B, N, k, D]
    centres = groups.mean(2)
    counts = is_masked.sum(1)
    middle = (centres * is_masked[:, :, None]).sum(1) / counts.clamp(min=1)[:, None]
    within = (groups - centres[:, :, None]).square().sum(3).mean(2)
    between = (centres - middle[:, None]).square().sum(2)
    several = is_masked & (counts > 1)[:, None]
    return torch.where(several, within, 0.0), torch.where(several, between, 0.0)
