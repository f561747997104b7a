"""A million samples through the loader: do memory, descriptors, threads and shared memory stay where they are?

    python benchmarks/data_soak.py --prepared data/zinc --indexed data/zinc-index --remote data/zinc

Every 10,000 samples a row is added to the CSV: resident memory of the process and of its workers, open descriptors,
threads, files in /dev/shm. Prepared data is read in windows, indexed tars by `--workers` processes, `--remote` (a
prepared folder) from a web server on this machine through the cache on disk. Printed is the slope of each over the
second half, by least squares, for a million samples.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
from range_server import serving  # noqa: E402

from exlm_dist.data.block_cache import CACHE  # noqa: E402
from exlm_dist.data.loader import Loader  # noqa: E402
from exlm_dist.data.opening import open_dataset  # noqa: E402
from exlm_dist.data.order import Order  # noqa: E402
from exlm_dist.data.recipe import Recipe  # noqa: E402

BATCH, EVERY, BLOCK, WINDOW = 250, 10_000, 512, 256
MEASURED = ("memory_mb", "of_workers_mb", "descriptors", "threads", "shared_files")


def state() -> dict[str, float]:
    """What this process and its children hold now."""
    own = Path("/proc/self")
    children = (own / "task" / str(os.getpid()) / "children").read_text().split()
    return {
        "memory_mb": resident(os.getpid()),
        "of_workers_mb": sum(resident(int(child)) for child in children),
        "descriptors": len(os.listdir(own / "fd")),
        "threads": len(os.listdir(own / "task")),
        "shared_files": len(os.listdir("/dev/shm")),
    }


def resident(process: int) -> float:
    """Resident memory in 10^6 bytes."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def soak(folder: str, samples: int, workers: int) -> Iterator[dict[str, float]]:
    """The state after every EVERY samples."""
    data = open_dataset(folder, "train", block=BLOCK, kept_blocks=2 * WINDOW, workers=workers)
    recipe = Recipe(
        states=4,
        anchors=True,
        ratio=0.15,
        keep=0.1,
        random=0.1,
        vocab_size=data.vocab_size,
        max_positions=(data.lengths.max() + 2) * 4,
        bucket=64,
        micro=BATCH // 2,
    )
    order = Order(0, len(data), BLOCK, WINDOW)
    loader = Loader(data, recipe, order=order, global_batch=BATCH, rank=0, world=1, prefetch=2)
    for step in range(samples // BATCH):
        loader.step(step)
        done = (step + 1) * BATCH
        if done % EVERY == 0:
            yield {"samples": done, **state()}
    loader.close()
    data.close()


def slopes(rows: list[dict[str, float]]) -> dict[str, float]:
    """Growth of each measure over the second half, for a million samples."""
    half = rows[len(rows) // 2 :]
    millions = np.array([row["samples"] for row in half]) / 1e6
    return {name: float(np.polyfit(millions, [row[name] for row in half], 1)[0]) for name in MEASURED}


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder on a web server of this machine, with an empty cache."""
    with tempfile.TemporaryDirectory() as cache, serving(folder) as server:
        os.environ[CACHE] = cache
        yield server.address


def run(kind: str, folder: str, args: argparse.Namespace) -> None:
    """Soak one kind of data, add its rows to the CSV, print its slopes."""
    rows: list[dict[str, float]] = []
    new, start = not args.out.exists(), time.perf_counter()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "a", newline="") as file:
        writer = csv.DictWriter(file, ["data", "samples", *MEASURED, "seconds", "date"])
        if new:
            writer.writeheader()
        for row in soak(folder, args.samples, args.workers if kind == "indexed" else 0):
            rows.append(row)
            seconds = f"{time.perf_counter() - start:.1f}"
            shown = {name: f"{value:.10g}" for name, value in row.items()}
            writer.writerow({"data": kind, **shown, "seconds": seconds, "date": date.today().isoformat()})
            file.flush()
    if len(rows) < 4:
        raise SystemExit(f"--samples {args.samples}: at least {4 * EVERY}, or there is no slope")
    last, per_million = rows[-1], slopes(rows)
    print(f"{kind}, {last['samples']:,.0f} samples in {time.perf_counter() - start:.0f} s:")
    for name in MEASURED:
        print(f"  {name:14} {last[name]:8.1f} at the end, {per_million[name]:+.2f} for a million samples", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepared", type=Path, help="folder of `exlm prepare`")
    parser.add_argument("--indexed", type=Path, help="folder of `exlm data index`")
    parser.add_argument("--remote", type=Path, help="folder of `exlm prepare`, to be served")
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    default = ROOT / "benchmarks" / "results" / f"data_soak_{date.today().isoformat()}.csv"
    parser.add_argument("--out", type=Path, default=default, help="CSV to add to")
    args = parser.parse_args(arguments)
    if args.prepared:
        run("prepared", str(args.prepared), args)
    if args.indexed:
        run("indexed", str(args.indexed), args)
    if args.remote:
        with served(args.remote) as address:
            run("remote", address, args)


if __name__ == "__main__":
    main()
