"""Measured peak memory of training steps beside the prediction of `exlm_dist/planning/memory.py`.

    python benchmarks/memory.py                    # every case, about five minutes; writes a CSV to results/
    python benchmarks/memory.py --select ranks=2   # the cases whose name contains this
    python benchmarks/memory.py --device cuda      # on one GPU, other cases: what torch allocates at the peak

Measured is how far the resident size grows at its peak beyond that of the process before the model is built; a tiny
model has done a step by then, so that libraries and their buffers are loaded. MALLOC_MMAP_THRESHOLD_ is set so that the
C library returns every freed block of 64 KiB and more to the system: the peak is then that of what is allocated. By
default the library raises its threshold up to 32 MiB and keeps what was freed, and the peak depends on the order of the
blocks (column `default`: the same case without the setting, with --default).
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402

from exlm_dist.config import check_config  # noqa: E402
from exlm_dist.config.schema import RunConfig  # noqa: E402
from exlm_dist.launch.local import free_port  # noqa: E402
from exlm_dist.planning.job import Job  # noqa: E402
from exlm_dist.planning.memory import KINDS, Peak, memory_per_rank  # noqa: E402

MIB = 2**20
STEPS = 2  # the moments of AdamW exist from the second step on
THRESHOLD = {"MALLOC_MMAP_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Case:
    """One training run; `micro` sequences per micro-batch, `accumulation` micro-batches per rank and step."""

    objective: str = "exlm"
    transitions: str = "dense"
    layers: int = 4
    width: int = 256
    heads: int = 4
    length: int = 128
    states: int = 4
    vocabulary: int = 8192
    micro: int = 16
    accumulation: int = 1
    ranks: int = 1
    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False
    zero: int = 1
    recompute: bool = False
    dropout: float = 0.1
    dtype: str = "fp32"

    def config(self) -> RunConfig:
        """The run configuration."""
        plain = {"states": 1, "anchors": False, "transitions": "uniform"} if self.objective == "mlm" else {}
        model = {
            "objective": self.objective, "layers": self.layers, "width": self.width, "heads": self.heads,
            "ffn": 4 * self.width, "states": self.states, "transitions": self.transitions, "dropout": self.dropout,
            "attention_dropout": self.dropout, "max_positions": 4 * self.length, **plain,
        }  # fmt: skip
        config = RunConfig(
            name="memory",
            data={"path": "none"},
            model=model,
            schedule={"steps": 10},
            batch={"sequences": self.micro * self.accumulation * self.replicas, "micro": self.micro},
            parallel={**self.layout(), "zero": self.zero, "activation_checkpointing": self.recompute},
            precision={"dtype": self.dtype},
        )
        check_config(config)
        return config

    @property
    def replicas(self) -> int:
        """Number of data-parallel replicas."""
        return self.ranks // (self.tensor * self.pipeline)

    def layout(self) -> dict[str, int | bool]:
        """Degrees of parallelism, the same for all cases measured in the same processes."""
        return {"tensor": self.tensor, "pipeline": self.pipeline, "sequence": self.sequence}

    def predicted(self) -> Peak:
        """The prediction of the planner."""
        return memory_per_rank(Job(self.config(), self.vocabulary, self.length, self.ranks))

    @property
    def name(self) -> str:
        """What differs from the default."""
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return " ".join(f"{key}={value}" for key, value in changed.items()) or "default"


#: What a rank runs before it is measured; recomputation loads more of torch.
TINY = Case(layers=2, width=64, heads=2, length=16, vocabulary=64, micro=2, recompute=True)
CASES = [
    *(Case(zero=zero, recompute=recompute) for zero in (0, 1, 2) for recompute in (False, True)),
    Case(transitions="sparse"),
    Case(objective="mlm"),
    Case(objective="mlm", zero=2, recompute=True),
    Case(dropout=0.0),
    Case(accumulation=2, zero=2, micro=2, width=384, heads=6),
    Case(width=512, heads=8, micro=4),
    Case(layers=8, width=128, length=512, micro=4),
    Case(vocabulary=32000, width=128, micro=32),
    Case(vocabulary=72, length=48, micro=128),
    Case(vocabulary=72, length=48, micro=128, recompute=True, layers=8),
    Case(states=8, layers=2, micro=8),
    *(Case(ranks=2, zero=zero, recompute=recompute) for zero in (1, 2) for recompute in (False, True)),
    Case(ranks=2, objective="mlm", zero=2),
    Case(ranks=2, transitions="sparse", width=384, heads=6, micro=2),
    Case(ranks=2, zero=2, accumulation=2, micro=2, width=384, heads=6),
    Case(ranks=2, zero=3),
    Case(dtype="bf16", layers=3, width=384, heads=6, micro=1, accumulation=2),
    *(Case(ranks=2, zero=zero, dtype="bf16", layers=3, width=384, heads=6, micro=1) for zero in (1, 2, 3)),
    Case(ranks=2, tensor=2),
    Case(ranks=2, tensor=2, sequence=True),
    Case(ranks=2, tensor=2, width=384, heads=6, micro=2),
    Case(ranks=2, pipeline=2, accumulation=4, micro=8),
    Case(ranks=2, pipeline=2, accumulation=4, micro=8, recompute=True),
    Case(ranks=2, pipeline=2, width=384, heads=6, micro=2),
]
#: One rank in bf16, at sizes where a step's memory matters.
_BASE = {"layers": 12, "width": 768, "heads": 12, "vocabulary": 50304, "dtype": "bf16"}
GPU_CASES = [
    *(Case(**_BASE, zero=zero, micro=128) for zero in (1, 2, 3)),
    Case(**_BASE, micro=128, recompute=True),
    Case(**_BASE, micro=32, length=512),
    Case(**_BASE, micro=128, objective="mlm"),
    Case(**_BASE, micro=128, transitions="sparse"),
    Case(**{**_BASE, "layers": 24, "width": 1024, "heads": 16}, micro=64),
]


def measure(
    cases: list[Case], *, device: str = "cpu", default_malloc: bool = False, timeout: float = 600.0
) -> list[float]:
    """Bytes at the peak of the worst rank of each case, measured one after the other in `ranks` processes.

    All cases must have the same ranks and degrees of parallelism.
    """
    world = cases[0].ranks
    assert all((case.ranks, case.layout()) == (world, cases[0].layout()) for case in cases), "one layout in a call"
    port = str(free_port())
    started = []
    for rank in range(world):
        identity = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
        }
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
        quiet = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": device, **({} if default_malloc else THRESHOLD)}
        command = [sys.executable, __file__, "--device", device, "--run", json.dumps([asdict(case) for case in cases])]
        environment = {**os.environ, **identity, **rendezvous, **quiet}
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    try:
        printed = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    if any(process.returncode for process in started):
        raise RuntimeError(f"a measured process ended with {[process.returncode for process in started]}")
    ranks = [json.loads(text.splitlines()[-1]) for text in printed]
    return [max(peaks) for peaks in zip(*ranks)]


def run_rank(cases: list[Case], device: str) -> list[int]:
    """Peaks of this rank, in bytes."""
    import torch

    from exlm_dist.config.schema import LaunchConfig, ParallelConfig
    from exlm_dist.parallel import process as processes

    layout = {"ranks": cases[0].ranks, **cases[0].layout()}
    process = processes.start(LaunchConfig(timeout=120, device=device, threads=1), ParallelConfig(**cases[0].layout()))
    train(replace(TINY, **layout), process)
    peaks = []
    for case in cases:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            train(case, process)
            peaks.append(torch.cuda.max_memory_allocated() - before)
            continue
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident size
        before = resident("VmRSS")
        train(case, process)
        peaks.append(resident("VmHWM") - before)
    processes.finish()
    return peaks


def train(case: Case, process) -> None:
    """A few steps of the package's engine on random tokens."""
    from exlm_dist.training.engine import build_engine
    from exlm_dist.training.step import optimizer_step

    config = case.config()
    engine = build_engine(config, process, case.vocabulary, case.length)
    for step in range(STEPS):
        optimizer_step(engine, make_step(case, config, step), config, scored=False)
    engine.close()


