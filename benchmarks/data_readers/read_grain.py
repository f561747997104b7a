"""grain: ArrayRecord files, a full shuffle by index, the records of a batch asked for at once, which is its fastest.

Its ElasticIterator stacks samples of one shape; the index of a batch, which it saves as well, does the same here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from common import run

SHARDS = 16


class _Stream:
    computes_positions = True

    def __init__(self, folder: Path, how: dict[str, Any]):
        files = sorted(str(path) for path in folder.glob("*.array_record"))
        source = grain.sources.ArrayRecordDataSource(files)
        order = grain.MapDataset.range(len(source)).seed(1).shuffle()[how["rank"] :: how["world"]]
        batches = order.batch(how["batch"], batch_fn=list).map(
            lambda ids: [np.frombuffer(content, np.uint16) for content in source.__getitems__(ids)]
        )
        self._iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=how.get("threads", 0))))

    def __iter__(self) -> Iterator[Sequence[np.ndarray]]:
        return iter(self._iterator)

    def save(self, path: Path, batches: int) -> None:
        path.write_text(json.dumps({"next_index": batches}))

    def restore(self, path: Path, rank: int) -> None:
        self._iterator.set_state(json.loads(path.with_name(f"{path.name}.0").read_text()))


class _Grain:
    versions = {"grain": version("grain"), "array_record": version("array_record")}

    def write(self, sequences: list[np.ndarray], folder: Path) -> None:
        folder.mkdir(parents=True)
        size = -(-len(sequences) // SHARDS)
        for shard, first in enumerate(range(0, len(sequences), size)):
            writer = ArrayRecordWriter(str(folder / f"{shard:05d}.array_record"), "group_size:1,uncompressed")
            for ids in sequences[first : first + size]:
                writer.write(ids.tobytes())
            writer.close()

    def open(self, folder: Path, how: dict[str, Any]) -> _Stream:
        return _Stream(folder, how)


if __name__ == "__main__":
    run(_Grain())
