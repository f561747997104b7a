"""Opening a folder of data, whatever its shards hold and wherever they are."""

from __future__ import annotations

from pathlib import Path

from exlm_dist.data.indexed import IndexedDataset
from exlm_dist.data.manifest import MEMBERS, form_of, read_manifest
from exlm_dist.data.shards import ShardDataset


def open_dataset(
    path: Path | str,
    split: str,
    *,
    max_bad_records: float = 1e-4,
    block: int = 0,
    kept_blocks: int = 0,
    part: tuple[int, int] = (0, 1),
    workers: int = 0,
) -> ShardDataset:
    """`split` ('train' or 'valid') of a folder of `exlm prepare` or `exlm data index`, here or behind an address.

    `workers`: processes that read and tokenize shards of others; prepared shards need none. DataError and the
    other parameters as in `ShardDataset.open`.
    """
    kind = IndexedDataset if form_of(read_manifest(Path(path))) == MEMBERS else ShardDataset
    dataset = kind.open(path, split, max_bad_records=max_bad_records, block=block, kept_blocks=kept_blocks, part=part)
    if isinstance(dataset, IndexedDataset):
        dataset.tokenize_in(workers)
    return dataset