def make_step(case: Case, config: RunConfig, step: int):
    """This rank's micro-batches of a step, sequences of the full length."""
    from exlm_dist.data.loader import StepBatches

    batches = [make_batch(case, config, index, step) for index in range(case.accumulation)]
    targets = sum(batch.num_targets for batch in batches) * case.replicas
    return StepBatches(step, batches, config.batch.sequences, targets, targets, 0, 0, 0.0)


def make_batch(case: Case, config: RunConfig, index: int, step: int):
    """Random tokens through the package's masking, expansion and packing."""
    from exlm_dist.data.expansion import expand, wrap
    from exlm_dist.data.masking import mask_batch, sample_keys
    from exlm_dist.data.packing import pack
    from exlm_dist.tokenizers.tokenizer import NUM_SPECIAL

    lengths = np.full(case.micro, case.length - 2)
    tokens = np.random.default_rng(step).integers(NUM_SPECIAL, case.vocabulary, lengths.sum())
    samples, epochs = np.arange(case.micro) + 1000 * index, np.full(case.micro, step)
    keys = sample_keys(0, epochs, samples)
    masks = mask_batch(tokens, lengths, keys, ratio=config.masking.ratio, vocab_size=case.vocabulary)
    expanded = expand(wrap(tokens, lengths, masks, anchors=config.model.anchors), config.model.states)
    identity = {"sample_ids": samples, "epochs": epochs, "step": step, "index": index}
    return pack(expanded, 0, case.micro, states=config.model.states, bucket=1, **identity)


