"""The joint distribution of the tokens at the masks of one sequence: k best, samples, marginals.

ExLM's paths through the states are a Markov chain once the number of targets N is given: with E the transitions,
beta_i(u) the prior weight of all ways to go on from state u at target i to the end in N - 1 - i steps,

    beta_{N-1}(u) = [u is a final state],   beta_i(u) = sum_{v > u} E(u, v) beta_{i+1}(v),

the chain moves from u at target i to v at target i+1 with probability E(u, v) beta_{i+1}(v) / beta_i(u), and each
state emits a token by p_u. So the tokens w_1..w_n at the masks have the joint probability of a hidden Markov model,

    P(w) = sum over paths of N states [prior of the path] * product over masks of p_state(w),

which sums to 1 over all completions and has the marginals p_i(w) of docs/metric.md. BOS and EOS, where they are
targets, are known and emit nothing. p_u may be that of the ordinary tokens alone, where a mask hides none of the
special ones. For the plain masked language model the chain has one path, and P is the product of independent
distributions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NEVER = -np.inf


@dataclass(frozen=True)
class Scored:
    """Tokens at the masks, in order, and the logarithm of their joint probability."""

    tokens: tuple[int, ...]
    log_probability: float


class StateChain:
    """The hidden Markov model of one sequence with N targets and L states over a vocabulary of V tokens."""

    def __init__(
        self,
        log_tokens: np.ndarray,
        log_transitions: np.ndarray | None,
        is_masked: np.ndarray,
        ends: int,
        first: int,
    ) -> None:
        """log_tokens [L, V]: log p_u(w); log_transitions [L, L]: from the state of the row, read for v < u alone, None
        for the plain model (L = N); is_masked bool [N]; a path starts at one of the first and ends at one of the last
        `ends` states. Only tokens from `first` on stand at a mask, and p_u is that given this."""
        states, targets = len(log_tokens), len(is_masked)
        possible = log_tokens[:, first:].astype(np.float64)
        possible = np.exp(possible - possible.max(1, keepdims=True))
        self.emissions = possible / possible.sum(1, keepdims=True)  # [L, V - first]
        self._first = first
        self.is_masked = is_masked
        later = np.triu(np.ones((states, states), bool), 1)
        if log_transitions is None:
            log_transitions = np.where(np.eye(states, k=1, dtype=bool), 0.0, NEVER)
        self._edges = np.where(later, log_transitions.astype(np.float64), NEVER)
        self._beta = np.full((targets, states), NEVER)
        self._beta[-1, states - ends :] = 0.0
        for i in range(targets - 2, -1, -1):
            self._beta[i] = _logsumexp(self._edges + self._beta[i + 1], 1)
        start = np.where(np.arange(states) < ends, self._beta[0], NEVER)
        self._start = np.exp(start - _logsumexp(start, 0))

    def predict(self, i: int, filtered: np.ndarray | None) -> np.ndarray:
        """Distribution of the state of target i, [..., L], from that of the one before (None for the first)."""
        if filtered is None:
            return self._start[None]
        reachable = np.where(self._beta[i - 1] > NEVER, self._beta[i - 1], 0.0)
        steps = np.exp(self._edges + self._beta[i] - reachable[:, None])
        return filtered @ steps

    def marginals(self) -> np.ndarray:
        """p_i(w) of each mask by itself, [n, V]; 0 for tokens that stand at none."""
        state, found = None, []
        for i, masked in enumerate(self.is_masked):
            state = self.predict(i, state)
            if masked:
                found.append(state[0] @ self.emissions)
        return np.pad(np.array(found), ((0, 0), (self._first, 0)))

    def best(self, count: int, beam: int) -> list[Scored]:
        """The `count` most probable completions, best first, by a beam search over prefixes.

        The score of a prefix is its exact probability, summed over all paths; so is that of each completion. What a
        wider beam would have found may be missing; for the plain model nothing is, with a beam of at least `count`.
        """
        tokens = np.zeros((1, 0), np.int64)
        scores, state = np.zeros(1), None
        for i, masked in enumerate(self.is_masked):
            state = self.predict(i, state)
            if not masked:
                continue
            with np.errstate(divide="ignore"):
                options = scores[:, None] + np.log(state @ self.emissions)
            width = min(max(beam, count), options.size)
            kept = np.argpartition(-options, width - 1, axis=None)[:width]
            prefix, token = np.divmod(kept, options.shape[1])
            scores = options[prefix, token]
            order = np.argsort(-scores, kind="stable")
            order = order[scores[order] > NEVER]
            prefix, token, scores = prefix[order], token[order], scores[order]
            tokens = np.column_stack([tokens[prefix], token + self._first])
            state = self._filtered(state[prefix], token)
        return [Scored(tuple(row), float(score)) for row, score in zip(tokens.tolist()[:count], scores)]

    def sample(self, count: int, temperature: float, random: np.random.Generator) -> list[Scored]:
        """`count` independent completions drawn token by token from P(w_i | w_1..w_{i-1})^(1/temperature)."""
        tokens = np.zeros((count, 0), np.int64)
        scores, state = np.zeros(count), None
        for i, masked in enumerate(self.is_masked):
            state = np.broadcast_to(self.predict(i, state), (count, len(self._start)))
            if not masked:
                continue
            following = state @ self.emissions
            following /= following.sum(1, keepdims=True)
            with np.errstate(divide="ignore"):
                flattened = np.log(following) / temperature
            # Gumbel's trick: the argmax of noisy log-probabilities is a draw from them.
            token = np.argmax(flattened + random.gumbel(size=flattened.shape), axis=1)
            scores = scores + np.log(following[np.arange(count), token])
            tokens = np.column_stack([tokens, token + self._first])
            state = self._filtered(state, token)
        return [Scored(tuple(row), float(score)) for row, score in zip(tokens.tolist(), scores)]

    def log_probability(self, tokens: tuple[int, ...]) -> float:
        """log P of a completion."""
        remaining = iter(tokens)
        total, state = 0.0, None
        for i, masked in enumerate(self.is_masked):
            state = self.predict(i, state)
            if masked:
                joint = state[0] * self.emissions[:, next(remaining) - self._first]
                if joint.sum() == 0:
                    return NEVER
                total += float(np.log(joint.sum()))
                state = joint[None] / joint.sum()
        return total

    def _filtered(self, state: np.ndarray, token: np.ndarray) -> np.ndarray:
        """Distribution of the states [m, L] once each has emitted `token` [m] (without those before `first`)."""
        joint = state * self.emissions.T[token]
        return joint / joint.sum(1, keepdims=True)


def _logsumexp(values: np.ndarray, axis: int) -> np.ndarray:
    top = values.max(axis, keepdims=True)
    top = np.where(top > NEVER, top, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(values - top).sum(axis)) + top.squeeze(axis)
