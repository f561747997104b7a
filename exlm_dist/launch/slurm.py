"""Slurm job files as text, and the `sbatch` command that submits one. Rendering is pure: no file, no process, no torch.

`slurm/*.sh` are `FILES`, rendered; a test compares them.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exlm_dist.launch.slurm_scripts import COMMON, EVALUATE, PREPARE, PRETRAIN, SWEEP, SWEEP_IF_GIVEN
from exlm_dist.utils.errors import ConfigError
from exlm_dist.utils.files import write_atomic

BODIES = {"pretrain": SWEEP + PRETRAIN, "evaluate": SWEEP_IF_GIVEN + EVALUATE, "prepare": SWEEP + PREPARE}
USES = {
    "pretrain": (
        "Pretrain, or continue, a run on a Slurm cluster.",
        "CONFIG [--section.key VALUE ...]",
    ),
    "evaluate": (
        "Evaluate checkpoints on one GPU of a Slurm cluster; the arguments are those of `exlm evaluate`.",
        "RUN [--mask-ratio R ...], or moleculenet --checkpoint RUN ... --data FOLDER --out FOLDER",
    ),
    "prepare": (
        "Prepare data on one node of a Slurm cluster; the arguments are those of `exlm prepare`.",
        "smiles --input FILE ... --out FOLDER",
    ),
}


@dataclass(frozen=True)
class Job:
    """What a user decides about a job; everything else is derived on the cluster.

    `gpus_per_node` 0: a job without GPUs, with `tasks_per_node` ranks on each node; else there is one for each GPU.
    `warning`: seconds before the time limit at which the ranks are asked to save (Slurm may be a minute early).
    `container`: image in which everything runs, a .sif file (apptainer) or what pyxis takes; `mounts`: absolute paths
    of the folders that it sees beside the one where sbatch is called, and /tmp. ConfigError for what Slurm would
    refuse.
    """

    kind: str
    account: str = "my-account"
    partition: str = "gpu"
    nodes: int = 1
    gpus_per_node: int = 8
    time: str = "24:00:00"
    tasks_per_node: int = 0
    array: str = ""
    warning: int = 300
    container: str = ""
    mounts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("gpus_per_node", 0), ("tasks_per_node", 0), ("warning", 10)):
            if getattr(self, name) < least:
                option = "--" + name.replace("_", "-")
                raise ConfigError(f"{option} is {getattr(self, name)}. Give {least} or more.")
        if self.gpus_per_node and self.tasks_per_node not in (0, self.gpus_per_node):
            raise ConfigError(
                f"--tasks-per-node is {self.tasks_per_node} and --gpus-per-node {self.gpus_per_node}, but a rank uses "
                f"one GPU. Leave out --tasks-per-node, or give --gpus-per-node {self.tasks_per_node} (0: no GPUs)."
            )
        for name in ("account", "partition", "time", "array"):
            if any(character.isspace() for character in getattr(self, name)):
                raise ConfigError(
                    f"--{name} {getattr(self, name)!r} contains a space. Give one word, as sbatch takes it."
                )
        for folder in self.mounts:
            if re.search(r"[\s,:]", folder):
                raise ConfigError(
                    f"{folder!r} cannot be mounted into a container: its name has a space, a comma or a colon. "
                    "Give the folder another name, or a symbolic link without them."
                )

    @property
    def ranks_per_node(self) -> int:
        """Ranks on each node, as the job file derives them."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def ranks(self) -> int:
        """Ranks of the whole job."""
        return self.nodes * self.ranks_per_node


FILES = {
    "pretrain": Job("pretrain", nodes=2),
    "evaluate": Job("evaluate", gpus_per_node=1, time="04:00:00"),
    "prepare": Job("prepare", partition="cpu", gpus_per_node=0, time="12:00:00"),
}


def render(job: Job) -> str:
    """The text of the job file."""
    what, arguments = USES[job.kind]
    lines = [
        "#!/bin/bash",
        f"# {what}",
        f"#   sbatch slurm/{job.kind}.sh {arguments}",
        "# Edit these lines, or give their options to sbatch before the name of this file; everything else is derived.",
        *(f"#SBATCH {line}" for line in _editable(job)),
        "",
        *(f"#SBATCH {line}" for line in _derived(job)),
        "",
        "# A container for everything: a .sif file (apptainer), or a .sqsh file or name of an image (pyxis); and the",
        "# folders that it must see beside this one: data, runs, targets of symbolic links. See containers/README.md.",
        f"image={shlex.quote(job.container) if job.container else ''}",
        f"mounts=({' '.join(map(shlex.quote, job.mounts))})",
    ]
    return "\n".join(lines) + "\n" + COMMON + BODIES[job.kind]


def write_files(folder: str | Path) -> None:
    """Write the job files of the repository to `folder`."""
    for name, job in FILES.items():
        path = Path(folder) / f"{name}.sh"
        write_atomic(path, render(job))
        path.chmod(0o755)


def _editable(job: Job) -> list[str]:
    ranks = f"--gpus-per-node={job.gpus_per_node}" if job.gpus_per_node else f"--ntasks-per-node={job.ranks_per_node}"
    return [
        f"--account={job.account}",
        f"--partition={job.partition}",
        f"--nodes={job.nodes}",
        ranks,
        f"--time={job.time}",
    ]


def _derived(job: Job) -> list[str]:
    lines = [f"--job-name=exlm-{job.kind}", "--output=slurm-%x-%j.log", "--open-mode=append", "--requeue"]
    if job.kind != "evaluate":
        lines += ["--exclusive", "--mem=0"]  # whole nodes
    if job.kind == "pretrain":
        lines.append(f"--signal=B:USR1@{job.warning}")
    if job.array:
        lines.append(f"--array={job.array}")
    return lines


def submit(job: Job, arguments: Sequence[str], script: Path, *, sweep: Path | None = None) -> int:
    """Write the job file to `script` and submit it; the exit code of sbatch."""
    script.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(script, render(job))
    try:
        return subprocess.run(sbatch_command(script, arguments, sweep=sweep), check=False).returncode
    except FileNotFoundError as error:
        raise ConfigError(
            f"there is no sbatch on this machine. Run this on a login node of the cluster; the job file is {script}."
        ) from error


def sbatch_command(script: Path, arguments: Sequence[str], *, sweep: Path | None = None) -> list[str]:
    """Command line that submits the job file `script` with the arguments of `exlm pretrain`."""
    environment = [f"--export=ALL,EXLM_SWEEP={sweep}"] if sweep else []
    return ["sbatch", *environment, str(script), *arguments]
