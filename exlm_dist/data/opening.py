"""Opening a folder of data, whatever its shards hold and wherever they are."""

from __future__ import annotations

from pathlib import Path

from exlm_dist.data.indexed import IndexedDataset
from exlm_dist.data.manifest import MEMBERS, form_of, read_manifest
from exlm_dist.data.shards import ShardDataset


def open_dataset(path: Path | str, split: str, *, max_bad_records: float = 1e-4, workers: int = 0) -> ShardDataset:
    """`split` ('train' or 'valid') of a folder of `exlm prepare` or `exlm data index`, here or behind an address.

    `workers`: processes that read and tokenize shards of others; prepared shards need none. DataError and
    `max_bad_records` as in `ShardDataset.open`.
    """
    if form_of(read_manifest(Path(path))) != MEMBERS:
        return ShardDataset.open(path, split, max_bad_records=max_bad_records)
    dataset = IndexedDataset.open(path, split, max_bad_records=max_bad_records)
    dataset.tokenize_in(workers)
    return dataset
