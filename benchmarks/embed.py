"""`exlm embed` beside the plain loops that people write over a model of the transformers library of the same size.

    python benchmarks/embed.py --checkpoint runs/demo_smiles_exlm --file molecules.smi [--rows 10000]

The model of the loops is the export of the same checkpoint. One loop takes a molecule at a time, the other padded
batches of 32 in file order, both with the fast tokenizer and mean pooling; they read the canonical molecules, so
canonicalisation is on our side alone. All sides run in turn, one tenth of the rows at a time, in one process with the
same threads (ours without worker processes); before anything is timed, all must have given the same vectors. A last
line says what the command itself takes, from start to written table. Needs transformers.
"""

from __future__ import annotations

import argparse
import csv
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch

from exlm_dist.export.hf.hf_folder import export_hf
from exlm_dist.inference.embed import embed_texts
from exlm_dist.inference.loading import LoadedCheckpoint, load_checkpoint
from exlm_dist.tables.records import InputOptions, expand_inputs, read_rows
from exlm_dist.tokenizers.encoding import normalised

BATCH = 32
PARTS = 10


def plain_loop(folder: Path, batch: int) -> Callable[[list[str]], np.ndarray]:
    """The usual loop: tokenize, run, mean over the attention mask."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
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


def sides(loaded: LoadedCheckpoint, scratch: Path) -> dict[str, Callable[[list[str]], np.ndarray]]:
    export_hf(loaded.folder, scratch / "hf")
    return {
        "exlm embed": lambda texts: embed_texts(loaded, texts).vectors,
        "one at a time": plain_loop(scratch / "hf", 1),
        f"padded batches of {BATCH}": plain_loop(scratch / "hf", BATCH),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--file", required=True)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/embed_{date.today()}.csv"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    loaded = load_checkpoint(options.checkpoint, device="cpu")
    (path,) = expand_inputs([options.file])
    rows = [row.text for row in read_rows(path, InputOptions(), loaded.tokenizer.domain)][: options.rows]
    texts = [normalised(loaded.tokenizer, text) for text in rows]
    with tempfile.TemporaryDirectory() as scratch:
        embeds = sides(loaded, Path(scratch))
        results = {name: embed(texts[:64]) for name, embed in embeds.items()}
        for name, result in results.items():
            error = np.abs(result - results["exlm embed"]).max()
            assert error < 1e-4, f"{name}: differs by {error}"
        seconds = dict.fromkeys(embeds, 0.0)
        for part in range(PARTS):
            for name, embed in embeds.items():
                start = time.perf_counter()
                embed(texts[part::PARTS])
                seconds[name] += time.perf_counter() - start
        Path(scratch, "rows.smi").write_text("\n".join(texts) + "\n")
        start = time.perf_counter()
        command = [sys.executable, "-m", "exlm_dist.cli", "embed", f"{scratch}/rows.smi", "--checkpoint"]
        subprocess.run([*command, str(loaded.folder), "--out", f"{scratch}/out.parquet"], check=True, timeout=1800)
        seconds["the whole command"] = time.perf_counter() - start
    table = [
        {"side": name, "rows": len(texts), "seconds": round(taken, 3), "ratio": round(taken / seconds["exlm embed"], 2)}
        | {"threads": options.threads, "cpu": platform.processor() or platform.machine(), "torch": torch.__version__}
        for name, taken in seconds.items()
    ]
    with open(options.out, "w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    for line in table:
        print(f"{line['side']:24} {line['seconds']:9.2f} s  x{line['ratio']:.2f}")


if __name__ == "__main__":
    main()
