"""Our loader, up to packed batches, beside reading the same sequences with webdataset, one sample per member.

    python benchmarks/data.py                    # synthetic: lengths of drug-like SMILES, and text blocks of 126 tokens
    python benchmarks/data.py --data data/zinc   # the training split of a prepared folder

Ours does everything that training needs (order of the epoch, reading with checksums, masking, expansion to k states,
packing; no prefetch). webdataset only reads, in file order, with `.decode()` as users normally do and, as a harder
opponent, without it. One process on one core, warm page cache, the contenders taking turns; before anything is timed,
both must have delivered the same tokens. Writes a CSV with hardware, versions and commit.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import webdataset as wds  # noqa: E402

from exlm_dist.data.loader import Loader  # noqa: E402
from exlm_dist.data.manifest import MANIFEST, SCHEMA, sealed  # noqa: E402
from exlm_dist.data.order import Order  # noqa: E402
from exlm_dist.data.recipe import Recipe  # noqa: E402
from exlm_dist.data.shards import ShardDataset, token_dtype  # noqa: E402
from exlm_dist.prepare.shard_writer import ShardWriter  # noqa: E402
from exlm_dist.tokenizers.tokenizer import NUM_SPECIAL  # noqa: E402

OURS, READING = "ours, packed batches", "ours, reading only"
DECODED, RAW = "webdataset, decoded", "webdataset, raw bytes"
CONTENDERS = (OURS, READING, DECODED, RAW)
MEMBERS_PER_TAR = 10_000
SMALL_NPY_HEADER = 128


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="prepared folder; default: synthetic corpora")
    parser.add_argument("--sequences", type=int, default=20_480, help="sequences read in one timed pass")
    parser.add_argument("--repeats", type=int, default=7, help="timed passes of each contender")
    parser.add_argument("--batch", type=int, default=256, help="sequences per step")
    parser.add_argument("--micro", type=int, default=32, help="sequences per micro-batch")
    parser.add_argument("--states", type=int, default=4)
    default = ROOT / "benchmarks" / "results" / f"data_{date.today().isoformat()}.csv"
    parser.add_argument("--out", type=Path, default=default, help="CSV to write")
    args = parser.parse_args()
    if args.repeats < 5:
        parser.error("--repeats must be at least 5: fewer say nothing about spread")
    return args


def synthetic(folder: Path, name: str, count: int) -> ShardDataset:
    """A prepared folder of random ids, opened, with the lengths of drug-like SMILES or of text blocks."""
    generator = np.random.default_rng(0)
    vocabulary = {"smiles": 120, "text": 32_000}[name]
    lengths = generator.normal(44, 9, count).astype(np.int64).clip(8, 110) if name == "smiles" else np.full(count, 126)
    writer = ShardWriter(folder, "train", vocab_size=vocabulary)
    writer.write(generator.integers(NUM_SPECIAL, vocabulary, lengths.sum()), lengths)
    shards = [entry.as_dict() for entry in writer.close()]
    manifest = {
        "schema": SCHEMA,
        "domain": name,
        "vocab_size": vocabulary,
        "max_length": int(lengths.max()),
        "splits": {"train": {"sequences": count, "shards": shards}, "valid": {"sequences": 0, "shards": []}},
        "tokenizer": {"fingerprint": "none", "files": {}},
    }
    (folder / MANIFEST).write_text(json.dumps(sealed(manifest)))
    return ShardDataset.open(folder, "train")


def write_one_per_member(dataset: ShardDataset, count: int, folder: Path) -> list[str]:
    """The first `count` sequences as a plain WebDataset, one member `NNN.tokens.npy` each; the names of the tars."""
    folder.mkdir()
    tokens, lengths = dataset.read(np.arange(count))
    small = tokens.astype(token_dtype(dataset.vocab_size))
    with wds.ShardWriter(str(folder / "%06d.tar"), maxcount=MEMBERS_PER_TAR, verbose=0) as writer:
        for sample, sequence in enumerate(np.split(small, np.cumsum(lengths)[:-1])):
            writer.write({"__key__": f"{sample:09d}", "tokens.npy": sequence})
    return sorted(str(path) for path in folder.glob("*.tar"))


class FirstSequences:
    """The first `count` sequences of a data set, so that both sides read the same ones."""

    def __init__(self, dataset: ShardDataset, count: int) -> None:
        self.lengths = dataset.lengths[:count]
        self.read = dataset.read

    def __len__(self) -> int:
        return len(self.lengths)


def contenders(
    dataset: ShardDataset, count: int, tars: list[str], args: argparse.Namespace
) -> dict[str, Callable[[], int]]:
    """For each contender, one pass over the first `count` sequences; returns the number of tokens it delivered."""
    longest = int(dataset.lengths[:count].max())
    itemsize = token_dtype(dataset.vocab_size).itemsize
    loader = Loader(
        FirstSequences(dataset, count),
        Recipe(
            states=args.states,
            anchors=True,
            ratio=0.15,
            keep=0.0,
            random=0.0,
            vocab_size=dataset.vocab_size,
            max_positions=(longest + 2) * args.states,
            bucket=64,
            micro=args.micro,
        ),
        order=Order(0, count),
        global_batch=args.batch,
        rank=0,
        world=1,
        prefetch=0,
    )

    def ours() -> int:
        batches = (batch for step in range(count // args.batch) for batch in loader.step(step).micro_batches)
        return sum(batch.num_original_tokens - 2 * batch.num_sequences for batch in batches)

    def reading() -> int:
        order = np.random.default_rng(0).permutation(count).reshape(-1, args.batch)
        return sum(len(dataset.read(ids)[0]) for ids in order)

    def decoded() -> int:
        return sum(len(sample["tokens.npy"]) for sample in wds.WebDataset(tars, shardshuffle=False).decode())

    def raw() -> int:
        samples = (sample["tokens.npy"] for sample in wds.WebDataset(tars, shardshuffle=False))
        return sum((len(content) - SMALL_NPY_HEADER) // itemsize for content in samples)

    return {OURS: ours, READING: reading, DECODED: decoded, RAW: raw}


def timed(passes: dict[str, Callable[[], int]], repeats: int, tokens: int) -> dict[str, list[float]]:
    """Seconds of every timed pass, the contenders taking turns in changing order; each must deliver `tokens` tokens."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(repeats + 1):
        for name in CONTENDERS if turn % 2 else CONTENDERS[::-1]:
            start = time.perf_counter()
            delivered = passes[name]()
            duration = time.perf_counter() - start
            if delivered != tokens:
                raise SystemExit(f"{name} delivered {delivered} tokens, the index says {tokens}")
            if turn:  # the first pass warms up
                seconds[name].append(duration)
    return seconds


