"""Lengths of the training sequences before and after expansion, and what padding them would waste."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exlm_dist.analysis import style
from exlm_dist.config import RunConfig
from exlm_dist.config.ratios import describe_masking
from exlm_dist.data.expansion import expanded_lengths
from exlm_dist.data.masking import sample_keys
from exlm_dist.data.opening import open_dataset
from exlm_dist.data.order import Order
from exlm_dist.data.recipe import Recipe
from exlm_dist.evaluation.history import History

#: Sequences that are counted, in training order.
SEQUENCES = 20000


@dataclass(frozen=True)
class Lengths:
    """Lengths in training order: `original` with BOS and EOS, `expanded` as the model reads them."""

    original: np.ndarray
    expanded: np.ndarray

    def padding_fraction(self, micro: int) -> float:
        """Fraction of padding if each micro-batch were padded to its longest expanded sequence."""
        whole = len(self.expanded) // micro * micro
        batches = self.expanded[:whole].reshape(-1, micro)
        return float(1 - batches.sum() / (batches.max(axis=1) * micro).sum()) if whole else float("nan")


def training_lengths(config: RunConfig, sequences: int = SEQUENCES) -> Lengths:
    """Lengths of the first sequences that training sees, masked as in its first step; DataError if there is no data."""
    dataset = open_dataset(Path(config.data.path), "train")
    count = min(sequences, max(len(dataset), config.batch.sequences))
    epochs, samples = Order.of(config.data, config.seed, len(dataset)).at(np.arange(count))
    payload = dataset.lengths[samples].astype(np.int64) * config.masking.copies
    recipe = Recipe.of(config, dataset.vocab_size).at(0)
    masks = recipe.num_masks(payload, sample_keys(config.seed, epochs, samples))
    return Lengths(payload + 2, expanded_lengths(payload, masks, config.model.states, config.model.anchors))


def plot_lengths(history: History, lengths: Lengths, folder: Path) -> Path:
    """Histogram before and after expansion, with the padding of packed and of padded batches."""
    config = history.config
    packed = history.series("perf/padding_fraction").values
    subtitle = (
        f"{history.name} ({history.kind}), {len(lengths.original)} sequences, "
        f"masked {describe_masking(config.masking)}: "
        f"{lengths.expanded.mean() / lengths.original.mean():.2f} times as many tokens after expansion"
    )
    with style.figure(8, 3.8, "Sequence lengths before and after expansion", subtitle) as made:
        axes = made.subplots()
        lowest, highest = int(lengths.original.min()), int(lengths.expanded.max())
        bins = np.arange(lowest - 0.5, highest + 0.5 + (width := -(-(highest - lowest + 1) // 60)), width)
        for values, name, colour in (
            (lengths.original, "original", style.COLOURS[0]),
            (lengths.expanded, "expanded", style.COLOURS[1]),
        ):
            axes.hist(values, bins=bins, histtype="stepfilled", color=colour, alpha=0.35)
            axes.hist(
                values,
                bins=bins,
                histtype="step",
                color=colour,
                label=f"{name}: mean {values.mean():.0f}, longest {values.max()}",
            )
        style.label(axes, _padding(lengths, config.batch.micro, packed), "tokens in the sequence", "sequences")
        axes.legend()
        return style.save(made, folder, "lengths")


def _padding(lengths: Lengths, micro: int, packed: np.ndarray) -> str:
    padded = f"Padding: {lengths.padding_fraction(micro):.0%} if padded to the longest of {micro}"
    return padded + (f", {np.nanmean(packed):.1%} packed as in this run" if len(packed) else "")
