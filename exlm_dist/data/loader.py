"""From a global step to this rank's packed micro-batches, and the fixed batches of evaluation.

Global batch t is a pure function of t, the order of the samples and the lengths in the index: it does not depend on
ranks, processes or earlier steps. `rank` and `world` only choose which of its micro-batches are read and packed here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from exlm_dist.config import check_division
from exlm_dist.data.batch import PackedBatch
from exlm_dist.data.expansion import expanded_lengths
from exlm_dist.data.masking import sample_keys
from exlm_dist.data.mixed_order import MixedOrder
from exlm_dist.data.order import Order
from exlm_dist.data.packing import plan_micro_batches
from exlm_dist.data.prefetch import Prefetcher
from exlm_dist.data.recipe import Dataset, Recipe

#: Positions whose samples are worked out at once: enough to hide numpy's cost per call.
RUN_POSITIONS = 4096


@dataclass(frozen=True)
class StepBatches:
    """One global batch: this rank's part of it, and sizes of the whole, which every rank computes itself."""

    step: int
    micro_batches: list[PackedBatch]  # of this rank
    num_sequences: int  # over all ranks, like the next four
    num_targets: int
    num_masked: int
    num_original_tokens: int  # unexpanded, BOS and EOS included
    num_tokens: int  # expanded
    wait_seconds: float  # time the caller waited for this step
    source_tokens: tuple[int, ...] = ()  # num_original_tokens of each source

    @property
    def padding_fraction(self) -> float:
        """Fraction of this rank's tokens that is bucket padding."""
        return 1.0 - sum(b.num_tokens for b in self.micro_batches) / sum(len(b.input_ids) for b in self.micro_batches)


@dataclass(frozen=True)
class _Run:
    """What is known of the samples of a few consecutive steps before any is read: int64 [steps, global batch] each, and
    their keys uint64."""

    number: int
    epochs: np.ndarray
    samples: np.ndarray
    keys: np.ndarray
    lengths: np.ndarray


