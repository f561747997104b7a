"""The order of several sources that are mixed: which sample of which source is at which position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from exlm_dist.config.schema import RunConfig
from exlm_dist.data.counter_rng import PURPOSE_SOURCE, hash_of
from exlm_dist.data.mixed import MixedDataset
from exlm_dist.data.mixture import Mixture
from exlm_dist.data.order import Order
from exlm_dist.data.shards import ShardDataset


@dataclass(frozen=True)
class MixedOrder:
    """The orders of the sources, each with epochs of its own, taken as the mixture says. A sample is known by its
    number among the samples of all sources, one after another; so is a block."""

    seed: int
    mixture: Mixture
    orders: tuple[Order, ...]

    @classmethod
    def of(cls, config: RunConfig, sizes: Sequence[int], forms: Sequence[int] = ()) -> MixedOrder:
        """The order of training over sources with so many samples in an epoch, and so many forms of each (default 1).
        The first source has the order that it would have alone; that of no other is the same if they have equally many
        samples. ConfigError as `Mixture.of`."""
        seeds = [config.seed] + [_seed_of(config.seed, source) for source in range(1, len(sizes))]
        of_each = zip(seeds, sizes, forms or [1] * len(sizes), strict=True)
        orders = tuple(Order.of(config.data, *numbers) for numbers in of_each)
        return cls(config.seed, Mixture.of(config, sizes), orders)

    @property
    def block(self) -> int:
        """Samples of a block; 0 where samples are read one by one."""
        return self.orders[0].block

    @property
    def starts(self) -> np.ndarray:
        """int64[number of sources + 1]: the first sample of each source, and the number of all samples."""
        return np.cumsum([0] + [order.num_samples * order.forms for order in self.orders], dtype=np.int64)

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epoch of its source and sample id of each global position, int64[m] each; see `Order.at`."""
        sources, ordinals = self.mixture.at(positions)
        epochs, samples = np.empty_like(ordinals), np.empty_like(ordinals)
        for source, (order, first) in enumerate(zip(self.orders, self.starts)):
            here = sources == source
            if here.any():
                epochs[here], own = order.at(ordinals[here])
                samples[here] = first + own
        return epochs, samples

    def upcoming(self, positions: np.ndarray) -> list[int]:
        """Blocks to read ahead while these positions are used; see `Order.upcoming`."""
        sources, ordinals = self.mixture.at(positions)
        blocks, first = [], 0
        for source, order in enumerate(self.orders):
            blocks += [first + block for block in order.upcoming(ordinals[sources == source])]
            first += order.num_blocks * order.forms
        return blocks


def training_order(config: RunConfig, data: ShardDataset | MixedDataset) -> Order | MixedOrder:
    """The order in which a run reads its data."""
    if isinstance(data, MixedDataset):
        return MixedOrder.of(config, data.sizes, [source.forms for source in data.sources.values()])
    return Order.of(config.data, config.seed, data.epoch_size, data.forms)


def _seed_of(seed: int, source: int) -> int:
    return int(hash_of(PURPOSE_SOURCE, seed, source)[0] >> np.uint64(1))
