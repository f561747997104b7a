"""Where a launch of a run starts: its locked folder, its data, and the checkpoint that it continues from, if any."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exlm_dist.checkpoint import reader, storage
from exlm_dist.checkpoint.hf_export import is_export
from exlm_dist.checkpoint.weights_only import describe_origin
from exlm_dist.config import RunConfig, check_vocabulary, check_world
from exlm_dist.data.opening import open_dataset
from exlm_dist.data.shards import ShardDataset
from exlm_dist.launch import heartbeat
from exlm_dist.parallel.process import Process, node_part
from exlm_dist.tokenizers import load_tokenizer
from exlm_dist.training.advice import new_run_command
from exlm_dist.training.changes import Change, accept_changes
from exlm_dist.training.engine.deepspeed_config import working_dtype
from exlm_dist.training.resources import Resources
from exlm_dist.training.run_folder import LOCK_PATIENCE, RunFolder, record_start
from exlm_dist.training.warm_start import Source, candidates, check_architecture, identify, open_source
from exlm_dist.utils.errors import CheckpointError
from exlm_dist.utils.logs import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class StartingPoint:
    """The same on every rank. `checkpoint`: the folder to resume from, None for a new run; `state`: its state.json;
    `changes`: of the settings during the run, as `state.json` lists them; `source`: of the weights of a new run."""

    path: Path
    train_data: ShardDataset
    valid_data: ShardDataset | None
    checkpoint: Path | None
    state: dict[str, Any]
    changes: list[dict[str, Any]] = field(default_factory=list)
    source: Source | None = None

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state["step"]


def find_starting_point(
    config: RunConfig, process: Process, resources: Resources, *, allow_changes: bool = False
) -> StartingPoint:
    """Lock the run folder, open the data and choose the checkpoint. A collective. `allow_changes`: of settings that do
    not change what was learned.

    ConfigError for settings that do not fit the ranks, the device or the weights of `init`, DataError for data that
    cannot be used, CheckpointError where the folder is in use, none of its checkpoints is whole, or they belong to
    another run.
    """
    heartbeat.enter("start/data")
    process.run_everywhere(lambda: _check_settings(config, process))
    path = Path(process.run_on_first_rank(lambda: _open_folder(config, resources)))
    train_data = process.run_everywhere(lambda: _open_split(config, process, "train"))
    resources.callback(train_data.close)
    valid_data = None
    if train_data.manifest["splits"]["valid"]["shards"]:
        valid_data = process.run_everywhere(lambda: _open_split(config, process, "valid"))
        resources.callback(valid_data.close)
    check_vocabulary(train_data.vocab_size, config.parallel.tensor)
    heartbeat.enter("start/checkpoint")
    folder, state = select_checkpoint(path, process) or (None, {"step": 0, "progress": {}})
    step, changes, source = state["step"], [], None
    if folder is not None:
        changes = process.run_everywhere(lambda: _accept(config, train_data, folder, state, allow_changes))
    elif config.init:
        source = _find_source(config, process)
    if step < config.schedule.steps or not any(change.needs_flag for change in changes):
        process.run_on_first_rank(lambda: record_start(path, config, step))
    every = [*state.get("changes", []), *(change.as_dict(step) for change in changes)]
    return StartingPoint(path, train_data, valid_data, folder, state, every, source)


def fingerprints(data: ShardDataset) -> dict[str, str]:
    """What ties a checkpoint to its data, as it is written in `state.json`."""
    tokenizer = load_tokenizer(data.tokenizer_path)
    return {"data_fingerprint": data.fingerprint, "tokenizer_fingerprint": tokenizer.fingerprint}


def select_checkpoint(run_folder: Path, process: Process) -> tuple[Path, dict[str, Any]] | None:
    """(folder, state) of the newest checkpoint that is whole on every rank; None when the run has none. A collective.

    Every rejected one is reported with the reason. CheckpointError, on every rank, when there are some but none is
    whole.
    """
    names = process.broadcast_object([folder.name for folder in reader.checkpoint_folders(run_folder)])
    folder, rejected = _first_whole([Path(run_folder) / reader.CHECKPOINTS / name for name in names], process)
    if folder is not None:
        return folder, process.run_on_first_rank(functools.partial(reader.read_state, folder))
    if rejected:
        raise CheckpointError(
            f"none of the {len(rejected)} checkpoints in {run_folder} is whole:\n  "
            + "\n  ".join(rejected)
            + "\nPut a whole one back, or remove the run folder to start anew."
        )
    return None


def _first_whole(folders: list[Path], process: Process) -> tuple[Path | None, list[str]]:
    """The first of these checkpoints that is whole on every rank, and why each before it was rejected. A collective."""
    rejected: list[str] = []
    for folder in folders:
        reasons = process.all_gather_object(_rejection(folder, process))
        reason = next((reason for reason in reasons if reason), None)
        if reason is None:
            return folder, rejected
        rejected.append(f"{folder.name}: {reason}")
        if process.is_first:
            logger.warning("checkpoint rejected: %s", reason)
    return None, rejected


def _find_source(config: RunConfig, process: Process) -> Source:
    """The checkpoint that `init` means, opened on every rank. A collective; ConfigError, CheckpointError."""
    found = process.run_on_first_rank(lambda: [str(folder) for folder in candidates(config.init)])
    folders = [Path(folder) for folder in found]
    if not is_export(folders[0]):
        whole, rejected = _first_whole(folders, process)
        if whole is None:
            raise CheckpointError(f"init: no checkpoint of {config.init} is whole:\n  " + "\n  ".join(rejected))
        folders = [whole]
    about = process.run_on_first_rank(lambda: identify(folders[0]))
    source = process.run_everywhere(lambda: open_source(folders[0], about))
    process.run_everywhere(lambda: check_architecture(source, config.model))
    return source


def _check_settings(config: RunConfig, process: Process) -> None:
    """What the configuration asks of these ranks and this device. Checked on all ranks before any leaves: one that
    left at once would look lost to those still on their way here."""
    check_world(config, process.world)
    working_dtype(config, process.device)


def _open_folder(config: RunConfig, resources: Resources) -> str:
    folder = RunFolder.open(config, patience=min(LOCK_PATIENCE, config.launch.timeout / 2))
    resources.callback(folder.close)
    storage.clean(folder.path)
    return str(folder.path)


def _open_split(config: RunConfig, process: Process, split: str) -> ShardDataset:
    data, is_train = config.data, split == "train"
    return open_dataset(
        data.path,
        split,
        max_bad_records=data.max_bad_records,
        block=data.block if is_train and data.shuffle == "windows" else 0,
        kept_blocks=2 * data.window,
        part=node_part(process.local_rank),
        workers=data.workers if is_train else 0,
    )


def _rejection(folder: Path, process: Process) -> str | None:
    """Why this rank cannot use the checkpoint. The ranks divide the hashing of the files; each looks at all sizes."""
    try:
        reader.verify(folder, split=(process.rank, process.world))
    except CheckpointError as error:
        return str(error)
    except (OSError, ValueError, KeyError) as error:
        return f"{folder} cannot be read: {error}"
    return None


def _accept(
    config: RunConfig, data: ShardDataset, folder: Path, state: dict[str, Any], allow_changes: bool
) -> list[Change]:
    """Settings that change where training goes on from the checkpoint. CheckpointError when it was not written by
    training, or belongs to other data, another tokenizer or other settings."""
    if origin := describe_origin(state):
        raise CheckpointError(
            f"{folder} is an {origin}: it has no moments of the optimizer, so that no run can resume from it. Move it "
            f"out of {folder.parent} to go on from the run's own checkpoints, or train a new run from its weights:\n"
            f"  {new_run_command(config)}"
        )
    for what, here in fingerprints(data).items():
        if state[what] != here:
            raise CheckpointError(
                f"{folder} was trained with {what.replace('_', ' ')} {state[what]}, but {config.data.path} has {here}. "
                "Give the path of the data it was trained on, or train a new run from these weights:\n"
                f"  {new_run_command(config)}"
            )
    return accept_changes(state["step"], reader.read_config(folder), config, allow=allow_changes)