class Loader:
    """Training data: `step(t)` is global batch t, in any order; a thread prepares `prefetch` more (0: none)."""

    def __init__(
        self,
        dataset: Dataset,
        recipe: Recipe,
        *,
        order: Order | MixedOrder,
        global_batch: int,
        rank: int,
        world: int,
        prefetch: int,
    ) -> None:
        """`global_batch` sequences per step over `world` data-parallel ranks, of which this is `rank`.

        ConfigError if world x micro does not divide the global batch or a sequence may become too long, DataError for
        empty sequences.
        """
        check_division(global_batch, recipe.micro, world)
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not below world size {world}")
        recipe.check_lengths(dataset.lengths)
        self._dataset, self._recipe, self._order = dataset, recipe, order
        self._global_batch, self._num_micro = global_batch, global_batch // recipe.micro
        self._world = world
        self._mine = self._indices_of(rank)
        self._steps_of_run = max(1, RUN_POSITIONS // global_batch)
        self._run: _Run | None = None  # of the step that was asked for last
        self._prefetcher = Prefetcher(self._build, prefetch)

    def step(self, t: int) -> StepBatches:
        """Global batch t (from 0). Raises whatever reading it raised, in this thread or in the background."""
        start = time.perf_counter()
        batches = self._prefetcher.get(t)
        return replace(batches, wait_seconds=time.perf_counter() - start)

    def close(self) -> None:
        """End the background thread."""
        self._prefetcher.close()

    def first_of(self, t: int, rank: int) -> PackedBatch:
        """The first micro-batch of global batch t on data-parallel rank `rank`, read and packed here and now."""
        return self._built(t, self._indices_of(rank)[:1]).micro_batches[0]

    def _indices_of(self, rank: int) -> range:
        return range(rank * self._num_micro // self._world, (rank + 1) * self._num_micro // self._world)

    def _build(self, t: int) -> StepBatches:
        if self._order.block:
            total = self._global_batch
            self._dataset.preload(self._order.upcoming(np.arange(t * total, (t + 1) * total)))
        return self._built(t, self._mine)

    def _built(self, t: int, indices: range) -> StepBatches:
        recipe, total = self._recipe.at(t), self._global_batch
        epochs, samples, keys, lengths = self._known_of(t)
        counts = recipe.num_masks(lengths, keys)
        expanded = expanded_lengths(lengths, counts, recipe.states, recipe.anchors)
        plan = plan_micro_batches(expanded, self._num_micro)
        mine = [plan[index] for index in indices]
        return StepBatches(
            step=t,
            micro_batches=recipe.batches(
                self._dataset, mine, samples, lengths, epochs, keys, step=t, indices=list(indices)
            ),
            num_sequences=total,
            num_targets=int(counts.sum()) + 2 * recipe.anchors * total,
            num_masked=int(counts.sum()),
            num_original_tokens=int(lengths.sum()) + 2 * total,
            num_tokens=int(expanded.sum()),
            wait_seconds=0.0,
            source_tokens=_tokens_of_sources(samples, lengths + 2, self._order.starts),
        )

    def _known_of(self, t: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Epochs, samples, keys and payload lengths of global batch t."""
        number, step = divmod(t, self._steps_of_run)
        run = self._run  # another thread may set it meanwhile
        if run is None or run.number != number:
            run = self._run = self._run_of(number)
        return run.epochs[step], run.samples[step], run.keys[step], run.lengths[step]

    def _run_of(self, number: int) -> _Run:
        count = self._steps_of_run * self._global_batch
        epochs, samples = self._order.at(np.arange(number * count, (number + 1) * count))
        keys = sample_keys(self._order.seed, epochs, samples)
        lengths = self._dataset.lengths[samples].astype(np.int64)
        shape = (self._steps_of_run, self._global_batch)
        return _Run(number, *(values.reshape(shape) for values in (epochs, samples, keys, lengths)))


def _tokens_of_sources(samples: np.ndarray, tokens: np.ndarray, starts: np.ndarray) -> tuple[int, ...]:
    """Sums of `tokens` (int64[m]) of the samples (int64[m]) of each source, whose first ones are `starts`."""
    if len(starts) == 2:
        return (int(tokens.sum()),)
    sources = np.searchsorted(starts, samples, side="right") - 1
    return tuple(np.bincount(sources, tokens, minlength=len(starts) - 1).astype(np.int64).tolist())


def eval_batches(dataset: Dataset, recipe: Recipe, *, sequences: int, rank: int, world: int) -> Iterator[PackedBatch]:
    """This rank's batches over the first `sequences` samples (all, if the split has fewer).

    Masks depend on the sample id alone (seed 0, epoch 0): with `Recipe.for_evaluation` every model and run predicts the
    same positions. Micro-batches do not depend on `world`. Every rank yields equally many, so that collectives in a
    forward pass match: if they do not divide evenly, a rank's last one is a filler (nothing masked, sample ids -1),
    which must not be counted.
    """
    samples = np.arange(min(sequences, len(dataset)), dtype=np.int64)
    built = _Evaluation(dataset, recipe, samples, seed=0)
    for first in range(0, len(built.plan), world):
        index = first + rank
        batch = built.batch(index)
        yield batch if index < len(built.plan) else _as_filler(batch)


def chosen_batches(dataset: Dataset, recipe: Recipe, samples: np.ndarray, *, seed: int) -> Iterator[PackedBatch]:
    """All batches over the given samples, masked by (seed, sample id): those of seed 0 as `eval_batches` has them."""
    built = _Evaluation(dataset, recipe, samples, seed)
    return (built.batch(index) for index in range(len(built.plan)))


def evaluation_keys(samples: np.ndarray, seed: int) -> np.ndarray:
    """Keys of the masks of every evaluation with this seed, uint64 [n]."""
    return sample_keys(seed, np.zeros_like(samples), samples)


class _Evaluation:
    """The micro-batches of an evaluation."""

    def __init__(self, dataset: Dataset, recipe: Recipe, samples: np.ndarray, seed: int) -> None:
        recipe.check_lengths(dataset.lengths[samples])
        self._dataset, self._recipe, self._samples = dataset, recipe, samples
        self._keys = evaluation_keys(samples, seed)
        self._lengths = dataset.lengths[samples].astype(np.int64)
        counts = recipe.num_masks(self._lengths, self._keys)
        expanded = expanded_lengths(self._lengths, counts, recipe.states, recipe.anchors)
        self.plan = plan_micro_batches(expanded, -(-len(samples) // recipe.micro))

    def batch(self, index: int) -> PackedBatch:
        """Number `index` of the plan; beyond its end the first one again."""
        rows = self.plan[index if index < len(self.plan) else 0]
        epochs = np.zeros_like(self._samples)
        (batch,) = self._recipe.batches(
            self._dataset, [rows], self._samples, self._lengths, epochs, self._keys, step=0, indices=[index]
        )
        return batch


def _as_filler(batch: PackedBatch) -> PackedBatch:
    return replace(batch, is_masked=np.zeros_like(batch.is_masked), sample_ids=np.full_like(batch.sample_ids, -1))
