"""`exlm embed` beside the plain loops that people write over a model of the transformers library of the same size.

    python benchmarks/embed.py --checkpoint runs/demo_smiles_exlm --file molecules.smi [--rows 10000] [--rounds 3]

The model of the loops is the export of the same checkpoint. One loop takes a molecule at a time, the other padded
batches of 32 in file order, both with the fast tokenizer and mean pooling. They read canonical molecules and leave the
vectors in memory; `exlm embed` makes the molecules canonical, with its worker processes, and writes a parquet table.
Before anything is timed, all must have given the same vectors. Then each round runs all sides in turn, in one process
with the same threads: `exlm embed` from the loaded checkpoint to the written table, the same from Python without worker
processes (`model.embed`), the loops, and the command from the shell, its start included. Seconds are medians over the
rounds, of the clock and of all processes' processor time; a ratio is that of the clock in one round to `exlm embed` in
the same round, its median. Needs transformers, and a machine without other work.
"""

from __future__ import annotations

import argparse
import csv
import functools
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

# The worker processes of `exlm embed` import the file that was started, this one: torch and what needs it are imported
# where they are used, as in the command, or each worker would take seconds to begin.
import numpy as np

if TYPE_CHECKING:
    from exlm_dist.inference.loading import LoadedCheckpoint

BATCH = 32
Embed = Callable[[list[str]], np.ndarray]


def plain_loop(folder: Path, batch: int) -> Embed:
    """The usual loop: tokenize, run, mean over the attention mask."""
    # transformers looks for a package `kernels`, and would take the file of that name beside this one for it.
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != Path(__file__).resolve().parent]
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()

    @torch.no_grad()
    def embed(texts: list[str]) -> np.ndarray:
        found = []
        for first in range(0, len(texts), batch):
            inputs = tokenizer(texts[first : first + batch], padding=True, return_tensors="pt")
            inputs.pop("token_type_ids", None)
            hidden = model(**inputs).last_hidden_state
            mask = inputs["attention_mask"][..., None]
            found.append(((hidden * mask).sum(1) / mask.sum(1)).numpy())
        return np.concatenate(found)

    return embed


def sides(
    loaded: LoadedCheckpoint, loops: dict[str, Embed], texts: list[str], scratch: Path, threads: int
) -> dict[str, Callable[[], object]]:
    """What is timed, by name; each embeds all texts."""
    from exlm_dist.inference.embed import embed_texts
    from exlm_dist.inference.embed_file import embed_file
    from exlm_dist.tables.records import InputOptions

    rows, table = scratch / "rows.smi", scratch / "out.parquet"
    rows.write_text("\n".join(texts) + "\n")
    command = [sys.executable, "-m", "exlm_dist.cli", "embed", rows, "--checkpoint", loaded.folder, "--out", table]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return {
        "exlm embed": lambda: embed_file(loaded, [str(rows)], table, options=InputOptions(), overwrite=True),
        "model.embed": lambda: embed_texts(loaded, texts),
        **{name: functools.partial(loop, texts) for name, loop in loops.items()},
        "the whole command": lambda: subprocess.run(
            [*command, "--overwrite"], check=True, timeout=1800, env=environment, stdout=subprocess.DEVNULL
        ),
    }


def check(loaded: LoadedCheckpoint, loops: dict[str, Embed], texts: list[str], scratch: Path) -> None:
    """All sides give the same vectors."""
    from exlm_dist.inference.embed import embed_texts
    from exlm_dist.inference.embed_file import embed_file
    from exlm_dist.tables.records import InputOptions

    rows, table = scratch / "few.smi", scratch / "few.npz"
    rows.write_text("\n".join(texts) + "\n")
    embed_file(loaded, [str(rows)], table, options=InputOptions())
    ours = np.load(table)["embedding"]
    results = {"model.embed": embed_texts(loaded, texts).vectors}
    results |= {name: loop(texts) for name, loop in loops.items()}
    for name, result in results.items():
        error = np.abs(result - ours).max()
        assert error < 1e-4, f"{name}: differs by {error}"


def seconds(function: Callable[[], object]) -> tuple[float, float]:
    """Of the clock, and of processor time, ended children included."""
    usages = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)

    def used() -> float:
        return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, usages))

    clock, processor = time.perf_counter(), used()
    function()
    return time.perf_counter() - clock, used() - processor


def main() -> None:
    import torch

    from exlm_dist.export.hf.hf_folder import export_hf
    from exlm_dist.inference.loading import load_checkpoint
    from exlm_dist.tables.records import InputOptions, expand_inputs, read_rows
    from exlm_dist.tokenizers.encoding import normalised

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--file", required=True)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/embed_{date.today()}.csv"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    loaded = load_checkpoint(options.checkpoint, device="cpu")
    (path,) = expand_inputs([options.file])
    rows = [row.text for row in read_rows(path, InputOptions(), loaded.tokenizer.domain)][: options.rows]
    texts = [normalised(loaded.tokenizer, text) for text in rows]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        export_hf(loaded.folder, folder / "hf")
        batches = {"one at a time": 1, f"padded batches of {BATCH}": BATCH}
        loops = {name: plain_loop(folder / "hf", batch) for name, batch in batches.items()}
        check(loaded, loops, texts[:64], folder)
        timed = sides(loaded, loops, texts, folder, options.threads)
        rounds = [{name: seconds(side) for name, side in timed.items()} for _ in range(options.rounds)]
    table = [
        {
            "side": name,
            "rows": len(texts),
            "seconds": round(statistics.median(one[name][0] for one in rounds), 3),
            "processor_seconds": round(statistics.median(one[name][1] for one in rounds), 3),
            "ratio": round(statistics.median(one[name][0] / one["exlm embed"][0] for one in rounds), 2),
            "rounds": options.rounds,
            "threads": options.threads,
            "cpu": platform.processor() or platform.machine(),
            "torch": torch.__version__,
        }
        for name in timed
    ]
    with open(options.out, "w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    for line in table:
        print(
            f"{line['side']:24} {line['seconds']:9.2f} s {line['processor_seconds']:9.2f} s of processor time"
            f"  x{line['ratio']:.2f}"
        )


if __name__ == "__main__":
    main()
