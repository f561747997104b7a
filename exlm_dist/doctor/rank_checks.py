"""Checks of `exlm doctor` that need ranks: started as those of a run, here or by srun on every node of the allocation,
they report what they see (`exlm_dist.doctor.probe`)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

from exlm_dist.config.schema import LaunchConfig
from exlm_dist.doctor.findings import Finding, bad, doubtful, good
from exlm_dist.launch.local import rank_environments, supervise
from exlm_dist.launch.slurm_scripts import RANKS_PER_NODE
from exlm_dist.utils.errors import ConfigError

MODULE = "exlm_dist.doctor.probe"
#: Seconds for the ranks to start, meet and measure.
PATIENCE = 300
#: Seconds by which clocks differ before logs become hard to read, and before deadlines are missed.
SKEW_WARN, SKEW_FAIL = 1.0, 20.0
#: Bytes per second of an all-reduce below which GPUs wait for the network.
SLOW_NETWORK = 1e9
#: Environment of each task of srun.
_TASK = 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; exec "$@"'


def check_ranks(launch: LaunchConfig, runs: Path, *, processes: int | None) -> list[Finding]:
    """Start ranks (`processes` here; None: on all nodes of this Slurm job) and judge what they report."""
    runs.mkdir(parents=True, exist_ok=True)
    report = runs.resolve() / f".exlm-doctor-{uuid.uuid4().hex}"
    arguments = [str(report), launch.device, str(min(launch.timeout, PATIENCE))]
    try:
        code = _on_nodes(arguments) if processes is None else _here(arguments, processes)
        if not report.is_file():
            what = f"the ranks ended with code {code}; their messages are above"
            if code == 0:
                what = f"the ranks ran, but what they wrote to {runs} is not visible on {socket.gethostname()}"
            return [
                bad("ranks", what, "Every node must see the folder `runs`, and reach the first node over the network.")
            ]
        return judge(json.loads(report.read_text()))
    finally:
        for path in report.parent.glob(report.name + "*"):
            path.unlink()


def _here(arguments: list[str], processes: int) -> int:
    with tempfile.TemporaryDirectory(prefix="exlm-") as folder:
        return supervise([sys.executable, "-m", MODULE, *arguments], rank_environments(processes, Path(folder)))


def _on_nodes(arguments: list[str]) -> int:
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        raise ConfigError(
            "--nodes checks the nodes of a Slurm job, but this is not one. Call it inside salloc or sbatch."
        )
    nodes, per_node = int(os.environ["SLURM_JOB_NUM_NODES"]), _ranks_per_node()
    environment = {
        **os.environ,
        "WORLD_SIZE": str(nodes * per_node),
        "LOCAL_WORLD_SIZE": str(per_node),
        "MASTER_ADDR": _first_address(),
        "MASTER_PORT": str(33000 + int(job) % 8000),
    }
    command = [
        "srun",
        "--mpi=none",
        f"--nodes={nodes}",
        f"--ntasks={nodes * per_node}",
        f"--ntasks-per-node={per_node}",
    ]
    command += ["--kill-on-bad-exit=1", "bash", "-c", _TASK, "rank", sys.executable, "-m", MODULE, *arguments]
    try:
        return subprocess.run(command, env=environment, timeout=PATIENCE + 60).returncode
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"srun did not end within {PATIENCE + 60} s: {' '.join(command[:6])} ...") from error


def _ranks_per_node() -> int:
    """As the job file derives them; ConfigError for what it refuses."""
    script = f'refuse() {{ echo "$*"; exit 2; }}\n{RANKS_PER_NODE}\necho "$per_node"'
    done = subprocess.run(
        ["bash", "-c", f"set -uo pipefail\n{script}"], capture_output=True, text=True, timeout=PATIENCE
    )
    if done.returncode != 0:
        raise ConfigError(
            f"the job was asked for in a way that no run can use: {(done.stdout or done.stderr).strip()}."
        )
    return int(done.stdout)


def _first_address() -> str:
    """Address of the first node as Slurm knows it: names of nodes need not resolve everywhere."""
    names = subprocess.run(
        ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]], capture_output=True, text=True, timeout=60
    )
    first = names.stdout.split()[0]
    node = subprocess.run(["scontrol", "-o", "show", "node", first], capture_output=True, text=True, timeout=60)
    return next(word.removeprefix("NodeAddr=") for word in node.stdout.split() if word.startswith("NodeAddr="))


def judge(ranks: list[dict[str, Any]]) -> list[Finding]:
    """Findings from what each rank reported (`exlm_dist.doctor.probe`)."""
    return [
        _judge_devices(ranks),
        _judge_versions(ranks),
        _judge_reduction(ranks),
        _judge_files(ranks),
        _judge_clocks(ranks),
    ]


def _judge_devices(ranks: list[dict[str, Any]]) -> Finding:
    kinds = sorted({rank["device"] for rank in ranks})
    nodes = len({rank["host"] for rank in ranks})
    text = f"{len(ranks)} ranks on {nodes} nodes: {', '.join(kinds)} ({ranks[0]['backend']})"
    wrong = [rank for rank in ranks if not rank["computes"]]
    if wrong:
        where = ", ".join(f"rank {rank['rank']} on {rank['host']}" for rank in wrong)
        return bad("devices", f"a matrix product is wrong on {where}", "Drain that node: its device miscalculates.")
    if len(kinds) > 1:
        return doubtful("devices", text, "The slowest device sets the pace. Ask Slurm for one kind (--constraint).")
    return good("devices", text)


def _judge_versions(ranks: list[dict[str, Any]]) -> Finding:
    kinds = {json.dumps(rank["versions"], sort_keys=True): rank["host"] for rank in ranks}
    if len(kinds) > 1:
        text = "; ".join(f"{host}: {versions}" for versions, host in kinds.items())
        return bad("same versions", text, "Start the same environment, or the same container, on every node.")
    return good("same versions", ", ".join(f"{name} {version}" for name, version in ranks[0]["versions"].items()))


def _judge_reduction(ranks: list[dict[str, Any]]) -> Finding:
    size = ranks[0]["reduced_bytes"]
    text = ""
    if len(ranks) > 1:
        speed = 2 * (len(ranks) - 1) / len(ranks) * size / max(rank["reduce_seconds"] for rank in ranks)
        text = f"{size / 1e6:.0f} MB over {len(ranks)} ranks at {speed / 1e9:.2f} GB/s"
    if not all(rank["reduced_well"] for rank in ranks):
        return bad("all-reduce", "the sum over all ranks is wrong", "Try NCCL_DEBUG=INFO, NCCL_P2P_DISABLE=1.")
    if len(ranks) == 1:
        return good("all-reduce", "one rank: nothing to reduce (set launch.processes, or give --nodes)")
    if ranks[0]["backend"] == "nccl" and speed < SLOW_NETWORK:
        return doubtful("all-reduce", text, "Slow for GPUs. NCCL_DEBUG=INFO shows the network; set NCCL_SOCKET_IFNAME.")
    return good("all-reduce", text)


def _judge_files(ranks: list[dict[str, Any]]) -> Finding:
    blind = [f"{rank['host']} does not see the file of rank {other}" for rank in ranks for other in rank["unseen"]]
    if blind:
        return bad(
            "shared files", "; ".join(blind[:4]), "Set `runs` to a folder on a file system that every node mounts."
        )
    return good("shared files", "the first rank of each node sees the files of the others")


def _judge_clocks(ranks: list[dict[str, Any]]) -> Finding:
    clocks = [rank["clock"] for rank in ranks]
    skew = max(clocks) - min(clocks)
    text = f"at most {max(skew, 0.001):.3f} s apart"
    remedy = "Synchronise the clocks by NTP (chrony): deadlines and the order of log lines depend on them."
    if skew > SKEW_FAIL:
        return bad("clocks", text, remedy)
    return doubtful("clocks", text, remedy) if skew > SKEW_WARN else good("clocks", text)
