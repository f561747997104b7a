"""What each layout sends in a step, counted, beside the formulas of docs/parallelism.md; and the bubble of a pipeline.

    python benchmarks/parallel.py                      # 2 and 4 gloo processes of this machine
    python benchmarks/parallel.py --counts             # instead: real runs, with all that `parallel_counts` counts

Bytes are counted by kind of collective during one step of the real engine (`exlm_dist.parallel.traffic`), on the first
rank of each stage; nothing is timed. For the bubble every stage is made to take the same time (it sleeps, forward once,
backward twice as long), so that the schedule is measured and not the cores of this machine: the fraction of a step in
which a rank is in no forward or backward pass, mean over the ranks, beside (p - 1) / (m + p - 1). Writes two CSVs with
versions and commit to results/.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from parallel_counts import count_all  # noqa: E402

from exlm_dist.config.schema import RunConfig  # noqa: E402
from exlm_dist.launch.local import free_port  # noqa: E402
from exlm_dist.tokenizers.tokenizer import NUM_SPECIAL  # noqa: E402

VOCABULARY = 512
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"tensor": 2, "data": 1},
    "TP2 sequence": {"tensor": 2, "data": 1, "sequence": True},
    "PP2": {"pipeline": 2, "data": 1},
    "PP4": {"pipeline": 4, "data": 1},
    "DP2 ZeRO-0": {"data": 2, "zero": 0},
    "DP2 ZeRO-1": {"data": 2},
    "DP2 ZeRO-2": {"data": 2, "zero": 2},
    "DP2 ZeRO-3": {"data": 2, "zero": 3},
    "TP2 PP2": {"tensor": 2, "pipeline": 2, "data": 1},
    "TP2 PP2 sequence": {"tensor": 2, "pipeline": 2, "data": 1, "sequence": True},
    "TP2 DP2": {"tensor": 2, "data": 2},
    "PP2 DP2": {"pipeline": 2, "data": 2},
}
BUBBLES = [(2, 1), (2, 2), (2, 4), (2, 8), (4, 4), (4, 8), (4, 16)]
SEND, REDUCE, GATHER, SCATTER = "send", "all_reduce", "all_gather", "reduce_scatter"


def config_of(parallel: dict[str, Any], micro_batches: int) -> RunConfig:
    replicas = parallel.get("data", 1)
    return RunConfig.model_validate(
        {
            "name": "benchmark",
            "data": {"path": "in memory"},
            "model": {"layers": 4, "width": 64, "heads": 4, "ffn": 256, "max_positions": 256},
            "batch": {"sequences": 2 * replicas * micro_batches, "micro": 2},
            "optimizer": {"clip": 1.0},
            "schedule": {"steps": 10},
            "parallel": parallel,
            "launch": {"device": "cpu", "threads": 1, "timeout": 120},
        }
    )


class Sequences:
    """Random tokens, as the loader reads them."""

    def __init__(self, count: int = 256) -> None:
        random = np.random.default_rng(0)
        self.lengths = random.integers(24, 63, count)
        self._tokens = [random.integers(NUM_SPECIAL, VOCABULARY, length) for length in self.lengths]

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.concatenate([self._tokens[number] for number in ids]).astype(np.int64), self.lengths[ids]


def opened(config: RunConfig) -> tuple[Any, Any, Any]:
    """(process, loader, engine) of this rank."""
    from exlm_dist.data.loader import Loader
    from exlm_dist.data.order import Order
    from exlm_dist.data.recipe import Recipe
    from exlm_dist.parallel import process as processes
    from exlm_dist.training.engine import build_engine

    process = processes.start(config.launch, config.parallel)
    data = process.grid.data
    loader = Loader(
        Sequences(),
        replace(Recipe.of(config, VOCABULARY), bucket=1),
        order=Order.of(config.data, config.seed, len(Sequences())),
        global_batch=config.batch.sequences,
        rank=data.rank,
        world=data.size,
        prefetch=0,
    )
    return process, loader, build_engine(config, process, VOCABULARY, 45.0)


def counted(config: RunConfig) -> dict[str, Any] | None:
    """{kind: (calls, bytes, bytes by formula)} of one step; None except on the first rank of a stage."""
    from exlm_dist.parallel import process as processes
    from exlm_dist.parallel.traffic import Traffic
    from exlm_dist.training.engine import base as engines
    from exlm_dist.training.step import optimizer_step

    engines.deepspeed_config = partitioning_all(engines.deepspeed_config)
    process, loader, engine = opened(config)
    optimizer_step(engine, loader.step(0), config, scored=False)
    batches = loader.step(1)
    with Traffic() as traffic:
        optimizer_step(engine, batches, config, scored=False)
    expected = formula(config, process.grid, engine, [engine.stream(batch) for batch in batches.micro_batches])
    engine.close()
    processes.finish()
    if not (process.grid.tensor.is_first and process.grid.data.is_first):
        return None
    kinds = sorted(traffic.calls.keys() | expected.keys())
    return {kind: (traffic.calls[kind], traffic.bytes[kind], expected[kind]) for kind in kinds}


def partitioning_all(plain: Any) -> Any:
    """The settings for DeepSpeed, but at ZeRO 3 no parameter is so small, or needed so soon, that it stays whole."""

    def settings(*arguments: Any) -> dict[str, Any]:
        result = plain(*arguments)
        if result["zero_optimization"]["stage"] == 3:
            names = ("param_persistence_threshold", "max_reuse_distance", "max_live_parameters", "prefetch_bucket_size")
            result["zero_optimization"] |= {f"stage3_{name}": 0 for name in names}
        return result

    return settings


def formula(config: RunConfig, grid: Any, engine: Any, streams: list[Any]) -> Counter[str]:
    """Bytes by kind that docs/parallelism.md says a rank exchanges in a step on these micro-batches, in fp32."""
    total: Counter[str] = Counter()
    for stream in streams:
        if grid.tensor.size > 1:
            total.update(tensor_formula(config, grid, stream))
        if grid.pipeline.size > 1:
            total[SEND] += pipeline_formula(config, grid, stream)
    if grid.pipeline.size > 1 and (grid.pipeline.is_first or grid.pipeline.is_last):
        total[REDUCE] += 4 * -(-VOCABULARY // grid.tensor.size) * config.model.width
    if grid.data.size > 1:
        local = 4 * sum(int(np.prod(part.part_shape)) for part in engine.parameters)
        zero, passes = config.parallel.zero, len(streams)
        total[SCATTER if zero == 3 else REDUCE] += local * (passes if zero > 1 else 1)
        # ZeRO 3 gathers the tied matrix for each of the two layers that use it.
        tied = 4 * VOCABULARY * config.model.width
        total[GATHER] += {0: 0, 3: 2 * passes * (local + tied)}.get(zero, local)
    return total


def pipeline_formula(config: RunConfig, grid: Any, stream: Any) -> int:
    """Hidden states are sent on, their gradients back."""
    splits = grid.tensor.size if config.parallel.sequence else 1
    rows = stream.aligned(splits).input_ids.numel()
    hidden = 4 * rows * config.model.width // splits
    return hidden * ((not grid.pipeline.is_first) + (not grid.pipeline.is_last))


def tensor_formula(config: RunConfig, grid: Any, stream: Any) -> Counter[str]:
    """The table of the section on tensor parallelism, for the layers of this stage."""
    from exlm_dist.model.stages import cut_layers, layer_costs

    model, sequence = config.model, config.parallel.sequence
    stream = stream.aligned(grid.tensor.size if sequence else 1)
    token, state = (4 * model.width * len(rows) for rows in (stream.input_ids, stream.state_index))
    costs = layer_costs(model, VOCABULARY, 45.0, config.masking.ratio)
    stage = cut_layers(costs, grid.pipeline.size)[grid.pipeline.rank]
    first, last = grid.pipeline.is_first, grid.pipeline.is_last
    blocks = len([layer for layer in stage if 1 <= layer <= model.layers])
    whole = blocks - last
    total: Counter[str] = Counter()
    if sequence:
        total[GATHER] += token * first + 6 * whole * token + last * (3 * token + 4 * state + state)
        total[SCATTER] += token * first + 4 * whole * token + last * (2 * token + 3 * state)
        total[REDUCE] += 4 * model.width * (6 * blocks + 2 * last)
    else:
        total[REDUCE] += token * first + 4 * whole * token + last * (token + 3 * state)
    if last:
        states, row = len(stream.state_index), 4 * stream.num_sequences * stream.max_states
        total[REDUCE] += 2 * state + 8 * states + 4 * states * stream.max_targets + 2 * row * (stream.max_states + 1)
        total[REDUCE] += 4 * model.width * stream.max_tokens
    return total


def bubble(config: RunConfig, seconds: float, rounds: int = 4) -> float:
    """Fraction of a step in which this rank is in no pass, where forward takes `seconds` and backward twice that."""
    from deepspeed.runtime.pipe import schedule
    from deepspeed.runtime.pipe.engine import PipelineEngine

    from exlm_dist.parallel import process as processes
    from exlm_dist.training.step import optimizer_step

    busy = 0.0

    def lasting(instruction: Any, at_least: float) -> None:
        plain = PipelineEngine._INSTRUCTION_MAP[instruction]

        def timed(engine: Any, **arguments: Any) -> None:
            nonlocal busy
            start = time.perf_counter()
            plain(engine, **arguments)
            time.sleep(max(0.0, at_least - (time.perf_counter() - start)))
            busy += time.perf_counter() - start

        PipelineEngine._INSTRUCTION_MAP[instruction] = timed

    lasting(schedule.ForwardPass, seconds)
    lasting(schedule.BackwardPass, 2 * seconds)
    process, loader, engine = opened(config)
    fractions = []
    for number in range(rounds):
        batches, busy = loader.step(number), 0.0
        process.all_gather([0.0])
        start = time.perf_counter()
        optimizer_step(engine, batches, config, scored=False)
        fractions.append(1 - busy / (time.perf_counter() - start))
    engine.close()
    processes.finish()
    return float(np.median(fractions[1:]))


def on_ranks(function: Any, config: RunConfig, *arguments: Any) -> list[Any]:
    """`function(config, *arguments)` on as many gloo processes as the layout has ranks."""
    world, port = config.local_processes, str(free_port())
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "deepspeed", "exlm_dist.training.session", "exlm_dist.parallel.tensor"])
    with context.Pool(world, maxtasksperchild=1) as pool:
        tasks = [(rank, world, port, function, config.model_dump(), arguments) for rank in range(world)]
        return pool.starmap_async(_rank, tasks, chunksize=1).get(timeout=300)


def _rank(rank: int, world: int, port: str, function: Any, settings: dict[str, Any], arguments: tuple) -> Any:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    return function(RunConfig.model_validate(settings), *arguments)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    print(f"written to {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.1, help="time of a stage's forward pass, for the bubble")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the CSVs")
    parser.add_argument("--counts", action="store_true", help="count steps and resumes of real runs instead")
    options = parser.parse_args()
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout
    import torch

    about = {"commit": commit.strip(), "torch": torch.__version__, "processor": platform.machine()}
    if options.counts:
        count_all(options.out / f"parallel_counts_{date.today()}.csv", about, write)
        return
    sent, fractions = [], []
    for name, parallel in LAYOUTS.items():
        found = [stage for stage in on_ranks(counted, config_of(parallel, 4)) if stage is not None]
        for stage, kinds in enumerate(found):
            for kind, (calls, number, expected) in kinds.items():
                print(f"{name:18} stage {stage}  {kind:15} {calls:5} calls {number:10} bytes  formula {expected:10}")
                row = {"layout": name, "stage": stage, "collective": kind, "calls": calls, "bytes": number}
                sent.append({**row, "formula": expected, **about})
    for stages, micro_batches in BUBBLES:
        parallel = {"pipeline": stages, "data": 1}
        measured = float(np.mean(on_ranks(bubble, config_of(parallel, micro_batches), options.seconds)))
        expected = (stages - 1) / (micro_batches + stages - 1)
        print(f"{stages} stages, {micro_batches:2} micro-batches: bubble {measured:.1%}, formula {expected:.1%}")
        row = {"stages": stages, "micro_batches": micro_batches, "bubble": round(measured, 4)}
        fractions.append({**row, "formula": round(expected, 4), "forward_seconds": options.seconds, **about})
    write(options.out / f"parallel_traffic_{date.today()}.csv", sent)
    write(options.out / f"parallel_bubble_{date.today()}.csv", fractions)


if __name__ == "__main__":
    main()
