"""Checks of `exlm doctor` that need this machine alone: each inspects one thing and says what to do about it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import random
import re
import resource
import shutil
import socket
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from exlm_dist.checkpoint.tensors import BYTES_PER_PARAMETER
from exlm_dist.config import check_init
from exlm_dist.config.schema import RunConfig
from exlm_dist.data.manifest import MANIFEST, read_manifest
from exlm_dist.data.mirror import data_folder, local_shard
from exlm_dist.doctor.findings import Finding, bad, doubtful, good
from exlm_dist.launch.deadline import end_of_job
from exlm_dist.utils.cores import available_cores
from exlm_dist.utils.files import sha256_file
from exlm_dist.utils.locks import lock
from exlm_dist.utils.outputs import nearest_folder

PYTHONS = ((3, 10), (3, 13))
#: Shards of each split whose hashes are compared.
SAMPLED = 2
#: Bytes written to measure the disk, and bytes per second below which saves slow a run down.
PROBE_BYTES = 32 << 20
SLOW_DISK = 50e6
#: Seconds within which a tracking server must answer.
PATIENCE = 5.0
_NO_TRACKING = "tracking.mlflow is off: events.jsonl only"
_REQUIREMENT = re.compile(r"^([A-Za-z0-9_.-]+)\s*>=\s*([0-9.]+)$")


def check_packages() -> list[Finding]:
    """Versions of Python and of every required package, against those that are supported."""
    major, minor, _ = platform.python_version_tuple()
    known = PYTHONS[0] <= (int(major), int(minor)) <= PYTHONS[1]
    span = " to ".join(".".join(map(str, version)) for version in PYTHONS)
    text = f"Python {platform.python_version()}"
    findings = [good("python", text) if known else doubtful("python", text, f"Tested with Python {span}.")]
    found, problems = [], []
    for requirement in importlib.metadata.requires("exlm_dist") or []:
        match = _REQUIREMENT.match(requirement)
        if match is None:
            continue
        name, least = match.groups()
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{name} is missing")
            continue
        found.append(f"{name} {version}")
        if _numbers(version) < _numbers(least):
            problems.append(f"{name} {version} is older than {least}")
    if problems:
        return [*findings, bad("packages", ", ".join(problems), "Install with launchers/install.sh.")]
    return [*findings, good("packages", ", ".join(found[:4]) + f" and {len(found[4:])} more")]


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version.split("+")[0])]


def check_limits() -> Finding:
    """The limit on open files (shards, connections between ranks, logs), and the cores."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{files} open files, {available_cores()} cores"
    return good("limits", text) if files >= 1024 else doubtful("limits", text, "Raise it: ulimit -n 4096.")


def check_initial_weights(config: RunConfig) -> Finding:
    """Whether the weights that a new run starts from are there. ConfigError, which says where they may be, if not."""
    check_init(config)
    return good("weights", f"from {config.init}" if config.init else "random")


def check_shards(config: RunConfig, seed: int = 0) -> list[Finding]:
    """Sizes of all shards and indices of the prepared data, and hashes of a few drawn with `seed`. DataError for a
    manifest that cannot be used."""
    folder = data_folder(config.data.path)
    remedy = f"Prepare or copy the data again, or set data.path (now {config.data.path})."
    if not (folder / MANIFEST).is_file():
        return [bad("shards", f"{folder} has no {MANIFEST}", remedy)]
    manifest = read_manifest(folder)
    problems, hashed, count, total = [], 0, 0, 0
    for split in manifest["splits"].values():
        sampled = random.Random(seed).sample(split["shards"], min(SAMPLED, len(split["shards"])))
        for shard in split["shards"]:
            count, total = count + 1, total + shard["size"]
            for name, size, digest in (
                (shard["name"], shard["size"], shard["sha256"]),
                (shard["index"], shard["index_size"], shard["index_sha256"]),
            ):
                path = local_shard(folder, name) if name == shard["name"] else folder / name
                if path is None:  # behind an address
                    continue
                if not path.is_file() or path.stat().st_size != size:
                    problems.append(f"{name} is missing or does not have {size} bytes")
                elif shard in sampled:
                    hashed += 1
                    if sha256_file(path) != digest:
                        problems.append(f"{name} is damaged: its SHA-256 is not that of the manifest")
    if problems:
        return [bad("shards", problem, remedy) for problem in problems[:5]]
    return [good("shards", f"{count} shards, {total / 1e6:.1f} MB, complete; {hashed} files hashed and equal")]


def check_space(config: RunConfig, parameters: int) -> Finding:
    """Space for all checkpoints that are kept, and for the one being written."""
    folder = nearest_folder(Path(config.runs))
    kept = config.checkpoint.keep + config.checkpoint.best + 1
    needed, free = kept * parameters * BYTES_PER_PARAMETER, shutil.disk_usage(folder).free
    text = (
        f"{free / 1e9:.1f} GB free in {folder}; {kept} checkpoints of {parameters / 1e6:.1f} M parameters "
        f"are {needed / 1e9:.1f} GB"
    )
    if free < needed:
        return bad("free space", text, "Free space there, set `runs` to another file system, or lower checkpoint.keep.")
    return good("free space", text)


