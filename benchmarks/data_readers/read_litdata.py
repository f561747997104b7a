"""litdata: its optimized chunks of one-dimensional arrays, shuffled, each sample straight from the data set."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from common import batched, run
from litdata import StreamingDataset
from litdata.streaming.writer import BinaryWriter

CHUNK_BYTES = 1 << 26  # its default


class _Stream:
    computes_positions = True

    def __init__(self, folder: Path, how: dict[str, Any]):
        if how["world"] > 1:
            dist.init_process_group("gloo")
        self._how = how
        self._data = StreamingDataset(str(folder), shuffle=True, drop_last=False, seed=1)

    def __iter__(self) -> Iterator[Sequence[np.ndarray]]:
        return batched((ids for ids in self._data), self._how["batch"])  # `iter` of it would start again

    def save(self, path: Path, batches: int) -> None:
        state = self._data.state_dict(batches * self._how["batch"], num_workers=0, batch_size=self._how["batch"])
        path.write_text(json.dumps(state))

    def restore(self, path: Path, rank: int) -> None:
        self._data.load_state_dict(json.loads(path.with_name(f"{path.name}.0").read_text()))


class _Litdata:
    versions = {"litdata": version("litdata")}

    def write(self, sequences: list[np.ndarray], folder: Path) -> None:
        size = min(CHUNK_BYTES, max(1 << 16, sum(2 * len(ids) for ids in sequences) // 16))
        folder.mkdir(parents=True)
        writer = BinaryWriter(str(folder), chunk_bytes=size)
        for number, ids in enumerate(sequences):
            writer[number] = ids
        writer.done()
        writer.merge()

    def open(self, folder: Path, how: dict[str, Any]) -> _Stream:
        return _Stream(folder, how)


if __name__ == "__main__":
    run(_Litdata())
