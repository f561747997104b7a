"""Everything that is measured of a checkpoint at one ratio of masked tokens (docs/masked.md)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from exlm_dist.data.batch import PackedBatch
from exlm_dist.data.loader import chosen_batches, evaluation_keys
from exlm_dist.data.masking import choose_masked, num_masks
from exlm_dist.data.recipe import Dataset, Recipe
from exlm_dist.data.repeated import wholly_hidden, with_copies
from exlm_dist.evaluation.calibration import Reliability, entropy
from exlm_dist.evaluation.completions_measured import CompletionMeasures
from exlm_dist.inference.completions import StateChain
from exlm_dist.inference.fill import BATCH_LOGITS, BATCH_TOKENS, stream_chains
from exlm_dist.inference.loading import LoadedCheckpoint
from exlm_dist.model.build import run_layers
from exlm_dist.model.scoring import Totals, evaluation_sums
from exlm_dist.model.stream import Stream

#: Width of the bins of entropies, in nats.
ENTROPY_BIN = 0.1


@dataclass(frozen=True)
class MaskedSettings:
    """What is masked, and how much is searched.

    Args:
        ratio: fraction of the tokens that is masked. seed: of the masks, and of what is drawn. copies: of each token,
        side by side; with a number, also 1, tokens that are wholly hidden are told from the others. complete: first
        sequences of which completions are searched and drawn.
    """

    ratio: float
    seed: int = 0
    copies: int | None = None
    complete: int = 0


@dataclass(frozen=True)
class MaskedPositions:
    """The masked tokens of the samples, [N] in all.

    Args:
        inner: place of each in its sequence, from 0, one sequence after another. counts: of each sequence, [n].
        hidden: bool [N], no copy of the token is visible.
    """

    samples: np.ndarray
    inner: np.ndarray
    counts: np.ndarray
    hidden: np.ndarray

    @classmethod
    def of(cls, lengths: np.ndarray, samples: np.ndarray, settings: MaskedSettings) -> MaskedPositions:
        """Those of the samples, whose lengths with all copies are int [n]: a function of (seed, sample id, length)."""
        keys, lengths = evaluation_keys(samples, settings.seed), lengths.astype(np.int64)
        counts = num_masks(lengths, keys, settings.ratio)
        indices = choose_masked(lengths, counts, keys)
        starts = np.cumsum(lengths) - lengths
        inner = indices - np.repeat(starts, counts)
        return cls(samples, inner, counts, wholly_hidden(indices, settings.copies or 1))

    def by_sample(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """(inner, hidden) of each sample."""
        ends = np.cumsum(self.counts)[:-1]
        parts = zip(np.split(self.inner, ends), np.split(self.hidden, ends))
        return dict(zip(self.samples.tolist(), parts))

    def sha256(self) -> str:
        """Equal where the same tokens of the same samples are masked."""
        parts = (self.samples, self.counts, self.inner)
        return hashlib.sha256(b"".join(part.astype("<i8").tobytes() for part in parts)).hexdigest()


@dataclass(frozen=True)
class TokenMeasures:
    """Of masked tokens by themselves, [N]: nll in nats, probability of the most probable token, whether it is right,
    entropy of p_i, and the mean entropy of the states that i may lie at (both in nats)."""

    nll: np.ndarray
    confidence: np.ndarray
    correct: np.ndarray
    entropy: np.ndarray
    state_entropy: np.ndarray

    @classmethod
    def of(cls, prior: np.ndarray, emissions: np.ndarray, wanted: np.ndarray) -> TokenMeasures:
        """prior [n, L]: q_i(u) of docs/metric.md; emissions [L, V]: p_u(w); wanted int [n]: the right tokens."""
        found = prior @ emissions
        best = found.argmax(1)
        rows = np.arange(len(wanted))
        with np.errstate(divide="ignore"):
            nll = -np.log(found[rows, wanted])
        return cls(nll, found[rows, best], best == wanted, entropy(found), prior @ entropy(emissions))

    @classmethod
    def joined(cls, parts: list[TokenMeasures]) -> TokenMeasures:
        """One after another."""
        names = cls.__dataclass_fields__
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    def take(self, chosen: np.ndarray) -> TokenMeasures:
        """Those of `chosen`, bool [N]."""
        return TokenMeasures(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))

    def means(self) -> dict[str, float | None]:
        """nll, accuracy, entropies and calibration error; None of no tokens."""
        if not len(self.nll):
            return dict.fromkeys(("nll", "accuracy", "entropy", "state_entropy", "ece"))
        return {
            "nll": float(self.nll.mean()),
            "accuracy": float(self.correct.mean()),
            "entropy": float(self.entropy.mean()),
            "state_entropy": float(self.state_entropy.mean()),
            "ece": Reliability.of(self.confidence, self.correct).error,
        }


def measure_masked(
    loaded: LoadedCheckpoint, dataset: Dataset, samples: np.ndarray, settings: MaskedSettings
) -> dict[str, Any]:
    """Measure a checkpoint on `samples` (ids, int64 [n]) of a data set without masks.

    Returns "scores" by the names of docs/masked.md (None: undefined), "tables" (reliability of tokens and of
    completions, histograms of entropies), and "positions", the hash of what was masked. ConfigError if a sequence with
    its masks is too long for the model.
    """
    dataset = with_copies(dataset, settings.copies or 1)
    positions = MaskedPositions.of(dataset.lengths[samples], samples, settings)
    recipe = _recipe(loaded, dataset.lengths[samples], settings.ratio)
    completions = CompletionMeasures(loaded.tokenizer, settings.seed)
    wanted_completions = set(samples[: settings.complete].tolist())
    of_sample = positions.by_sample()
    totals, parts, hidden = [], [], []
    for batch in chosen_batches(dataset, recipe, samples, seed=settings.seed):
        sums, measured = _batch(loaded, batch)
        totals.append(sums)
        for row, (chain, wanted, tokens) in enumerate(measured):
            sample = int(batch.sample_ids[row])
            inner, own_hidden = of_sample[sample]
            parts.append(tokens)
            hidden.append(own_hidden)
            if sample in wanted_completions:
                (ids, _) = dataset.read(np.array([sample]))
                completions.add(sample, ids, inner, wanted, chain)
    tokens = TokenMeasures.joined(parts)
    whole = np.concatenate(hidden)
    values = Totals.of(torch.stack(totals).sum(0).tolist()).means()
    values.pop("tokens")
    scores: dict[str, float | None] = {
        **values,
        **{name: value for name, value in tokens.means().items() if name not in values},
        "tokens": len(whole),
        "sequences": len(samples),
        **completions.means(),
        **({} if settings.copies is None else _by_visibility(tokens, whole, int(dataset.lengths[samples].sum()))),
    }
    tables = {
        "reliability": Reliability.of(tokens.confidence, tokens.correct).table(),
        "reliability_joint": completions.reliability().table(),
        "entropy": _histogram(tokens.entropy),
        "state_entropy": _histogram(tokens.state_entropy),
    }
    return {"scores": scores, "tables": tables, "positions": positions.sha256()}


def _recipe(loaded: LoadedCheckpoint, lengths: np.ndarray, ratio: float) -> Recipe:
    """Micro-batches whose tokens and distributions fit in memory."""
    recipe = Recipe.for_evaluation(loaded.config, loaded.tokenizer.vocab_size)
    recipe = replace(recipe, ratio=ratio, bucket=1)
    longest = recipe.longest(lengths)
    room = min(BATCH_TOKENS[loaded.device.type], BATCH_LOGITS // recipe.vocab_size)
    return replace(recipe, micro=max(1, room // longest))


def _batch(
    loaded: LoadedCheckpoint, batch: PackedBatch
) -> tuple[torch.Tensor, Iterator[tuple[StateChain, np.ndarray, TokenMeasures]]]:
    """(the values of `Totals`; of each sequence its joint distribution, its masked tokens and their measures)."""
    model, output = loaded.model, loaded.model.output
    assert output is not None  # a loaded model has all its layers
    with torch.no_grad():
        stream = run_layers(
            model.layers[:-1], Stream.from_batch(batch, loaded.device).replace(predict=True), recompute=False
        )
        result = output(stream)
        sums = evaluation_sums(result, torch.from_numpy(batch.is_masked).to(loaded.device))
        chains = list(stream_chains(output, stream, batch, first=0))
        prior = result.prior.double().cpu().numpy()

    def by_sequence() -> Iterator[tuple[StateChain, np.ndarray, TokenMeasures]]:
        for row, chain in enumerate(chains):
            targets = slice(*batch.cu_targets[row : row + 2])
            masked = batch.is_masked[targets]
            wanted = batch.target_ids[targets][masked]
            own = prior[row, : len(masked), : len(chain.emissions)][masked]
            yield chain, wanted, TokenMeasures.of(own, chain.emissions, wanted)

    return sums.cpu(), by_sequence()


def _by_visibility(tokens: TokenMeasures, hidden: np.ndarray, length: int) -> dict[str, float | None]:
    """Of repeated tokens: those that are wholly hidden, a fraction of all `length`, and those of which a copy is
    visible."""
    groups = {"hidden": tokens.take(hidden), "copied": tokens.take(~hidden)}
    means = {f"{group}_{name}": value for group, own in groups.items() for name, value in own.means().items()}
    return {"hidden_fraction": float(hidden.sum() / length), **means}


def _histogram(values: np.ndarray) -> list[int]:
    """Counts in bins of `ENTROPY_BIN` nats from 0 on."""
    return np.bincount(np.floor(values / ENTROPY_BIN).clip(min=0).astype(np.int64)).tolist()
