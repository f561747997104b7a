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
from exlm_dist.data.mixed import MixedDataset
from exlm_dist.data.opening import open_held_out, open_training_data
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
    train_data: ShardDataset | MixedDataset
    held_out: dict[str, ShardDataset]  # by source; that of `data.path` is named ""
    checkpoint: Path | None
    state: dict[str, Any]
    changes: list[dict[str, Any]] = field(default_factory=list)
    source: Source | None = None

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state["step"]

    @property
    def opened(self) -> list[ShardDataset]:
        """All folders that are read, of both splits."""
        trained = self.train_data.sources.values() if isinstance(self.train_data, MixedDataset) else [self.train_data]
        return [*trained, *self.held_out.values()]


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
    part = node_part(process.local_rank)
    train_data = process.run_everywhere(lambda: open_training_data(config.data, part=part, workers=config.data.workers))
    resources.callback(train_data.close)
    held_out = process.run_everywhere(lambda: open_held_out(config.data, part=part))
    for dataset in held_out.values():
        resources.callback(dataset.close)
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
    return StartingPoint(path, train_data, held_out, folder, state, every, source)


def fingerprints(data: ShardDataset | MixedDataset) -> dict[str, Any]:
    """What ties a checkpoint to its data, as it is written in `state.json`; of a mixture also each source, in order."""
    tokenizer = load_tokenizer(data.tokenizer_path)
    found = {"data_fingerprint": data.fingerprint, "tokenizer_fingerprint": tokenizer.fingerprint}
    return found | ({"sources": sources_of(data)} if isinstance(data, MixedDataset) else {})


def sources_of(data: ShardDataset | MixedDataset) -> list[list[str]]:
    """[name, fingerprint] of each source; that of `data.path` is named `data.path`."""
    sources = data.sources if isinstance(data, MixedDataset) else {"data.path": data}
    return [[name, source.fingerprint] for name, source in sources.items()]


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
    config: RunConfig, data: ShardDataset | MixedDataset, folder: Path, state: dict[str, Any], allow_changes: bool
) -> list[Change]:
    """Settings that change where training goes on from the checkpoint. CheckpointError when it was not written by
    training, or belongs to other data, another tokenizer or other settings."""
    if origin := describe_origin(state):
        raise CheckpointError(
            f"{folder} is an {origin}: it has no moments of the optimizer, so that no run can resume from it. Move it "
            f"out of {folder.parent} to go on from the run's own checkpoints, or train a new run from its weights:\n"
            f"  {new_run_command(config)}"
        )
    _check_data(config, data, folder, state)
    sizes = data.sizes if isinstance(data, MixedDataset) else [data.epoch_size]
    return accept_changes(state["step"], reader.read_config(folder), config, sizes, allow=allow_changes)


def _check_data(config: RunConfig, data: ShardDataset | MixedDataset, folder: Path, state: dict[str, Any]) -> None:
    """CheckpointError unless the data, or its first sources, are those that the checkpoint was trained on."""
    trained, given = state.get("sources", [["data.path", state["data_fingerprint"]]]), sources_of(data)
    were, are = ([fingerprint for _, fingerprint in sources] for sources in (trained, given))
    advice = f"or train a new run from these weights:\n  {new_run_command(config)}"
    for what, here in fingerprints(data).items():
        if what == "sources" or state[what] == here:
            continue
        if what == "data_fingerprint" and are[: len(were)] == were:
            continue  # sources were added: whether they were to be read before is asked of the phases
        if what == "data_fingerprint" and len(were) + len(are) > 2:
            raise CheckpointError(
                f"{folder} was trained on {_listed(trained)}; given are {_listed(given)}. The sources of a run stay, "
                f"in their order; new ones may follow after them, in a later phase. Put them back, {advice}"
            )
        raise CheckpointError(
            f"{folder} was trained with {what.replace('_', ' ')} {state[what]}, but {config.data.described} has "
            f"{here}. Give the path of the data it was trained on, {advice}"
        )


def _listed(sources: list[list[str]]) -> str:
    return ", ".join(f"{name} (fingerprint {fingerprint[:12]})" for name, fingerprint in sources)
