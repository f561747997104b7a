"""Attention with other tiles than those that ship, beside them: `python benchmarks/attention_tiles.py`, on a GPU.

For choosing tiles: the tables are only printed. What wins belongs in `exlm_dist/kernels/attention/schedule.py`.
"""

from __future__ import annotations

import argparse
import gc
import sys

import torch
from kernels import on_gpu, table
from kernels_attention import Batch
from timing import measure, surroundings


def main(argv: list[str] | None = None) -> int:
    """Measure; 1 if a side failed its check."""
    options, device = on_gpu(argparse.ArgumentParser(description=__doc__.splitlines()[0]), argv)
    print(", ".join(f"{name} {value}" for name, value in surroundings(options.commit, device).items()))
    failed = 0
    for lengths in [[20, 9]] if options.toy else [[191] * 512, [746] * 128]:
        for dropout in (0.0, 0.1):
            dtype = torch.float32 if options.toy else torch.bfloat16
            case = Batch(lengths, 2 if options.toy else 12, 64, device, dtype, dropout, compiled=False).variants("full")
            figures = measure(case, device, 1 if options.toy else 7, 1 if options.toy else 60)
            failed += sum(bool(one.fault) for one in figures)
            print(table(case, figures), flush=True)
            gc.collect()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
