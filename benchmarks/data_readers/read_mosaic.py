"""mosaicml-streaming: MDS shards of uint16 arrays, shuffled by its default py1e, samples right from the data set."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from common import batched, run

try:
    import torchvision  # noqa: F401
except RuntimeError:  # built for CUDA beside a torch without it: it is imported by mosaic, and only imported
    _missing = torch.library.Library("torchvision", "DEF")  # kept: its end would take the operator along
    for name in ("nms", "qnms"):
        _missing.define(f"{name}(Tensor dets, Tensor scores, float threshold) -> Tensor")
from streaming import MDSWriter, StreamingDataset
from streaming.base.util import clean_stale_shared_memory

SHARD_BYTES = 1 << 26  # its default


class _Stream:
    computes_positions = True

    def __init__(self, folder: Path, how: dict[str, Any]):
        if how["world"] > 1:
            dist.init_process_group("gloo")
        clean_stale_shared_memory()
        self._how = how
        self._data = StreamingDataset(
            local=str(folder), shuffle=True, batch_size=how["batch"], num_canonical_nodes=1, shuffle_seed=1
        )

    def __iter__(self) -> Iterator[Sequence[np.ndarray]]:
        return batched((sample["ids"] for sample in self._data), self._how["batch"])

    def save(self, path: Path, batches: int) -> None:
        """As StreamingDataLoader does, which counts the samples of its rank."""
        samples = batches * self._how["batch"] * self._how["world"]
        state = {
            "epoch": 0,
            "sample_in_epoch": samples,
            "num_canonical_nodes": 1,
            "shuffle_seed": 1,
            "initial_physical_nodes": 1,
        }
        path.write_text(json.dumps(state))

    def restore(self, path: Path, rank: int) -> None:
        self._data.load_state_dict(json.loads(path.with_name(f"{path.name}.0").read_text()))


class _Mosaic:
    versions = {"mosaicml-streaming": version("mosaicml-streaming")}

    def write(self, sequences: list[np.ndarray], folder: Path) -> None:
        size = min(SHARD_BYTES, max(1 << 16, sum(2 * len(ids) for ids in sequences) // 16))
        with MDSWriter(out=str(folder), columns={"ids": "ndarray:uint16"}, size_limit=size) as writer:
            for ids in sequences:
                writer.write({"ids": ids})

    def open(self, folder: Path, how: dict[str, Any]) -> _Stream:
        return _Stream(folder, how)


if __name__ == "__main__":
    run(_Mosaic())