def check_same_tokens(dataset: ShardDataset, count: int, tars: list[str]) -> None:
    """SystemExit unless both sides have the same sequences."""
    tokens, _ = dataset.read(np.arange(count))
    theirs = np.concatenate([sample["tokens.npy"] for sample in wds.WebDataset(tars, shardshuffle=False).decode()])
    if not np.array_equal(tokens, theirs):
        raise SystemExit("webdataset did not deliver the sequences that were written")


def measure(name: str, dataset: ShardDataset, args: argparse.Namespace, folder: Path) -> list[dict[str, str]]:
    """One row per contender."""
    count = min(args.sequences, len(dataset)) // args.batch * args.batch
    if count == 0:
        raise SystemExit(f"{name}: {len(dataset)} sequences do not fill a batch of {args.batch}; lower --batch")
    tars = write_one_per_member(dataset, count, folder / f"{name}-members")
    check_same_tokens(dataset, count, tars)
    tokens = int(dataset.lengths[:count].sum(dtype=np.int64))
    seconds = timed(contenders(dataset, count, tars, args), args.repeats, tokens)
    rows = []
    for contender in CONTENDERS:
        rates = sorted(count / duration for duration in seconds[contender])
        ratios = sorted(own / duration for own, duration in zip(seconds[contender], seconds[OURS]))
        rows.append(
            {
                "corpus": name,
                "contender": contender,
                "sequences": str(count),
                "mean_length": f"{tokens / count:.1f}",
                "median_per_s": f"{statistics.median(rates):.0f}",
                "min_per_s": f"{rates[0]:.0f}",
                "max_per_s": f"{rates[-1]:.0f}",
                "tokens_per_s": f"{statistics.median(rates) * tokens / count:.0f}",
                "ours_is_times_faster": f"{statistics.median(ratios):.2f}",
                "times_min": f"{ratios[0]:.2f}",
                "times_max": f"{ratios[-1]:.2f}",
            }
        )
    return rows


def provenance(args: argparse.Namespace) -> dict[str, str]:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "repeats": str(args.repeats),
        "batch": str(args.batch),
        "micro": str(args.micro),
        "states": str(args.states),
        "date": date.today().isoformat(),
        "commit": commit.strip(),
        "cpu": f"{cpu}, 1 of {os.cpu_count()} cores",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "webdataset": wds.__version__,
    }


def report(rows: list[dict[str, str]], args: argparse.Namespace) -> None:
    line = "{:8} {:22} {:>10} {:>19} {:>11} {:>25}"
    print(line.format("corpus", "", "samples/s", "(range)", "tokens/s", "ours is x faster (range)"))
    for row in rows:
        rates = f"({row['min_per_s']}..{row['max_per_s']})"
        times = f"{row['ours_is_times_faster']} ({row['times_min']}..{row['times_max']})"
        print(line.format(row["corpus"], row["contender"], row["median_per_s"], rates, row["tokens_per_s"], times))
    origin = provenance(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *origin])
        writer.writeheader()
        writer.writerows({**row, **origin} for row in rows)
    print(args.out)


def main() -> None:
    args = options()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    rows: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.data:
            rows += measure(args.data.name, ShardDataset.open(args.data, "train"), args, folder)
        else:
            for name in ("smiles", "text"):
                rows += measure(name, synthetic(folder / name, name, args.sequences), args, folder)
    report(rows, args)


if __name__ == "__main__":
    main()
