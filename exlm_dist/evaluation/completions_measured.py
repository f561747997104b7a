"""Completions of all masks of a sequence at once: how often they are right, how sure the model is, what is readable."""

from __future__ import annotations

import numpy as np

from exlm_dist.evaluation.calibration import Reliability, entropy
from exlm_dist.evaluation.exact_completions import BEAM
from exlm_dist.inference.completions import Scored, StateChain
from exlm_dist.inference.fill import canonical_form
from exlm_dist.tokenizers import Tokenizer
from exlm_dist.tokenizers.tokenizer import NUM_SPECIAL

#: Most probable completions that are searched, and completions that are drawn, of each sequence.
BEST, DRAWN = 10, 8


class CompletionMeasures:
    """Sums over sequences; those of a sequence depend on it, its masks, its id and the seed alone."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self._tokenizer, self._seed = tokenizer, seed
        self._masked = 0
        self._single_entropy = self._dependence = 0.0
        self._right_tokens = 0
        self._exact: list[bool] = []
        self._among: list[bool] = []
        self._sure: list[float] = []
        self._valid: dict[str, list[bool]] = {"best": [], "independent": [], "drawn": []}

    def add(self, sample: int, ids: np.ndarray, inner: np.ndarray, wanted: np.ndarray, chain: StateChain) -> None:
        """A sequence: its tokens, int [length], the places of its masks and the tokens there, both int [n], and the
        joint distribution at the masks."""
        best = chain.best(BEST, max(BEAM, BEST))
        drawn = chain.sample(DRAWN, 1.0, np.random.default_rng((self._seed, sample)))
        right = tuple(wanted.tolist())
        self._masked += len(wanted)
        single = chain.marginals()
        self._single_entropy += float(entropy(single).sum())
        self._dependence += sum(one.log_probability - _by_themselves(single, one.tokens) for one in drawn) / DRAWN
        self._right_tokens += sum(one == other for one, other in zip(best[0].tokens, right))
        self._exact.append(best[0].tokens == right)
        self._among.append(any(one.tokens == right for one in best))
        self._sure.append(float(np.exp(best[0].log_probability)))
        if self._tokenizer.domain == "smiles":
            independent = Scored(tuple(single.argmax(1).tolist()), 0.0)
            for kind, completions in (("best", best[:1]), ("independent", [independent]), ("drawn", drawn)):
                self._valid[kind] += [self._is_molecule(ids, inner, one.tokens) for one in completions]

    def means(self) -> dict[str, float | None]:
        """The scores of docs/masked.md; none without sequences."""
        if not self._exact:
            return {}
        scores: dict[str, float | None] = {
            "completed": len(self._exact),
            "exact": float(np.mean(self._exact)),
            f"exact_in_{BEST}": float(np.mean(self._among)),
            "joint_accuracy": self._right_tokens / self._masked,
            "single_entropy": self._single_entropy / self._masked,
            "joint_entropy": (self._single_entropy - self._dependence) / self._masked,
            "joint_ece": self.reliability().error,
        }
        return scores | {f"valid_{kind}": float(np.mean(own)) for kind, own in self._valid.items() if own}

    def reliability(self) -> Reliability:
        """Of the most probable completion of each sequence."""
        return Reliability.of(np.array(self._sure), np.array(self._exact, bool))

    def _is_molecule(self, ids: np.ndarray, inner: np.ndarray, tokens: tuple[int, ...]) -> bool:
        """Whether RDKit reads the sequence with `tokens` at its masks; special ones are no part of a molecule."""
        if min(tokens) < NUM_SPECIAL:
            return False
        filled = ids.copy()
        filled[inner] = tokens
        return canonical_form(self._tokenizer, self._tokenizer.decode(filled.tolist())) is not None


def _by_themselves(single: np.ndarray, tokens: tuple[int, ...]) -> float:
    """Sum of log p_i(w_i), where the masks are filled independently of each other."""
    return float(np.log(single[np.arange(len(tokens)), list(tokens)]).sum())
