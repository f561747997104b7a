"""From a global step to this rank's packed micro-batches, and the fixed batches of evaluation.

What is in global batch t is a pure function of (seed, t) and the lengths in the index: no rank, no process and no
earlier step has a say in it. `rank` and `world` only choose which of its micro-batches are read and packed here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from exlm_dist.config import check_division, check_length
from exlm_dist.config.schema import MaskingConfig
from exlm_dist.data.batch import PackedBatch
from exlm_dist.data.expansion import Expanded, expand, expanded_lengths, wrap
from exlm_dist.data.masking import mask_batch, num_masks, sample_keys
from exlm_dist.data.order import sample_at
from exlm_dist.data.packing import pack, plan_micro_batches
from exlm_dist.data.prefetch import Prefetcher
from exlm_dist.utils.errors import ConfigError, DataError

# Masking and expansion work on whole micro-batches of about this many payload tokens at once: enough that numpy's cost
# per call vanishes, few enough that the arrays stay in the cache of a core.
CHUNK_TOKENS = 16_384


class Dataset(Protocol):
    """What is needed of a data set; `exlm_dist.data.shards.ShardDataset` is one."""

    lengths: np.ndarray

    def __len__(self) -> int: ...

    def read(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True)
class StepBatches:
    """One global batch: this rank's part of it, and sizes of all of it that every rank computes for itself."""

    step: int
    micro_batches: list[PackedBatch]  # of this rank
    num_sequences: int  # of all ranks, like the next four
    num_targets: int
    num_masked: int
    num_original_tokens: int  # unexpanded, BOS and EOS included
    num_tokens: int  # expanded
    wait_seconds: float  # time the caller waited for this step

    @property
    def padding_fraction(self) -> float:
        """Share of this rank's tokens that is bucket padding."""
        return 1.0 - sum(b.num_tokens for b in self.micro_batches) / sum(len(b.input_ids) for b in self.micro_batches)


@dataclass(frozen=True)
class Recipe:
    """How sequences become packed batches: everything that is the same for all of them."""

    states: int
    anchors: bool
    ratio: float
    keep: float
    random: float
    vocab_size: int
    max_positions: int
    bucket: int

    def __post_init__(self) -> None:
        if self.keep + self.random > 1:
            raise ConfigError(
                f"masking.keep {self.keep} + masking.random {self.random} is more than 1: "
                "both are shares of the masked tokens"
            )

    def check_lengths(self, lengths: np.ndarray) -> None:
        """DataError if a sequence is empty, ConfigError if one could exceed `max_positions` when expanded."""
        if len(lengths) == 0 or lengths.min() < 1:
            raise DataError("the data has no sequences, or empty ones: prepare it again")
        check_length(
            int(lengths.max()) + 2,
            ratio=self.ratio,
            states=self.states,
            anchors=self.anchors,
            max_positions=self.max_positions,
        )

    def batches(
        self,
        dataset: Dataset,
        plan: list[np.ndarray],
        samples: np.ndarray,
        epochs: np.ndarray,
        keys: np.ndarray,
        *,
        step: int,
        indices: list[int],
    ) -> list[PackedBatch]:
        """Read, mask, expand and pack the micro-batches `plan` (each an array of rows of `samples`, `epochs`, `keys`);
        `indices`: their numbers within the step."""
        lengths = dataset.lengths[samples].astype(np.int64)
        result: list[PackedBatch] = []
        for group in _groups([int(lengths[rows].sum()) for rows in plan]):
            rows = np.concatenate([plan[number] for number in group])
            expanded = self._expanded(dataset, samples[rows], lengths[rows], keys[rows])
            first = 0
            for number in group:
                members = plan[number]
                result.append(
                    pack(
                        expanded,
                        first,
                        first + len(members),
                        states=self.states,
                        bucket=self.bucket,
                        sample_ids=samples[members],
                        epochs=epochs[members],
                        step=step,
                        index=indices[number],
                    )
                )
                first += len(members)
        return result

    def _expanded(self, dataset: Dataset, samples: np.ndarray, lengths: np.ndarray, keys: np.ndarray) -> Expanded:
        tokens, read_lengths = dataset.read(samples)
        assert np.array_equal(read_lengths, lengths), "a data set returns the lengths of its index"
        self._check_tokens(tokens, samples, lengths)
        masks = mask_batch(
            tokens, lengths, keys, ratio=self.ratio, keep=self.keep, random=self.random, vocab_size=self.vocab_size
        )
        return expand(wrap(tokens, lengths, masks, self.anchors), self.states)

    def _check_tokens(self, tokens: np.ndarray, samples: np.ndarray, lengths: np.ndarray) -> None:
        if tokens.max() >= self.vocab_size:
            place = int(tokens.argmax())
            sample = samples[np.searchsorted(np.cumsum(lengths), place, side="right")]
            raise DataError(
                f"token id {tokens[place]} in sample {sample}, but the vocabulary has {self.vocab_size} entries: "
                "the data and the tokenizer do not belong together"
            )


