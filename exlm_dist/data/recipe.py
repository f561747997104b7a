"""How sequences become packed micro-batches: read, masked, expanded and packed, a few micro-batches at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from exlm_dist.config import RunConfig, check_length, longest_expansion
from exlm_dist.config.phases import masking_of
from exlm_dist.config.ratios import Schedule, largest_ratio, ratio_at
from exlm_dist.data.batch import PackedBatch
from exlm_dist.data.expansion import Expanded, expand, wrap
from exlm_dist.data.mask_groups import Grouping
from exlm_dist.data.masking import mask_batch, num_masks
from exlm_dist.data.packing import pack_each
from exlm_dist.data.shard_index import Lengths
from exlm_dist.tokenizers.tokenizer import Tokenizer
from exlm_dist.utils.errors import ConfigError, DataError

# Masking and expansion work on whole micro-batches of up to this many payload tokens at once: enough to hide numpy's
# cost per call, few enough for the arrays to stay in a core's cache.
CHUNK_TOKENS = 16_384


class Dataset(Protocol):
    """What a recipe reads from; `exlm_dist.data.shards.ShardDataset` is one."""

    @property
    def lengths(self) -> np.ndarray | Lengths: ...

    def __len__(self) -> int: ...

    def preload(self, blocks: list[int]) -> None: ...

    def read(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True)
class Recipe:
    """The settings that turn sequences into packed micro-batches; the same for every batch of a run."""

    states: int  # k per expanded position
    anchors: bool
    ratio: float  # fraction of the tokens that is masked
    keep: float  # fractions of the masked positions that keep their token, or get a random one
    random: float
    vocab_size: int
    max_positions: int  # longest expanded sequence
    bucket: int  # packed sizes are rounded up to a multiple of it
    micro: int  # sequences in a micro-batch
    schedule: Schedule = ()  # how the ratio changes from step to step
    spread: float = 0.0  # the ratio of each sequence is uniform in ratio +- spread
    grouping: Grouping | None = None  # what is masked as a whole; None: single tokens

    def __post_init__(self) -> None:
        if self.keep + self.random > 1:
            raise ConfigError(
                f"masking.keep {self.keep} + masking.random {self.random} is more than 1: "
                "both are fractions of the masked tokens"
            )

    @classmethod
    def of(cls, config: RunConfig, vocab_size: int, tokenizer: Tokenizer | None = None) -> Recipe:
        """The recipe of training. Without the tokenizer it cannot mask whole words, atoms or rings, only tell lengths.
        ConfigError for a unit of masking that the tokenizer's domain lacks."""
        masking = masking_of(config)
        return cls(
            states=config.model.states,
            anchors=config.model.anchors,
            ratio=masking.ratio,
            keep=masking.keep,
            random=masking.random,
            vocab_size=vocab_size,
            max_positions=config.model.max_positions,
            bucket=config.data.bucket,
            micro=config.batch.micro,
            schedule=masking.schedule,
            spread=masking.spread,
            grouping=Grouping.of(masking, tokenizer),
        )

    @classmethod
    def for_evaluation(cls, config: RunConfig, vocab_size: int) -> Recipe:
        """The recipe of every evaluation: `masking.eval_ratio`, single tokens, and all masked positions show MASK."""
        training = cls.of(config, vocab_size)
        return replace(
            training, ratio=config.masking.eval_ratio, schedule=(), spread=0.0, grouping=None, keep=0.0, random=0.0
        )

    def at(self, step: int) -> Recipe:
        """The recipe of one global batch: with the ratio that its schedule has there."""
        return replace(self, ratio=ratio_at(self.ratio, self.schedule, step), schedule=()) if self.schedule else self

    def num_masks(self, lengths: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """int64[B]: masked tokens of each sequence, see `masking.num_masks`."""
        return num_masks(lengths, keys, self.ratio, self.spread)

    @property
    def _largest_ratio(self) -> float:
        """Of any sequence of any step."""
        return largest_ratio(self.ratio, self.schedule) + self.spread

    def longest(self, lengths: np.ndarray | Lengths) -> int:
        """The most positions to which a sequence of these lengths (BOS and EOS not counted) can expand."""
        most = int(lengths.max(initial=0)) + 2
        return longest_expansion(most, ratio=self._largest_ratio, states=self.states, anchors=self.anchors)

    def check_lengths(self, lengths: np.ndarray | Lengths) -> None:
        """DataError if a sequence is empty, ConfigError if one could exceed `max_positions` when expanded."""
        if len(lengths) == 0 or lengths.min() < 1:
            raise DataError("the data has no sequences, or empty ones: prepare it again")
        check_length(
            int(lengths.max()) + 2,
            ratio=self._largest_ratio,
            states=self.states,
            anchors=self.anchors,
            max_positions=self.max_positions,
        )

    def batches(
        self,
        dataset: Dataset,
        plan: list[np.ndarray],
        samples: np.ndarray,
        lengths: np.ndarray,
        epochs: np.ndarray,
        keys: np.ndarray,
        *,
        step: int,
        indices: list[int],
    ) -> list[PackedBatch]:
        """Read, mask, expand and pack micro-batches: `plan` has the rows of `samples`, `lengths` (int64, as in the
        index), `epochs` and `keys` of each.

        `indices`: those of the micro-batches within the global batch.
        """
        result: list[PackedBatch] = []
        for group in _groups([int(lengths[rows].sum()) for rows in plan]):
            rows = np.concatenate([plan[i] for i in group])
            expanded = self._expanded(dataset, samples[rows], lengths[rows], keys[rows])
            result += pack_each(
                expanded,
                np.cumsum([0, *(len(plan[i]) for i in group)]),
                states=self.states,
                bucket=self.bucket,
                sample_ids=[samples[plan[i]] for i in group],
                epochs=[epochs[plan[i]] for i in group],
                step=step,
                indices=[indices[i] for i in group],
            )
        return result

    def _expanded(self, dataset: Dataset, samples: np.ndarray, lengths: np.ndarray, keys: np.ndarray) -> Expanded:
        tokens, read_lengths = dataset.read(samples)
        assert np.array_equal(read_lengths, lengths), "a data set returns the lengths of its index"
        self._check_tokens(tokens, samples, lengths)
        masks = mask_batch(
            tokens,
            lengths,
            keys,
            ratio=self.ratio,
            keep=self.keep,
            random=self.random,
            vocab_size=self.vocab_size,
            spread=self.spread,
            grouping=self.grouping,
        )
        return expand(wrap(tokens, lengths, masks, self.anchors), self.states)

    def _check_tokens(self, tokens: np.ndarray, samples: np.ndarray, lengths: np.ndarray) -> None:
        if tokens.max() >= self.vocab_size:
            index = int(tokens.argmax())
            sample = samples[np.searchsorted(np.cumsum(lengths), index, side="right")]
            raise DataError(
                f"token id {tokens[index]} in sample {sample}, but the vocabulary has {self.vocab_size} entries: "
                "the data was prepared with another tokenizer"
            )


def _groups(sizes: list[int]) -> list[list[int]]:
    """Runs of consecutive micro-batches with at most CHUNK_TOKENS payload tokens in all, or a single larger one."""
    groups: list[list[int]] = []
    room = 0
    for i, size in enumerate(sizes):
        if room < size:
            groups.append([])
            room = CHUNK_TOKENS
        groups[-1].append(i)
        room -= size
    return groups