def check_disk(config: RunConfig, parameters: int) -> Finding:
    """Write speed of the file system of the runs, fsync included, and what that means for a checkpoint."""
    folder = nearest_folder(Path(config.runs))
    probe = folder / f".exlm-doctor-{socket.gethostname()}-{os.getpid()}"
    block = os.urandom(1 << 20)
    begun = time.monotonic()
    try:
        with open(probe, "wb") as file:
            for _ in range(PROBE_BYTES >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        speed = PROBE_BYTES / (time.monotonic() - begun)
    except OSError as error:
        return bad(
            "disk", f"{folder} cannot be written: {error.strerror}", "Set `runs` to a folder that you may write to."
        )
    finally:
        probe.unlink(missing_ok=True)
    seconds = parameters * BYTES_PER_PARAMETER / speed
    text = f"{speed / 1e6:.0f} MB/s to {folder}; a checkpoint takes about {seconds:.1f} s to write from one process"
    return good("disk", text) if speed > SLOW_DISK else doubtful("disk", text, "Set `runs` to a faster file system.")


def check_locks(config: RunConfig) -> Finding:
    """Whether the file system of the runs has the locks by which a second process on the same run is refused."""
    folder = nearest_folder(Path(config.runs))
    with tempfile.TemporaryFile(dir=folder) as file:
        if lock(file.fileno(), folder):
            return good("file locks", f"{folder} has them: a second start of a running run is refused")
    text = f"{folder} has none: a second start of a running run is not refused"
    return doubtful("file locks", text, "Start each run once, or have Lustre mounted with -o flock.")


def unusable_tracking(config: RunConfig, why: str) -> Finding:
    """What to say of an address that MLflow does not accept."""
    if not config.tracking.mlflow:
        return good("tracking", _NO_TRACKING)
    return doubtful("tracking", why, "Training would work, and send the events later (`exlm sync`).")


def check_tracking(config: RunConfig, uri: str, shown: str) -> Finding:
    """Whether MLflow answers at `uri`; `shown`: the same without passwords. Never FAIL: training works without it."""
    if not config.tracking.mlflow:
        return good("tracking", _NO_TRACKING)
    remedy = "Start it or set tracking.uri. Training would work, and send the events later (`exlm sync`)."
    if uri.startswith("sqlite:"):
        folder = nearest_folder(Path(uri.removeprefix("sqlite:///")).parent)
        if os.access(folder, os.W_OK):
            return good("tracking", f"{shown} can be written")
        return doubtful("tracking", f"{shown}: {folder} cannot be written", remedy)
    if not uri.startswith(("http://", "https://")):
        return good("tracking", f"{shown} (not tried: not an HTTP address)")
    try:
        with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=PATIENCE):
            return good("tracking", f"{shown} answers")
    except urllib.error.HTTPError as error:
        return good("tracking", f"{shown} answers ({error.code} to an unsigned request)")
    except (urllib.error.URLError, OSError) as error:
        return doubtful("tracking", f"{shown} does not answer: {getattr(error, 'reason', error)}", remedy)


def check_port() -> Finding:
    """The rendezvous port of the ranks, if the environment names one."""
    port = os.environ.get("MASTER_PORT", "")
    if not port:
        return good("port", "MASTER_PORT is not set: a free one is chosen at each start")
    with socket.socket() as probe:
        try:
            probe.bind(("", int(port)))
        except OSError as error:
            return bad(
                "port",
                f"MASTER_PORT {port} on {socket.gethostname()}: {error.strerror}",
                "Unset it, or name a free one.",
            )
    return good("port", f"MASTER_PORT {port} is free on {socket.gethostname()}")


def check_time_limit(config: RunConfig) -> Finding:
    """The time left against the time between two checkpoints, from the step time that the run itself last measured."""
    end = end_of_job(config.launch.time_limit)
    left = None if end is None else end - time.time()
    step = _measured_step(Path(config.runs) / config.name / "events.jsonl")
    limit = "no time limit" if left is None else f"{left / 60:.0f} minutes are left"
    if step is None:
        return good("time limit", f"{limit}; the step time is not known before the first run")
    interval = step * config.checkpoint.every
    text = f"{limit}; checkpoint.every {config.checkpoint.every} steps of {step:.2f} s are {interval / 60:.1f} minutes"
    if left is not None and interval + config.launch.margin > left:
        fits = max(1, int((left - config.launch.margin) / 3 / step))
        return doubtful(
            "time limit", text, f"A failure would lose the whole job. Set checkpoint.every to {fits} or less."
        )
    return good("time limit", text)


def _measured_step(events: Path) -> float | None:
    """Last `perf/step_seconds` that the run logged; None before the first."""
    if not events.is_file():
        return None
    last = None
    for line in events.read_text().splitlines():
        if "perf/step_seconds" in line and line.endswith("}"):
            last = json.loads(line)["values"]["perf/step_seconds"]
    return last
