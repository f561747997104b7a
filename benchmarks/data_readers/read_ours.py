"""exlm_dist: prepared shards, or tars indexed by `exlm data index`; in windows or full order; with masks or without.

Positions are integers, so that nothing needs to be saved but the number of batches.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import Ragged, run

import exlm_dist
from exlm_dist.data.loader import Loader
from exlm_dist.data.manifest import MANIFEST, SCHEMA, sealed
from exlm_dist.data.opening import open_dataset
from exlm_dist.data.order import Order
from exlm_dist.data.recipe import Recipe
from exlm_dist.prepare.index_shards import index_shards
from exlm_dist.prepare.shard_writer import ShardWriter

BLOCK, WINDOW = 512, 1024
#: As configs/pretrain/exlm_base_smiles.yaml has them.
STEP, MICRO, BUCKET, STATES = 704, 88, 1024, 4


class _Stream:
    """All ranks' batches of one epoch: rank r has the r-th part of each global batch."""

    computes_positions = True

    def __init__(self, folder: Path, how: dict[str, Any]):
        self._how, self._first = how, 0
        windows = how.get("variant", "windows") != "full"
        self._data = open_dataset(
            folder,
            "train",
            max_bad_records=1e-2,
            block=BLOCK if windows else 0,
            kept_blocks=2 * WINDOW if windows else 0,
        )
        self._order = Order(1, len(self._data), BLOCK if windows else 0, WINDOW)
        self._recipe = Recipe(
            states=STATES,
            anchors=True,
            ratio=0.15,
            keep=0.0,
            random=0.0,
            vocab_size=self._data.vocab_size,
            max_positions=(self._data.lengths.max() + 2) * STATES,
            bucket=BUCKET,
            micro=MICRO,
        )

    def __iter__(self) -> Iterator[Sequence[np.ndarray]]:
        return self._packed() if self._how.get("variant") == "packed" else self._read()

    def _read(self) -> Iterator[Sequence[np.ndarray]]:
        own, rank, world = self._how["batch"], self._how["rank"], self._how["world"]
        total = own * world
        for first in range(self._first * total, len(self._data), total):
            positions = np.arange(first, min(first + total, len(self._data)))
            if self._order.block:
                self._data.preload(self._order.upcoming(positions))
            samples = self._order.at(positions)[1]
            yield Ragged(*self._data.read(samples[rank * own : (rank + 1) * own]))

    def _packed(self) -> Iterator[Ragged]:
        """Whole steps; what is left of the epoch comes with the next one. The original tokens are what counts."""
        batch = min(STEP, len(self._data) // MICRO * MICRO)
        loader = Loader(self._data, self._recipe, order=self._order, global_batch=batch, rank=0, world=1, prefetch=0)
        for step in range(self._first, len(self._data) // batch):
            batches = loader.step(step)
            original = batches.num_original_tokens - 2 * batch
            yield Ragged(np.broadcast_to(np.uint16(0), original), np.array([original, *[0] * (batch - 1)]))

    def save(self, path: Path, batches: int) -> None:
        path.write_text(str((self._first + batches) * self._how["batch"] * self._how["world"]))

    def restore(self, path: Path, rank: int) -> None:
        """Any rank's integer will do."""
        position = int(path.with_name(f"{path.name}.0").read_text())
        self._first = position // (self._how["batch"] * self._how["world"])


class _Ours:
    versions = {"exlm_dist": exlm_dist.__version__, "numpy": np.__version__}

    def write(self, sequences: list[np.ndarray], folder: Path) -> None:
        size = max(int(ids.max()) for ids in sequences) + 1
        writer = ShardWriter(folder, "train", vocab_size=size)
        writer.write(np.concatenate(sequences), np.array([len(ids) for ids in sequences]))
        shards = [entry.as_dict() for entry in writer.close()]
        manifest = {
            "schema": SCHEMA,
            "domain": "smiles",
            "vocab_size": size,
            "max_length": max(map(len, sequences)) + 2,
            "splits": {
                "train": {"sequences": len(sequences), "shards": shards},
                "valid": {"sequences": 0, "shards": []},
            },
            "tokenizer": {"fingerprint": "none", "files": {}},
        }
        (folder / MANIFEST).write_text(json.dumps(sealed(manifest)))

    def index(self, how: dict[str, Any]) -> int:
        """By one worker; each molecule is read by RDKit and tokenized."""
        index_shards(
            how["tars"],
            how["folder"],
            tokenizer=how["tokenizer"],
            valid_patterns=[how["valid"]],
            max_length=512,
            workers=1,
        )
        return len(open_dataset(how["folder"], "train"))

    def open(self, folder: Path, how: dict[str, Any]) -> _Stream:
        return _Stream(folder, how)


if __name__ == "__main__":
    run(_Ours())
