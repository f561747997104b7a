"""A run before and while it trains: `exlm pretrain`, `plan`, `launch` and `doctor`."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from exlm_dist.cli.command import Commands, add_command, add_group, positive
from exlm_dist.utils.outputs import user_path

if TYPE_CHECKING:
    from exlm_dist.config import RunConfig

#: Options of `exlm launch slurm` that make up a job.
_JOB_OPTIONS = (
    "account",
    "partition",
    "nodes",
    "gpus_per_node",
    "tasks_per_node",
    "time",
    "warning",
    "array",
    "container",
)


def register(commands: Commands) -> None:
    """Add `pretrain`, `plan`, `launch` and `doctor`."""
    pretrain = add_command(
        commands,
        "pretrain",
        _pretrain,
        "train, or continue, the run that a configuration describes; with --init CHECKPOINT a new run starts with the "
        "weights of a checkpoint",
        overrides=True,
    )
    pretrain.add_argument("config", help="YAML file, say configs/pretrain/demo_smiles_exlm.yaml")
    pretrain.add_argument("--local-rank", "--local_rank", help=argparse.SUPPRESS)
    _add_allow_changes(pretrain)
    _register_plan(commands)
    _register_launch(commands)
    doctor = add_command(
        commands,
        "doctor",
        _doctor,
        "find what would waste GPU hours before they are spent; exit code 1 if a check fails",
        overrides=True,
    )
    doctor.add_argument(
        "config", nargs="?", help="YAML file of the planned run; without it only the machine is checked"
    )
    doctor.add_argument(
        "--nodes", action="store_true", help="ranks on all nodes of this Slurm job, not launch.processes here"
    )


def _add_allow_changes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="continue the run with other settings than so far where they do not change what it has learned: rate, "
        "optimizer, clipping, schedule, dropout, masking; recorded in the run",
    )


def _register_plan(commands: Commands) -> None:
    """`plan`; the hardware is an H100 SXM unless the options say otherwise."""
    plan = add_command(
        commands,
        "plan",
        _plan,
        "layouts that fit on so many GPUs, with memory, traffic and predicted time, and the one to take",
        overrides=True,
    )
    plan.add_argument("config", help="YAML file")
    plan.add_argument("--gpus", type=positive, required=True, help="number of GPUs")
    plan.add_argument("--gpu-memory", type=float, default=80, help="memory of a GPU in GiB")
    plan.add_argument(
        "--margin", type=float, default=0.1, help="fraction of it left to CUDA, NCCL and the gaps of the allocator"
    )
    plan.add_argument("--node-size", type=positive, default=8, help="GPUs of a node")
    plan.add_argument("--flops", type=float, default=989, help="TFLOP/s of a GPU, bf16 dense (H100 SXM datasheet)")
    plan.add_argument("--memory-bandwidth", type=float, default=3350, help="GB/s of its memory (H100 SXM datasheet)")
    plan.add_argument("--link-bandwidth", type=float, default=450, help="GB/s in a node, one direction (NVLink 4)")
    plan.add_argument(
        "--network-bandwidth", type=float, default=50, help="GB/s between nodes, per GPU (one 400 Gbit/s port)"
    )
    plan.add_argument("--length", type=int, help="sequence length; default: that of the prepared data, else 128")
    plan.add_argument("--vocab-size", type=int, help="vocabulary; default: that of the prepared data, else 32000")
    plan.add_argument("--top", type=int, default=8, help="grids shown")
    plan.add_argument("--scale", action="store_true", help="what to expect of the layout on 8 to 4,096 GPUs, too")
    plan.add_argument(
        "--failure-hours",
        type=positive,
        default=50_700,
        help="hours of one GPU between two failures, for --scale (Llama 3: 50,700)",
    )


def _register_launch(commands: Commands) -> None:
    launchers = add_group(
        commands,
        "launch",
        "start a run through a launcher",
        metavar="LAUNCHER",
        description="Start a run through a launcher, or (--dry-run) print what would be started.",
    )
    local = add_command(launchers, "local", _launch_local, "train on this machine", overrides=True)
    deepspeed = add_command(
        launchers, "deepspeed", _launch_deepspeed, "train under the DeepSpeed launcher", overrides=True
    )
    slurm = add_command(
        launchers, "slurm", _launch_slurm, "submit a job that trains on a Slurm cluster", overrides=True
    )
    for parser in (local, deepspeed, slurm):
        parser.add_argument("config", help="YAML file")
        parser.add_argument("--dry-run", action="store_true", help="print what would be started, and stop")
        _add_allow_changes(parser)
    deepspeed.add_argument(
        "--hostfile",
        type=user_path,
        help="hosts and slots; default: processes on this machine, launch.processes or what the layout needs",
    )
    slurm.add_argument("--account", default="my-account", help="account that the cluster bills")
    slurm.add_argument("--partition", default="gpu", help="partition of the cluster")
    slurm.add_argument("--nodes", type=int, default=2, help="nodes")
    slurm.add_argument("--gpus-per-node", type=int, default=8, help="GPUs, and ranks, per node; 0: none")
    slurm.add_argument("--tasks-per-node", type=int, default=0, help="ranks per node without GPUs; 0: one per GPU")
    slurm.add_argument("--time", default="24:00:00", help="time limit of one start; the job requeues itself until done")
    slurm.add_argument("--warning", type=int, default=300, help="seconds before the limit at which the ranks save")
    slurm.add_argument(
        "--container",
        default="",
        help="image in which everything runs: a .sif file (apptainer), or a .sqsh file or name of an image (pyxis); it "
        "sees this folder and those that the settings name",
    )
    slurm.add_argument("--mount", action="append", default=[], help="another folder that it is to see; repeatable")
    slurm.add_argument("--array", default="", help="indices of array tasks, say 1-8%%2; needs --sweep")
    slurm.add_argument("--sweep", type=user_path, help="file: line n has the overrides of array task n")


def _pretrain(options: argparse.Namespace) -> int:
    from exlm_dist.config import check_init, load_config

    config = load_config(options.config, options.overrides)
    if "RANK" in os.environ:
        check_init(config)
    else:
        _check_run(config)
    if "RANK" not in os.environ and (config.local_processes > 1 or config.launch.restarts):
        from exlm_dist.launch.local import rank_arguments, run_local
        from exlm_dist.launch.restart import Restarts

        arguments = rank_arguments(options.config, options.overrides, allow_changes=options.allow_changes)
        return run_local(arguments, config.local_processes, Restarts.begin(config))
    from exlm_dist.training.loop import train

    return train(config, allow_changes=options.allow_changes)


def _check_run(config: RunConfig) -> None:
    from exlm_dist.doctor.preflight import check_run

    check_run(config)


def _plan(options: argparse.Namespace) -> int:
    from exlm_dist.config import load_config
    from exlm_dist.planning.hardware import Hardware
    from exlm_dist.planning.report import plan_text
    from exlm_dist.planning.scaling import HOUR, Cluster

    hardware = Hardware(
        flops=options.flops * 1e12,
        memory_bandwidth=options.memory_bandwidth * 1e9,
        link_bandwidth=options.link_bandwidth * 1e9,
        network_bandwidth=options.network_bandwidth * 1e9,
        node_size=options.node_size,
    )
    text = plan_text(
        load_config(options.config, options.overrides),
        gpus=options.gpus,
        memory=options.gpu_memory * 2**30,
        margin=options.margin,
        hardware=hardware,
        length=options.length,
        vocab_size=options.vocab_size,
        top=options.top,
        cluster=Cluster(failure=options.failure_hours * HOUR) if options.scale else None,
    )
    print(text)
    return 0


def _launch_local(options: argparse.Namespace) -> int:
    from exlm_dist.config import load_config
    from exlm_dist.launch.start import launch_local

    if not options.dry_run:
        _check_run(load_config(options.config, options.overrides))
    return launch_local(options.config, options.overrides, allow_changes=options.allow_changes, dry_run=options.dry_run)


def _launch_deepspeed(options: argparse.Namespace) -> int:
    from exlm_dist.config import load_config
    from exlm_dist.launch.start import launch_deepspeed

    if not options.dry_run:
        _check_run(load_config(options.config, options.overrides))
    return launch_deepspeed(
        options.config,
        options.overrides,
        allow_changes=options.allow_changes,
        hostfile=options.hostfile,
        dry_run=options.dry_run,
    )


def _launch_slurm(options: argparse.Namespace) -> int:
    from exlm_dist.launch.slurm import Job
    from exlm_dist.launch.start import launch_slurm

    job = Job("pretrain", mounts=tuple(options.mount), **{name: getattr(options, name) for name in _JOB_OPTIONS})
    return launch_slurm(
        job,
        options.config,
        options.overrides,
        allow_changes=options.allow_changes,
        sweep=options.sweep,
        dry_run=options.dry_run,
    )


def _doctor(options: argparse.Namespace) -> int:
    from exlm_dist.doctor.examination import doctor

    return doctor(options.config, options.overrides, nodes=options.nodes)
