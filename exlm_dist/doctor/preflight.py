"""What `exlm pretrain` and `exlm launch` look at before any rank starts: seconds later each rank would find the same.
No torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from exlm_dist.checkpoint.tensors import BYTES_PER_PARAMETER
from exlm_dist.config import RunConfig, check_init, check_vocabulary
from exlm_dist.data.manifest import epoch_size, read_manifest
from exlm_dist.data.mirror import data_folder, local_shard
from exlm_dist.data.mixed import check_alike
from exlm_dist.data.mixture import Mixture
from exlm_dist.data.recipe import Recipe
from exlm_dist.model.cost import count_parameters
from exlm_dist.tracking.uri import tracking_uri
from exlm_dist.utils.errors import ConfigError, DataError
from exlm_dist.utils.logs import get_logger
from exlm_dist.utils.outputs import check_space, check_writable

logger = get_logger(__name__)


def check_run(config: RunConfig) -> None:
    """The UserError with which the ranks would end: of initial weights, data, lengths, or of a run folder that cannot
    be written. A tracking address that cannot be used is a warning, as training goes on without it."""
    check_init(config)
    names, places = config.data.sources or ["data.path"], map(Path, config.data.paths)
    manifests = {name: (path, read_manifest(path)) for name, path in zip(names, places)}
    check_alike(manifests)
    for path, manifest in manifests.values():
        vocab_size = manifest["vocab_size"]
        check_vocabulary(vocab_size, config.parallel.tensor)
        _check_shards(data_folder(path), manifest["splits"])
        if (histogram := manifest["splits"]["train"].get("length_histogram")) is not None:  # else ranks read the index
            Recipe.of(config, vocab_size).check_lengths(config.masking.copies * (np.flatnonzero(histogram) - 2))
    Mixture.of(config, [epoch_size(manifest["splits"]["train"]) for _, manifest in manifests.values()])
    checkpoints = Path(config.runs) / config.name / "checkpoints"
    check_writable(checkpoints)
    parameters = sum(count_parameters(config.model, vocab_size).values())
    check_space(checkpoints, parameters * BYTES_PER_PARAMETER, "a single checkpoint of this model")
    if config.tracking.mlflow:
        try:
            tracking_uri(config.tracking.uri, Path(config.runs))
        except ConfigError as error:
            logger.warning("the run will go on without MLflow: %s", error)


def _check_shards(folder: Path, splits: dict) -> None:
    for split in splits.values():
        for shard in split["shards"]:
            path = local_shard(folder, shard["name"])
            if path is None:  # its size is checked with the first bytes that are read of it
                continue
            if not path.is_file() or path.stat().st_size != shard["size"]:
                raise DataError(f"{path}: missing, or not of {shard['size']} bytes. Copy or prepare the data again.")
