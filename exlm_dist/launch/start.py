"""The body of `exlm launch`: starts processes or submits a job for a configuration, or (dry run) prints them."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from exlm_dist.config import RunConfig, check_init, check_world, load_config
from exlm_dist.launch.deepspeed import deepspeed_command, run_deepspeed
from exlm_dist.launch.local import RANK_COMMAND, rank_arguments, run_local
from exlm_dist.launch.restart import Restarts
from exlm_dist.launch.slurm import Job, render, sbatch_command, submit
from exlm_dist.utils.errors import ConfigError


def launch_local(path: str, overrides: Sequence[str], *, allow_changes: bool, dry_run: bool) -> int:
    """Train on this machine with `launch.processes` ranks (auto: as the layout needs); the exit code of the run."""
    config = load_config(path, overrides)
    check_init(config)
    processes = config.local_processes
    check_world(config, processes)
    arguments = rank_arguments(path, overrides, allow_changes=allow_changes)
    if dry_run:
        for rank in range(processes):
            print(f"RANK={rank} LOCAL_RANK={rank} WORLD_SIZE={processes} {shlex.join([*RANK_COMMAND, *arguments])}")
        return 0
    return run_local(arguments, processes, Restarts.begin(config))


def launch_deepspeed(
    path: str, overrides: Sequence[str], *, allow_changes: bool, hostfile: Path | None, dry_run: bool
) -> int:
    """Train under the DeepSpeed launcher, here or on the hosts of `hostfile`; the exit code of the run."""
    config = load_config(path, overrides)
    check_init(config)
    processes, arguments = config.local_processes, rank_arguments(path, overrides, allow_changes=allow_changes)
    if dry_run:
        print(shlex.join(deepspeed_command(arguments, processes=processes, port=0, hostfile=hostfile)))
        return 0
    restarts = Restarts.begin(config)
    return run_deepspeed(arguments, restarts, processes=processes, device=config.launch.device, hostfile=hostfile)


def launch_slurm(
    job: Job, path: str, overrides: Sequence[str], *, allow_changes: bool, sweep: Path | None, dry_run: bool
) -> int:
    """Submit a job (if `job.array` is set, an array with a task per line of `sweep`); the exit code of sbatch.

    ConfigError, before anything is submitted, for wrong settings in any line, an `init` that is not there, or ranks
    that do not divide the batch.

    A container sees `job.mounts` and every folder that the settings name.
    """
    configs = [load_config(path, [*overrides, *line]) for line in _lines(job, sweep)]
    for config in configs:
        check_init(config)
        check_world(config, job.ranks)
    if job.container:
        named = [sweep.parent] if sweep else []
        named += [Path(path).parent, *(folder for config in configs for folder in _folders_of(config))]
        job = dataclasses.replace(job, container=_image(job.container), mounts=_mounts([*job.mounts, *named]))
    elif job.mounts:
        raise ConfigError("--mount needs --container: without one a job sees all folders.")
    script = _folder(load_config(path, overrides)) / "slurm" / "pretrain.sh"
    arguments = rank_arguments(path, overrides, allow_changes=allow_changes)
    if dry_run:
        print(render(job), end="")
        print(f"# would be written to {script} and submitted by", file=sys.stderr)
        print(shlex.join(sbatch_command(script, arguments, sweep=sweep)), file=sys.stderr)
        return 0
    return submit(job, arguments, script, sweep=sweep)


def _lines(job: Job, sweep: Path | None) -> list[list[str]]:
    """Overrides of each array task; one empty list for a single job."""
    if bool(job.array) != (sweep is not None):
        raise ConfigError(
            "--array needs --sweep, and --sweep --array: task n of the array runs line n of the sweep file."
        )
    if sweep is None:
        return [[]]
    if not sweep.is_file():
        raise ConfigError(f"no sweep file at {sweep}. Its line n has the overrides of array task n.")
    return [shlex.split(line) for line in sweep.read_text().splitlines() if line.strip()]


def _folders_of(config: RunConfig) -> list[Path]:
    """Folders, outside of the package, from which and to which a run reads and writes."""
    return [Path(folder) for folder in (config.runs, *config.data.paths, config.init) if folder]


def _mounts(folders: Iterable[str | Path]) -> tuple[str, ...]:
    """Absolute paths of `folders` without those inside others, or inside the current one."""
    inside = [Path.cwd()]
    for folder in sorted(Path(os.path.abspath(Path(folder).expanduser())) for folder in folders):
        if not any(folder.is_relative_to(other) for other in inside):
            inside.append(folder)
    return tuple(str(folder) for folder in inside[1:])


def _image(container: str) -> str:
    """The image with an absolute path, if it is a file; ConfigError if there is none."""
    if not container.endswith((".sif", ".sqsh")):
        return container
    path = Path(os.path.abspath(Path(container).expanduser()))
    if not path.is_file():
        raise ConfigError(f"no image at {path}. containers/README.md says how to make one.")
    return str(path)


def _folder(config: RunConfig) -> Path:
    return Path(config.runs) / config.name
