"""Opening folders of data, whatever their shards hold and wherever they are."""

from __future__ import annotations

from pathlib import Path

from exlm_dist.config import RunConfig
from exlm_dist.config.data_settings import DataConfig
from exlm_dist.data.indexed import IndexedDataset
from exlm_dist.data.manifest import MEMBERS, form_of, read_manifest
from exlm_dist.data.mixed import MixedDataset
from exlm_dist.data.shards import ShardDataset
from exlm_dist.utils.errors import ConfigError
from exlm_dist.utils.workers import WorkerPool


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
    if isinstance(dataset, IndexedDataset) and workers:
        dataset.tokenize_in(WorkerPool(workers))
    return dataset


def open_training_data(
    data: DataConfig, *, part: tuple[int, int] = (0, 1), workers: int = 0
) -> ShardDataset | MixedDataset:
    """The data that a run is trained on. Parameters as in `open_dataset`; DataError as there, and for sources that
    cannot be mixed."""
    block = data.block if data.shuffle == "windows" else 0
    opened = [
        open_dataset(
            path,
            "train",
            max_bad_records=data.max_bad_records,
            block=block,
            kept_blocks=2 * data.window,
            part=part,
        )
        for path in data.paths
    ]
    indexed = [dataset for dataset in opened if isinstance(dataset, IndexedDataset)]
    if indexed and workers:  # one source is read at a time, so that one pool is enough
        pool = WorkerPool(workers)
        for dataset in indexed:
            dataset.tokenize_in(pool)
    return MixedDataset(dict(zip(data.sources, opened)), block) if data.sources else opened[0]


def sole_folder(config: RunConfig) -> Path:
    """The folder that a run was trained on; ConfigError, which names them, where there are several."""
    path, *others = config.data.paths
    if others:
        raise ConfigError(
            f"{config.name} was trained on several sources ({config.data.described}): give one of their folders as "
            "--data."
        )
    return Path(path)


def open_held_out(data: DataConfig, *, part: tuple[int, int] = (0, 1)) -> dict[str, ShardDataset]:
    """The held-out split of each source that has one, by name; that of a run without sources by the name ""."""
    return {
        name: open_dataset(path, "valid", max_bad_records=data.max_bad_records, part=part)
        for name, path in zip(data.sources or [""], data.paths)
        if read_manifest(Path(path))["splits"]["valid"]["shards"]
    }
