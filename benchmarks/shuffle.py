"""How well `data.shuffle: windows` mixes, beside the full permutation: statistics of sample ids alone, nothing is read.

    python benchmarks/shuffle.py                         # 10^7 and 10^9 samples, some sizes of blocks and windows
    python benchmarks/shuffle.py --samples 100000000

Two kinds of label stand for what is alike in neighbouring samples: `source`, four sources one after another in the
data, and `topic`, drawn anew for every run of 1,000 samples. Columns, over the first 2^22 positions of an epoch:

spread    standard deviation of the fraction of a label in a batch of 256, divided by that of independent draws
drift     the same for 64 batches in a row
relation  correlation of the label with that of 1, 256 and 65,536 positions later (topic: of 1 later)
near      probability that the next sample is one of the nearest million, minus that of independent draws
distance  mean distance of consecutive samples / samples (independent draws: 0.3333)
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from exlm_dist.data.counter_rng import hash_of, uniform  # noqa: E402
from exlm_dist.data.order import Order  # noqa: E402

POSITIONS, CHUNK, BATCH, TOPIC, NEAR = 1 << 22, 1 << 16, 256, 1000, 500_000
SHAPES = [(0, 1), (256, 256), (256, 1024), (512, 256), (512, 512), (512, 1024), (1024, 256), (4096, 64), (700_000, 16)]


def spread(label: np.ndarray, fraction: float, size: int) -> float:
    """Standard deviation of the mean of `label` over `size` positions, relative to that of independent draws."""
    means = label[: len(label) // size * size].reshape(-1, size).mean(1)
    return float(means.std() / np.sqrt(fraction * (1 - fraction) / size))


def relation(label: np.ndarray, fraction: float, lag: int) -> float:
    """Correlation of the label with that `lag` positions later."""
    centred = label - fraction
    return float((centred[:-lag] * centred[lag:]).mean() / (fraction * (1 - fraction)))


def statistics(num_samples: int, block: int, window: int) -> dict[str, str]:
    """One row of the table."""
    order = Order(0, num_samples, block, window)
    start = time.perf_counter()
    count = min(POSITIONS, num_samples) // CHUNK * CHUNK
    samples = np.concatenate([order.at(np.arange(first, first + CHUNK))[1] for first in range(0, count, CHUNK)])
    seconds = time.perf_counter() - start
    source = (samples < num_samples // 4).astype(np.float64)
    topic = (uniform(hash_of(samples // TOPIC)) < 0.25).astype(np.float64)
    distances = np.abs(np.diff(samples))
    independent = 2 * NEAR / num_samples - (NEAR / num_samples) ** 2
    values = {
        "samples": f"{num_samples:.0e}",
        "block": "full" if block == 0 else str(block),
        "window": str(window),
        "source spread": f"{spread(source, 0.25, BATCH):.3f}",
        "source drift": f"{spread(source, 0.25, 64 * BATCH):.2f}",
        "source relation": " ".join(f"{relation(source, 0.25, lag):+.4f}" for lag in (1, 256, 65_536)),
        "topic spread": f"{spread(topic, 0.25, BATCH):.3f}",
        "topic drift": f"{spread(topic, 0.25, 64 * BATCH):.2f}",
        "topic relation": f"{relation(topic, 0.25, 1):+.4f}",
        "near": f"{(distances <= NEAR).mean() - independent:+.4f}",
        "distance": f"{distances.mean() / num_samples:.4f}",
        "ns per id": f"{seconds / count * 1e9:.0f}",
    }
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[10**7, 10**9], help="sizes of the data")
    args = parser.parse_args()
    writer = None
    for num_samples in args.samples:
        for block, window in SHAPES:
            row = statistics(num_samples, block, window)
            if writer is None:
                writer = csv.DictWriter(sys.stdout, list(row))
                writer.writeheader()
            writer.writerow(row)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