class Loader:
    """Training data: `step(t)` is global batch t, in any order of t; with `prefetch` > 0 a thread prepares more."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        masking: MaskingConfig,
        states: int,
        anchors: bool,
        seed: int,
        global_batch: int,
        micro: int,
        max_positions: int,
        bucket: int,
        vocab_size: int,
        rank: int,
        world: int,
        prefetch: int,
    ) -> None:
        """`global_batch` sequences a step over `world` ranks, `micro` in a micro-batch; the rest as in the schema.

        ConfigError if world x micro does not divide the global batch, or if a sequence can become too long.
        """
        check_division(global_batch, micro, world)
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not below world size {world}")
        self._recipe = Recipe(
            states, anchors, masking.ratio, masking.keep, masking.random, vocab_size, max_positions, bucket
        )
        self._recipe.check_lengths(dataset.lengths)
        self._dataset, self._seed = dataset, seed
        self._global_batch, self._num_micro = global_batch, global_batch // micro
        self._mine = range(rank * self._num_micro // world, (rank + 1) * self._num_micro // world)
        self._prefetcher = Prefetcher(self._build, prefetch)

    def step(self, t: int) -> StepBatches:
        """Global batch t (from 0). Raises what reading it raised, in whichever thread that was."""
        start = time.perf_counter()
        batches = self._prefetcher.get(t)
        return replace(batches, wait_seconds=time.perf_counter() - start)

    def close(self) -> None:
        """End the background thread."""
        self._prefetcher.close()

    def _build(self, t: int) -> StepBatches:
        recipe, total = self._recipe, self._global_batch
        epochs, samples = sample_at(np.arange(t * total, (t + 1) * total), self._seed, len(self._dataset))
        keys = sample_keys(self._seed, epochs, samples)
        lengths = self._dataset.lengths[samples].astype(np.int64)
        counts = num_masks(lengths, keys, recipe.ratio)
        expanded = expanded_lengths(lengths, counts, recipe.states, recipe.anchors)
        plan = plan_micro_batches(expanded, self._num_micro)
        mine = [plan[number] for number in self._mine]
        return StepBatches(
            step=t,
            micro_batches=recipe.batches(self._dataset, mine, samples, epochs, keys, step=t, indices=list(self._mine)),
            num_sequences=total,
            num_targets=int(counts.sum()) + 2 * recipe.anchors * total,
            num_masked=int(counts.sum()),
            num_original_tokens=int(lengths.sum()) + 2 * total,
            num_tokens=int(expanded.sum()),
            wait_seconds=0.0,
        )


def eval_batches(
    dataset: Dataset,
    *,
    masking: MaskingConfig,
    states: int,
    anchors: bool,
    sequences: int,
    micro: int,
    max_positions: int,
    bucket: int,
    vocab_size: int,
    rank: int,
    world: int,
) -> Iterator[PackedBatch]:
    """This rank's batches over the first `sequences` samples (all, if the split has fewer).

    Masks depend on the sample id alone (seed 0, epoch 0, `eval_ratio`, always MASK): every model and run is asked about
    the same places. Micro-batches do not depend on `world`. Every rank yields the same number of them, so that
    collectives inside a forward pass match: where they do not divide evenly, the last one of a rank is a filler
    (`PackedBatch.is_filler`: no masked position, sample ids -1), which must not be counted.
    """
    recipe = Recipe(states, anchors, masking.eval_ratio, 0.0, 0.0, vocab_size, max_positions, bucket)
    samples = np.arange(min(sequences, len(dataset)), dtype=np.int64)
    recipe.check_lengths(dataset.lengths[: len(samples)])
    epochs = np.zeros_like(samples)
    keys = sample_keys(0, epochs, samples)
    lengths = dataset.lengths[samples].astype(np.int64)
    counts = num_masks(lengths, keys, recipe.ratio)
    plan = plan_micro_batches(expanded_lengths(lengths, counts, states, anchors), -(-len(samples) // micro))
    for first in range(0, len(plan), world):
        number = first + rank
        filler = number >= len(plan)
        rows = plan[0 if filler else number]
        (batch,) = recipe.batches(dataset, [rows], samples, epochs, keys, step=0, indices=[number])
        yield _as_filler(batch) if filler else batch


def _groups(sizes: list[int]) -> list[list[int]]:
    """Consecutive numbers of micro-batches whose payload sizes add up to CHUNK_TOKENS at most, or single ones."""
    groups: list[list[int]] = []
    room = 0
    for number, size in enumerate(sizes):
        if room < size:
            groups.append([])
            room = CHUNK_TOKENS
        groups[-1].append(number)
        room -= size
    return groups


def _as_filler(batch: PackedBatch) -> PackedBatch:
    return replace(batch, is_masked=np.zeros_like(batch.is_masked), sample_ids=np.full_like(batch.sample_ids, -1))
