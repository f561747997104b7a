"""The last layer: scores of the targets at the states, transitions between the states, likelihood of the targets."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exlm_dist.config.schema import ModelConfig
from exlm_dist.kernels.dag import dag_log_likelihood
from exlm_dist.kernels.linear import Linear, linear
from exlm_dist.kernels.transitions import JumpPrior, transition_log_probs
from exlm_dist.kernels.vocab import VocabShard, match_scores
from exlm_dist.model.block import NORM_EPS
from exlm_dist.model.cost import learns_transitions
from exlm_dist.model.objective import diagonal_log_likelihood, prior_paths
from exlm_dist.model.stream import Stream
from exlm_dist.parallel.region import UNSHARDED, Sharding, TensorRegion

#: Most logits that predictions keep at a time.
_PREDICTION_LOGITS = 1 << 23


class Positions(nn.Module):
    """Learned vector of each index in the expanded sequence."""

    def __init__(self, max_positions: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_positions, width))

    def forward(self, length: int) -> Tensor:
        """The first `length` rows, [length, D]."""
        if length > len(self.weight):
            raise ValueError(
                f"expanded length {length} exceeds the {len(self.weight)} rows of the position table: "
                "raise model.max_positions or shorten the sequences"
            )
        return self.weight[:length]


class StateProjection(nn.Linear):
    """Linear map of concat(features, position vector); each row of the position table is projected once."""

    def forward(self, features: Tensor, positions: Tensor | None, index: Tensor) -> Tensor:
        """features [S, D], positions [length, D] or None, index [S] into positions -> [S, out]."""
        if positions is None:
            return linear(features, self.weight, self.bias)
        by_feature, by_position = self.weight.split(features.shape[1], dim=1)
        projected = linear(positions, by_position, self.bias)
        return linear(features, by_feature) + F.embedding(index, projected)


class TransitionHead(nn.Module):
    """Log-probabilities of going from one state to another, from the features of the states and their indices.

    A rank with some of the heads computes their mixture as if there were no others; the mixtures of the ranks are mixed
    by the probability that the gate gives each: log E = lse(g + log E_rank) - lse(g), with g the log-sum-exp of the
    local raw gates and lse over the ranks. All heads have the same prior over jumps.
    """

    tensor_sharding: ClassVar[dict[str, Sharding]] = {"query": "head", "key": "head", "gate": "head"}
    region: TensorRegion = UNSHARDED

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        inputs = config.width * (2 if config.transition_positions else 1)
        self.positions = Positions(config.max_positions, config.width) if config.transition_positions else None
        self.query = StateProjection(inputs, config.width)
        self.key = StateProjection(inputs, config.width)
        self.gate = StateProjection(inputs, config.heads)
        self.kind = config.transitions
        self.prior = None
        if config.jump_prior != "none":
            self.prior = JumpPrior(config.jump_prior, config.jump_width, config.jump_floor)
        self.backend = backend

    def forward(self, features: Tensor, stream: Stream) -> Tensor:
        """features [S, D] of the states -> log-probabilities [B, L_max, L_max]."""
        features = self.region.copy_to(features)
        positions = None if self.positions is None else self.region.copy_to(self.positions(stream.max_tokens))
        # Padding states point at token 0 and so get its position vector; their rows are never read.
        index = stream.expanded_index(stream.state_index)
        query, key, gate = (layer(features, positions, index) for layer in (self.query, self.key, self.gate))
        log_probs = transition_log_probs(
            query.unflatten(1, (gate.shape[1], -1)),
            key.unflatten(1, (gate.shape[1], -1)),
            gate,
            stream.cu_states,
            stream.max_states,
            states_per_target=stream.states,
            kind=self.kind,
            prior=self.prior,
            backend=self.backend,
        )
        if not self.region.is_sharded:
            return log_probs
        local_gate = torch.logsumexp(gate.to(log_probs.dtype), 1)
        local_gate = stream.padded(local_gate, stream.cu_states, stream.max_states, 0.0)[:, :, None]
        return self.region.logsumexp(log_probs + local_gate) - self.region.logsumexp(local_gate)


class Output(nn.Module):
    """Token head (dense, gelu, norm, vocabulary) and transition head at the states; likelihood of the targets."""

    tensor_sharding: ClassVar[dict[str, Sharding]] = {"weight": "vocab", "bias": "vocab"}
    region: TensorRegion = UNSHARDED

    def __init__(self, config: ModelConfig, weight: nn.Parameter, backend: str) -> None:
        super().__init__()
        self.dense = Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.weight = weight
        self.bias = nn.Parameter(torch.empty(len(weight)))
        self.words = len(weight)
        self.objective = config.objective
        self.ends = 1 if config.anchors else config.states
        self.transition = TransitionHead(config, backend) if learns_transitions(config) else None
        self.backend = backend

    @torch.no_grad()
    def distributions(self, stream: Stream) -> tuple[Tensor, Tensor | None]:
        """(log p_u(w) of each state [S, V] fp32, transitions [B, L_max, L_max] or None), of a stream that has passed
        all layers before this one. For single models without tensor parallelism."""
        features = stream.hidden if stream.selected else F.embedding(stream.state_index, stream.hidden)
        logits = linear(self.norm(F.gelu(self.dense(features))), self.weight, self.bias).float()
        return logits.log_softmax(-1), self._transitions(features, stream, torch.float32)

    def forward(self, stream: Stream) -> Stream:
        """Fill `match`, `transitions` (ExLM) and `log_likelihood`; where `predict` is set also `prior`,
        `log_weight`, `predictions` and `token_spread`, and `hidden` is that of the states."""
        hidden = self.region.gather_from(stream.hidden)
        features = hidden if stream.selected else F.embedding(stream.state_index, hidden)
        tokens = self.region.copy_to(self.norm(F.gelu(self.dense(features))))
        weight, bias, shard = self._vocabulary()
        match = match_scores(
            tokens,
            weight,
            bias,
            stream.target_ids,
            stream.cu_states,
            stream.cu_targets,
            stream.max_states,
            stream.max_targets,
            shard=shard,
            backend=self.backend,
        )
        transitions = self._transitions(features, stream, match.dtype)
        likelihood = self._likelihood(match, transitions, stream)
        stream = stream.replace(match=match, transitions=transitions, ends=self.ends, log_likelihood=likelihood)
        if not stream.predict:
            return stream
        prior, log_weight = prior_paths(stream, backend=self.backend)
        stream = stream.replace(prior=prior, log_weight=log_weight)
        predictions, spread = self._predict(tokens, stream)
        return stream.replace(predictions=predictions, token_spread=spread, hidden=features.detach(), selected=True)

    def _vocabulary(self) -> tuple[Tensor, Tensor, VocabShard | None]:
        """Local rows of the vocabulary matrix and their biases, without the padding rows."""
        if not self.region.is_sharded:
            return self.weight, self.bias, None
        first = self.region.first_index(len(self.bias))
        size = min(len(self.bias), self.words - first)
        weight, bias = (rows if size == len(rows) else rows[:size] for rows in (self.weight, self.bias))
        return weight, bias, VocabShard(first, self.region.logsumexp, self.region.all_reduce)

    def _transitions(self, features: Tensor, stream: Stream, dtype: torch.dtype) -> Tensor | None:
        if self.objective == "mlm":
            return None
        if self.transition is not None:
            return self.transition(features, stream)
        uniform = transition_log_probs(
            None,
            None,
            None,
            stream.cu_states,
            stream.max_states,
            states_per_target=stream.states,
            kind="uniform",
            backend=self.backend,
        )
        return uniform.to(dtype)

    def _likelihood(self, match: Tensor, transitions: Tensor | None, stream: Stream) -> Tensor:
        if transitions is None:
            return diagonal_log_likelihood(match, stream.num_targets)
        return dag_log_likelihood(
            match,
            transitions,
            stream.num_targets,
            stream.num_states,
            ends=self.ends,
            backend=self.backend,
        )

    @torch.no_grad()
    def _predict(self, tokens: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
        """Of each target i, [B, N_max]: argmax_w sum_u q_i(u) p_u(w), and the total variation between p_u and its mean
        over the own k states, averaged over these. A few sequences at a time."""
        padded = stream.padded(tokens, stream.cu_states, stream.max_states, 0.0)
        # By the rows of the largest shard, so that all ranks loop equally often.
        chunk = max(1, _PREDICTION_LOGITS // (stream.max_states * len(self.bias)))
        found = []
        for prior, features in zip(stream.prior.split(chunk), padded.split(chunk)):
            distributions, first = self._distributions(features)
            values, words = (prior @ distributions).max(-1)
            found.append((self.region.argmax(values, words + first), self._spread(distributions, stream.states)))
        predictions, spreads = zip(*found)
        return torch.cat(predictions), torch.cat(spreads)

    def _distributions(self, tokens: Tensor) -> tuple[Tensor, int]:
        """(p_u(w) of the local rows of the vocabulary [B, L, V], the first of these rows); tokens [B, L, D]."""
        weight, bias, shard = self._vocabulary()
        logits = linear(tokens.flatten(0, 1), weight, bias).float().unflatten(0, tokens.shape[:2])
        if shard is None:
            return logits.softmax(-1), 0
        log_sum = self.region.logsumexp(logits.logsumexp(-1, keepdim=True))
        return (logits - log_sum).exp(), shard.first_token

    def _spread(self, distributions: Tensor, states: int) -> Tensor:
        """[B, L, V] -> [B, L / k]: total variation between a state's distribution and the mean of its k, averaged."""
        groups = distributions.unflatten(1, (-1, states))
        distance = (groups - groups.mean(2, keepdim=True)).abs().sum((2, 3)) / (2 * states)
        return self.region.all_reduce(distance)
