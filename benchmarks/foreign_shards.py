"""Tars of one sample per member: ours, by index in random order, beside webdataset's own reading in file order.

    python benchmarks/foreign_shards.py --shards 'zinc-*.tar' --index data/zinc-index

`--index` is what `exlm data index` wrote of these shards. Both sides tokenize every sample with the tokenizer of the
index, and both are measured without it too; ours checks every crc32. One process, warm page cache, rounds interleaved,
processor time of the process per sample. Prints a table: samples per processor second, median of the rounds.
"""

from __future__ import annotations

import argparse
import glob
import os
import statistics
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import webdataset as wds  # noqa: E402

from exlm_dist.data.opening import open_dataset  # noqa: E402
from exlm_dist.tokenizers import load_tokenizer  # noqa: E402

BATCH = 512


def contenders(index: Path, tars: list[str], ending: str) -> dict[str, Callable[[], int]]:
    """For each contender one pass over all its samples; returns how many there were."""
    dataset = open_dataset(index, "train", max_bad_records=0.0)
    order = np.random.default_rng(0).permutation(len(dataset))
    tokenizer = load_tokenizer(index)

    def ours() -> int:
        return sum(len(dataset.read(order[first : first + BATCH])[1]) for first in range(0, len(order), BATCH))

    def ours_bytes() -> int:
        count = 0
        for first in range(0, len(order), BATCH):
            for sample in np.sort(order[first : first + BATCH]).tolist():
                shard, record = dataset.record(sample)
                content = dataset._files.reader(shard)(int(record["size"]), int(record["offset"]))
                count += zlib.crc32(content) == record["crc"]
        return count

    def theirs(decode: bool) -> int:
        count = 0
        batch: list[str] = []
        for sample in wds.WebDataset(tars, shardshuffle=False):
            count += 1
            if decode:
                batch.append(sample[ending].decode())
                if len(batch) == BATCH:
                    tokenizer.encode_batch(batch)
                    batch = []
        return count

    return {
        "ours, tokenized, crc32, random order": ours,
        "webdataset, tokenized": lambda: theirs(True),
        "ours, bytes, crc32, random order, one by one": ours_bytes,
        "webdataset, bytes": lambda: theirs(False),
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True, help="pattern of the tars")
    parser.add_argument("--index", type=Path, required=True, help="folder of `exlm data index`")
    parser.add_argument("--ending", default="txt", help="of the members that are samples")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    sides = contenders(options.index, sorted(glob.glob(options.shards)), options.ending)
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(options.rounds + 1):
        for name, run in sides.items():
            start = time.process_time()
            rate = run() / (time.process_time() - start)
            if number:  # the first round warms the page cache
                found[name].append(rate)
    for name, rates in found.items():
        print(f"{name:<46} {statistics.median(rates):10,.0f} samples/s  ({min(rates):,.0f} to {max(rates):,.0f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
