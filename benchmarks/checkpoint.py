"""Saving and resuming a training run four ways, side by side, on CPU ranks over gloo.

    python benchmarks/checkpoint.py                  # 2 ranks, ZeRO 1, about 25 M parameters (300 MB of state)

- gather: every tensor is gathered over the ranks and rank 0 alone writes, while training waits
- pieces: each rank writes what it owns, while training waits (checkpoint.asynchronous false)
- copied: each rank copies what it owns while training waits, and a process beside it writes, while training goes on
- beside: copied, too, while training goes on, up to the next update (the default)

A real run of the demonstration molecules; the sides take turns at saving it, and in the first round, which is not
timed, what each has written must equal what can be gathered, bit by bit. `stall`: seconds that training waited, before
an update included; `lost`: those, and what steps took longer than the quiet ones of the same round until the checkpoint
was published; `written`: seconds until then; `slower`: time of these steps over that of the quiet ones. `read whole`
and `read parts`: resuming with every rank reading all of the checkpoint, or what it owns. Seconds are those of the
slowest rank. Writes a CSV with hardware, versions and commit to results/.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from exlm_dist.checkpoint import rank_files, reader, storage  # noqa: E402
from exlm_dist.checkpoint.pieces import Piece  # noqa: E402
from exlm_dist.checkpoint.tensors import Index, TensorReader, model_file, optimizer_file, tensor_name, write_header  # noqa: E402
from exlm_dist.config import RunConfig, dump_config  # noqa: E402
from exlm_dist.launch.local import free_port  # noqa: E402
from exlm_dist.tracking import EVENTS  # noqa: E402
from exlm_dist.training.engine import state as engine_state  # noqa: E402
from exlm_dist.utils.checkpoint_names import checkpoint_folder  # noqa: E402

SIDES = ("gather", "pieces", "copied", "beside")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--zero", type=int, default=1, choices=(1, 2, 3))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the run is kept meanwhile (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the CSV")
    return parser.parse_args()


def run_config(given: argparse.Namespace, folder: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "benchmark",
            "runs": str(folder),
            "data": {"path": str(folder / "data")},
            "model": {
                "layers": given.layers,
                "width": given.width,
                "heads": given.width // 64,
                "ffn": 4 * given.width,
                "max_positions": 256,
            },
            "batch": {"sequences": 4 * given.ranks, "micro": 4},
            "schedule": {"steps": 10_000, "warmup": 10},
            "parallel": {"zero": given.zero},
            "checkpoint": {"every": 10_000, "keep": 1, "best": False},
            "tracking": {"mlflow": False, "system": False, "every": 100},
            "launch": {"device": "cpu", "threads": 1, "timeout": 600},
        }
    )


def gather(engine: Any) -> dict[str, torch.Tensor]:
    """Full tensors, on rank 0 only."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    tensors: dict[str, torch.Tensor] = {}
    for moment in (None, *engine_state.MOMENTS):
        for sharded in engine.parameters:
            full = (
                safe_get_full_fp32_param(sharded.parameter)
                if moment is None
                else safe_get_full_optimizer_state(sharded.parameter, moment)
            )
            if engine.process.is_first:
                tensors[tensor_name(sharded.name, moment)] = full.detach().float().cpu().clone()
    return tensors


def gather_and_write(session: Any, start: Any) -> float:
    """The other way: all on rank 0. Returns the size of its copy in MB."""
    session.meter.judge()
    tensors = gather(session.engine)
    if session.process.is_first:
        _write_whole(session, start, tensors)
    session.process.any(False)  # the others wait
    return sum(value.numel() for value in tensors.values()) * 4 / 1e6


def _write_whole(session: Any, start: Any, tensors: dict[str, torch.Tensor]) -> None:
    shapes = {sharded.name: sharded.shape for sharded in session.engine.parameters}
    pieces = {sharded.name: [Piece(None, 0, sharded.numel, 0)] for sharded in session.engine.parameters}
    index = Index(shapes, pieces, engine_state.MOMENTS).as_text()
    target = checkpoint_folder(start.path, session.step)
    folder = storage.begin(target, sum(value.numel() * 4 for value in tensors.values()))
    state = session.checkpointer.state(session.step, session.evaluation)
    about = (state, dump_config(session.config), start.train_data.tokenizer_path)
    entries = rank_files.write_files(folder, [], b"", rank_files.SmallFiles.of_run(index, *about))
    for name, part in (
        (model_file(0), {key: value for key, value in tensors.items() if key in shapes}),
        (optimizer_file(0), {key: value for key, value in tensors.items() if key not in shapes}),
    ):
        entries[name] = rank_files.write_file(
            folder / name,
            [
                write_header({key: tuple(value.shape) for key, value in part.items()}),
                *(memoryview(value.view(-1).numpy()).cast("B") for value in part.values()),
            ],
        )
    storage.publish(folder, target, session.step, entries)
    storage.retain(start.path, 1, False)


