"""Damaged records that training met and replaced: a table in the run folder, and counts for the log.

`quarantine/rank-00000.tsv` in the run folder has a line for each record that the data-parallel rank replaced, written
by one rank of each replica once per logged step. A record that is met again after a restart is listed again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from exlm_dist.data.shards import BadRecord, ShardDataset

FOLDER = "quarantine"
COLUMNS = ("data", "split", "sample", "shard", "offset", "crc32_expected", "crc32_got", "replacement")


class DamageLog:
    """What the data sets of this data-parallel rank have replaced so far, in this launch."""

    def __init__(self, run_folder: Path, rank: int, datasets: Sequence[ShardDataset]) -> None:
        self._path = run_folder / FOLDER / f"rank-{rank:05d}.tsv"
        self._datasets = list(datasets)
        self._written = [0] * len(self._datasets)

    def counts(self) -> list[float]:
        """[damaged records, reads that were repeated], after new damage was written down."""
        lines = []
        for index, dataset in enumerate(self._datasets):
            found = dataset.bad_records[self._written[index] :]
            self._written[index] += len(found)
            lines += [_line(dataset, record) for record in found]
        if lines:
            self._append(lines)
        return [float(sum(self._written)), float(sum(dataset.retries for dataset in self._datasets))]

    def _append(self, lines: list[str]) -> None:
        self._path.parent.mkdir(exist_ok=True)
        handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            if os.fstat(handle).st_size == 0:
                lines.insert(0, "\t".join(COLUMNS) + "\n")
            os.write(handle, "".join(lines).encode())
        finally:
            os.close(handle)


def _line(dataset: ShardDataset, record: BadRecord) -> str:
    got = "missing" if record.got < 0 else f"{record.got:08x}"
    cells = (dataset.path, dataset.split, record.sample, record.file, record.offset, f"{record.expected:08x}", got)
    return "\t".join(map(str, (*cells, record.replacement))) + "\n"
