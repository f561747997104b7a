"""`exlm launch` on the command line. Imports nothing heavy: `exlm --help` reads it too."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

SUMMARY = "Start a run through a launcher, or (--dry-run) print what would be started."
#: Options of `exlm launch slurm` that make up a job.
_OF_THE_JOB = ("account", "partition", "nodes", "gpus_per_node", "tasks_per_node", "time", "warning", "array")


def add_launch(
    commands: argparse._SubParsersAction, command: Callable[..., argparse.ArgumentParser], epilog: str
) -> None:
    """Add `launch` to `commands`; `command` makes a sub-command, `epilog` explains overrides."""
    launch = commands.add_parser("launch", help="start a run through a launcher", description=SUMMARY)
    launchers = launch.add_subparsers(dest="launcher", required=True, metavar="LAUNCHER")
    local = command(launchers, "local", _local, "train on this machine", overrides=True, epilog=epilog)
    deepspeed = command(
        launchers, "deepspeed", _deepspeed, "train under the DeepSpeed launcher", overrides=True, epilog=epilog
    )
    slurm = command(
        launchers, "slurm", _slurm, "submit a job that trains on a Slurm cluster", overrides=True, epilog=epilog
    )
    for parser in (local, deepspeed, slurm):
        parser.add_argument("config", help="YAML file")
        parser.add_argument("--dry-run", action="store_true", help="print what would be started, and stop")
    deepspeed.add_argument(
        "--hostfile",
        type=Path,
        help="hosts and slots; default: processes on this machine, launch.processes or what the layout needs",
    )
    slurm.add_argument("--account", default="my-account", help="whom the cluster bills")
    slurm.add_argument("--partition", default="gpu", help="part of the cluster")
    slurm.add_argument("--nodes", type=int, default=2, help="nodes")
    slurm.add_argument("--gpus-per-node", type=int, default=8, help="GPUs, and ranks, per node; 0: none")
    slurm.add_argument("--tasks-per-node", type=int, default=0, help="ranks per node; 0: one per GPU")
    slurm.add_argument("--time", default="24:00:00", help="time limit of one start; the job requeues itself until done")
    slurm.add_argument("--warning", type=int, default=300, help="seconds before the limit at which the ranks save")
    slurm.add_argument("--array", default="", help="numbers of array tasks, say 1-8%%2; needs --sweep")
    slurm.add_argument("--sweep", type=Path, help="file: line n holds the overrides of array task n")


def _local(options: argparse.Namespace, overrides: list[str]) -> int:
    from exlm_dist.launch.start import launch_local

    return launch_local(options.config, overrides, dry_run=options.dry_run)


def _deepspeed(options: argparse.Namespace, overrides: list[str]) -> int:
    from exlm_dist.launch.start import launch_deepspeed

    return launch_deepspeed(options.config, overrides, hostfile=options.hostfile, dry_run=options.dry_run)


def _slurm(options: argparse.Namespace, overrides: list[str]) -> int:
    from exlm_dist.launch.slurm import Job
    from exlm_dist.launch.start import launch_slurm

    job = Job("pretrain", **{name: getattr(options, name) for name in _OF_THE_JOB})
    return launch_slurm(job, options.config, overrides, sweep=options.sweep, dry_run=options.dry_run)