class Bench:
    """One rank's part: a session and its two savers."""

    def __init__(self, config: RunConfig, process: Any) -> None:
        from exlm_dist.training.resources import Resources
        from exlm_dist.training.saver import Saver
        from exlm_dist.training.session import build_session
        from exlm_dist.training.starting_point import find_starting_point

        self.process, self.resources = process, Resources()
        self.start = find_starting_point(config, process, self.resources)
        self.session = build_session(config, process, self.start, self.resources)
        waiting = config.checkpoint.model_copy(update={"asynchronous": False})
        inline = Saver(
            self.start.path,
            self.session.engine,
            waiting,
            config=dump_config(config),
            tokenizer=self.start.train_data.tokenizer_path,
            log=self.start.path / EVENTS,
        )
        beside = self.session.checkpointer.saver
        self.savers = {"copied": beside, "beside": beside, "pieces": inline}

    def slowest(self, seconds: float) -> float:
        return float(self.process.all_gather([seconds]).max())

    def step(self) -> float:
        self.process.any(False)
        start = time.perf_counter()
        self.session.train_step()
        self.session.checkpointer.attend()
        return self.slowest(time.perf_counter() - start)

    def save(self, side: str, checked: bool) -> dict[str, float]:
        """Save after three steps, and go on until it is written."""
        quiet = [self.step() for _ in range(3)]
        wanted, saved_step = gather(self.session.engine) if checked else {}, self.session.step
        os.sync()
        self.process.any(False)
        start = time.perf_counter()
        if side == "gather":
            memory = gather_and_write(self.session, self.start)
        else:
            self.session.checkpointer.saver = self.savers[side]
            self.session.checkpointer.save(self.session.step, self.session.evaluation, needed=side == "pieces")
            if side == "copied":
                self.savers[side]._writer.settle()
            memory = self.savers[side]._copy.numel() * 4 / 1e6
        waited = time.perf_counter() - start
        stall, begun = self.slowest(waited), self.savers["beside"].stall
        busy = []
        while self.session.checkpointer.saving:
            busy.append(self.step())
        written = time.perf_counter() - start
        if side == "beside":
            stall = self.slowest(waited + self.savers["beside"].stall - begun)
        if checked:
            check(self, wanted, saved_step)
        row = {"stall": stall, "written": written, "copy_mb": self.slowest(memory)}
        row["lost"] = written - len(busy) * statistics.median(quiet)
        if busy:
            row["slower"] = statistics.median(busy) / statistics.median(quiet)
        return row

    def resume(self, parts: bool) -> float:
        """Seconds to fill the engine from the newest checkpoint (in the page cache)."""
        folder = reader.checkpoint_folders(self.start.path)[0]
        state = reader.read_state(folder)
        self.process.any(False)
        start = time.perf_counter()
        tensors: Any = TensorReader(folder)
        if not parts:
            tensors = Whole(tensors)
        engine_state.restore(self.session.engine, tensors, state)
        return self.slowest(time.perf_counter() - start)

    def close(self) -> None:
        self.savers["pieces"].close()
        self.session.engine.close()
        self.resources.status = "KILLED"
        self.resources.close()


class Whole:
    """Reads a whole checkpoint at once, as every rank would without knowing what it needs."""

    def __init__(self, tensors: TensorReader) -> None:
        moments = (None, *tensors.index.moments)
        self._tensors = {
            (name, moment): tensors.whole(name, moment).reshape(-1)
            for moment in moments
            for name in tensors.index.shapes
        }

    def read(self, name: str, moment: str | None, part: None, start: int, stop: int) -> Any:
        return self._tensors[name, moment][start:stop]


