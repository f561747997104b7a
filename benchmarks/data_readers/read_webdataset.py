"""webdataset: ids as the bytes of a member, shards and a buffer of 1,000 shuffled; of a position it knows nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from common import NotOffered, batched, run, tokenized, write_tars

SHARDS, BUFFER = 16, 1_000


class _Stream:
    computes_positions = True

    def __init__(self, folder: Path, how: dict[str, Any]):
        self._how, self._skip = how, 0
        os.environ.update(RANK=str(how["rank"]), WORLD_SIZE=str(how["world"]))
        tars = sorted(str(path) for path in folder.glob("*.tar"))
        self._samples = wds.WebDataset(
            tars, shardshuffle=len(tars), nodesplitter=wds.split_by_node, seed=1, empty_check=False
        ).shuffle(BUFFER, seed=1)

    def __iter__(self) -> Iterator[Sequence[np.ndarray]]:
        batches = self._batches()
        for _ in range(self._skip):
            next(batches)
        return batches

    def _batches(self) -> Iterator[Sequence[np.ndarray]]:
        if self._how["form"] == "own":
            return batched((np.frombuffer(sample["ids"], np.uint16) for sample in self._samples), self._how["batch"])
        texts = batched((sample["txt"].decode() for sample in self._samples), self._how["batch"])
        return tokenized(texts, self._how["tokenizer"])

    def save(self, path: Path, batches: int) -> None:
        path.write_text(str(batches))

    def restore(self, path: Path, rank: int) -> None:
        """Reads and drops what was read before: there is no other way."""
        if not path.with_name(f"{path.name}.{rank}").exists():
            raise NotOffered("no state to restore")
        self._skip = int(path.with_name(f"{path.name}.{rank}").read_text())


class _Webdataset:
    versions = {"webdataset": wds.__version__}

    def write(self, sequences: list[np.ndarray], folder: Path) -> None:
        write_tars(folder, [ids.tobytes() for ids in sequences], "ids", SHARDS)

    def index(self, how: dict[str, Any]) -> int:
        raise NotOffered("no index")

    def open(self, folder: Path, how: dict[str, Any]) -> _Stream:
        return _Stream(folder, how)


if __name__ == "__main__":
    run(_Webdataset())