def resident(what: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024


def rows_of(cases: list[Case], device: str, also_default: bool) -> list[dict[str, str | float]]:
    """A row of the table for each case."""
    rows = []
    for case in cases:
        peak, predicted = measure([case], device=device)[0], case.predicted()
        row = {"case": case.name, "measured": peak / MIB, "predicted": predicted.total / MIB}
        row |= {"ratio": predicted.total / peak, "moment": predicted.moment}
        row |= {kind: predicted.parts[kind] / MIB if kind in predicted.parts else 0.0 for kind in KINDS}
        if also_default:
            row["default"] = measure([case], default_malloc=True)[0] / MIB
        rows.append(row)
        both = f"{row['measured']:8.1f} {row['predicted']:8.1f} MiB  {row['ratio']:.3f}"
        print(f"{both}  {predicted.moment:30} {case.name}", flush=True)
    return rows


def write(rows: list[dict[str, str | float]], folder: Path, commit: str = "") -> Path:
    """Write the table, with hardware, versions and commit."""
    import torch

    if not commit:
        asked = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    shared = {"date": date.today().isoformat(), "commit": commit, "machine": platform.machine(),
              "torch": torch.__version__, "python": platform.python_version()}  # fmt: skip
    path = folder / f"memory_{shared['date']}.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *shared])
        writer.writeheader()
        for row in rows:
            rounded = {k: round(v, 3 if k == "ratio" else 1) if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow({**rounded, **shared})
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--select", default="", help="only cases whose name contains one of these")
    parser.add_argument("--default", action="store_true", help="also measure with the default settings of malloc")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the CSV")
    parser.add_argument("--commit", default="", help="of the code, where there is no git folder")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        peaks = run_rank([Case(**case) for case in json.loads(options.run)], options.device)
        print(json.dumps(peaks), flush=True)
        return
    words = options.select.split(",")
    cases = GPU_CASES if options.device == "cuda" else CASES
    rows = rows_of(
        [case for case in cases if any(word in case.name for word in words)], options.device, options.default
    )
    worst = max(abs(row["ratio"] - 1) for row in rows)
    print(f"largest difference {worst:.1%}; {write(rows, options.out, options.commit)}")


if __name__ == "__main__":
    main()