def rank_main(rank: int, given: argparse.Namespace, folder: Path, port: int, results: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(given.ranks),
        "LOCAL_WORLD_SIZE": str(given.ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    from exlm_dist.parallel import process as processes

    config = run_config(given, folder)
    bench = Bench(config, processes.start(config.launch))
    bench.step()
    rows: list[dict[str, Any]] = []
    for number in range(given.rounds + 1):
        for side in (*SIDES[number % 4 :], *SIDES[: number % 4]):
            row = {"side": side, **bench.save(side, checked=number == 0)}
            if number:  # the first round warms everything up
                rows.append(row)
        for side, parts in (("read whole", False), ("read parts", True)):
            seconds = bench.resume(parts)
            if number:
                rows.append({"side": side, "stall": seconds})
    numel = sum(sharded.numel for sharded in bench.session.engine.parameters)
    if rank == 0:
        results.put((rows, numel))
    bench.close()
    processes.finish()


def check(bench: Bench, wanted: dict[str, torch.Tensor], step: int) -> None:
    """The newest checkpoint is that of `step` and holds what was gathered before it."""
    if not bench.process.is_first:
        return
    folder = reader.newest_checkpoint(bench.start.path)
    assert reader.step_of(folder) == step, (folder, step)
    found = reader.load_weights(folder) | reader.load_optimizer(folder)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def table(rows: list[dict[str, Any]], numel: int, given: argparse.Namespace) -> list[dict[str, Any]]:
    result = []
    sides = (*SIDES, "read whole", "read parts")
    of = {side: [row for row in rows if row["side"] == side] for side in sides}
    medians = {
        side: {key: statistics.median(row[key] for row in own) for key in own[0] if key != "side"}
        for side, own in of.items()
    }
    for side in sides:
        stalls = sorted(row["stall"] for row in of[side])
        reading = side.startswith("read")
        line = {
            "side": side,
            "ranks": given.ranks,
            "zero": given.zero,
            "state_mb": round(numel * 12 / 1e6, 1),
            "stall_s": round(medians[side]["stall"], 4),
            "stall_min_s": round(stalls[0], 4),
            "stall_max_s": round(stalls[-1], 4),
            "over_first": round(medians[side]["stall"] / medians["read whole" if reading else "gather"]["stall"], 4),
            "over_pieces": "" if reading else round(medians[side]["stall"] / medians["pieces"]["stall"], 4),
            "written_s": "" if reading else round(medians[side]["written"], 3),
            "copy_mb": "" if reading else round(medians[side]["copy_mb"], 1),
            "steps_slower": round(medians[side]["slower"], 2) if "slower" in medians[side] else "",
            "rounds": given.rounds,
            "lost_s": "" if reading else round(medians[side]["lost"], 4),
        }
        result.append(line)
    return result


def commit() -> str:
    run = lambda *arguments: subprocess.run(  # noqa: E731
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()
    return run("rev-parse", "--short", "HEAD") + ("-dirty" if run("status", "--porcelain", "exlm_dist") else "")


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()} x{os.cpu_count()}"
    return platform.processor()


def main() -> None:
    from exlm_dist.prepare.demo.demo_molecules import prepare_demo_smiles

    given = options()
    folder = Path(tempfile.mkdtemp(prefix="exlm-checkpoint-", dir=given.folder))
    try:
        prepare_demo_smiles(out=folder / "data", count=2000)
        context = multiprocessing.get_context("spawn")
        results, port = context.Queue(), free_port()
        ranks = [
            context.Process(target=rank_main, args=(rank, given, folder, port, results)) for rank in range(given.ranks)
        ]
        for rank in ranks:
            rank.start()
        rows, numel = results.get(timeout=1800)
        for rank in ranks:
            rank.join(60)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    lines = table(rows, numel, given)
    about = {
        "date": date.today().isoformat(),
        "commit": commit(),
        "cpu": processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    out = given.out / f"checkpoint_{about['date']}.csv"
    new = not out.exists()
    with open(out, "a", newline="") as file:
        writer = csv.DictWriter(file, [*lines[0], *about])
        if new:
            writer.writeheader()
        writer.writerows({**line, **about} for line in lines)
    for line in lines:
        print("  ".join(f"{key} {value}" for key, value in line.items() if value != ""))


if __name__ == "__main__":
    main()
