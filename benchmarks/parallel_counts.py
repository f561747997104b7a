"""What a step and a resume cost in each layout, counted in real runs of the trainer: `benchmarks/parallel.py --counts`.

A toy model is trained for two steps on gloo ranks of this machine, saved, and resumed to `STEPS`. Counted on each rank,
in one step that is not logged unless said otherwise:

- collectives and the bytes of their tensors (`exlm_dist.parallel.traffic`), without the ranks' agreement on the CPU;
- that agreement: calls of `Process.all_gather` from one step to the next;
- reads of a value from the device (`.item()`, `.tolist()`, `bool()`, `.cpu()` and the like) and calls to synchronise
  it: on a GPU each waits. The CPU's own forms of the kernels and the collectives on the CPU, which a GPU has not, do
  not count; the rest is an upper bound, as a tensor that is on the host anyway counts too. The CSV has the places;
- files that the process opened, those of /proc aside, mean over the steps from `WARM` to `COUNTED`, with more shards
  than stay open;
- bytes of the checkpoint that were read on resuming: to fill the rank, and to verify it.

Counts are exact and the same on any machine; nothing is timed.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from exlm_dist.config.schema import RunConfig

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"tensor": 2, "data": 1},
    "PP2": {"pipeline": 2, "data": 1},
    "TP2 x PP2": {"tensor": 2, "pipeline": 2, "data": 1},
    "ZeRO 1": {"data": 2, "zero": 1},
    "ZeRO 2": {"data": 2, "zero": 2},
    "ZeRO 3": {"data": 2, "zero": 3},
}
#: Steps of a run; the counted one, which is not logged; from which one files are counted; shards.
STEPS, COUNTED, WARM, SHARDS = 26, 24, 8, 200
#: Methods of a tensor that wait for the device and bring a value to the host.
READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__")
#: Parts of the package that work on the CPU on purpose.
ON_HOST = ("exlm_dist/kernels/", "exlm_dist/parallel/process.py", "exlm_dist/data/")


def config_of(folder: Path, parallel: dict[str, Any], steps: int) -> RunConfig:
    replicas = parallel.get("data", 1)
    return RunConfig.model_validate(
        {
            "name": "counted",
            "runs": str(folder / "runs"),
            "data": {"path": str(folder / "data"), "prefetch": 0},
            "model": {"layers": 4, "width": 64, "heads": 4, "ffn": 256, "max_positions": 256},
            "batch": {"sequences": 4 * replicas, "micro": 2},
            "optimizer": {"clip": 1.0},
            "schedule": {"steps": steps, "kind": "constant"},
            "parallel": parallel,
            "checkpoint": {"every": 1000, "asynchronous": False},
            "evaluation": {"every": 0, "sequences": 4},
            "tracking": {"mlflow": False, "system": False, "every": 1000},
            "launch": {"device": "cpu", "threads": 1, "timeout": 120, "recheck": 0, "restarts": 0},
        }
    )


def make_shards(folder: Path) -> None:
    """A prepared folder of `SHARDS` shards of random tokens."""
    from exlm_dist.data.manifest import MANIFEST, SCHEMA, sealed
    from exlm_dist.prepare.shard_writer import ShardWriter
    from exlm_dist.tokenizers.smiles_tokenizer import SmilesTokenizer
    from exlm_dist.tokenizers.tokenizer import NUM_SPECIAL

    tokenizer = SmilesTokenizer.from_counts(Counter(f"[{number}C]" for number in range(1, 40)), {})
    tokenizer.save(folder / "tokenizer")
    random, splits = np.random.default_rng(0), {}
    for split, count in (("train", 4 * SHARDS), ("valid", 8)):
        writer = ShardWriter(folder, split, vocab_size=tokenizer.vocab_size, shard_bytes=1, per_member=4)
        for _ in range(count // 4):
            lengths = random.integers(24, 63, 4)
            writer.write(random.integers(NUM_SPECIAL, tokenizer.vocab_size, lengths.sum()), lengths)
        splits[split] = {"sequences": count, "shards": [entry.as_dict() for entry in writer.close()]}
    manifest = {
        "schema": SCHEMA, "domain": "smiles", "vocab_size": tokenizer.vocab_size, "max_length": 64, "splits": splits,
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "files": {}},
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(sealed(manifest)))


class Counts:
    """Patches what is counted; `with counts:` around what reads of the device are counted in."""

    def __init__(self) -> None:
        self.opened, self.exchanges = 0, 0
        self.filled, self.verified = 0, 0
        self.reads: Counter[str] = Counter()
        self._reading = False
        sys.addaudithook(self._audit)
        self._patch()

    def __enter__(self) -> Counts:
        self._reading = True
        return self

    def __exit__(self, *error: object) -> None:
        self._reading = False

    def _audit(self, event: str, arguments: tuple) -> None:
        self.opened += event == "open" and isinstance(arguments[0], str) and not arguments[0].startswith("/proc/")

    def _patch(self) -> None:
        import torch
        from deepspeed.accelerator import get_accelerator

        from exlm_dist.checkpoint import reader
        from exlm_dist.checkpoint.tensors import TensorReader
        from exlm_dist.parallel.process import Process

        for name in READS:
            setattr(torch.Tensor, name, self._noted(getattr(torch.Tensor, name), name))
        get_accelerator().synchronize = self._noted(get_accelerator().synchronize, "synchronize")
        fill, hashed, gather, ask = TensorReader.read, reader.sha256_file, Process.all_gather, Process.any

        def read(tensors: TensorReader, *arguments: Any) -> np.ndarray:
            found = fill(tensors, *arguments)
            self.filled += found.nbytes
            return found

        def sha256(path: Path) -> str:
            self.verified += path.stat().st_size
            return hashed(path)

        def all_gather(process: Process, values: list[float]) -> Any:
            self.exchanges += 1
            return gather(process, values)

        def any_rank(process: Process, flag: bool) -> bool:
            self.exchanges += 1
            return ask(process, flag)

        TensorReader.read, reader.sha256_file = read, sha256  # type: ignore
        Process.all_gather, Process.any = all_gather, any_rank  # type: ignore

    def _noted(self, plain: Callable[..., Any], name: str) -> Callable[..., Any]:
        def noted(*arguments: Any, **keywords: Any) -> Any:
            if self._reading and (place := _place()):
                self.reads[f"{place} {name}"] += 1
            return plain(*arguments, **keywords)

        return noted


def _place() -> str | None:
    """file:line outside torch that the call is from; None where it is one of `ON_HOST`."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if "/torch/" not in path and not path.endswith("parallel_counts.py"):
            name = path.split("site-packages/")[-1].removeprefix(f"{ROOT}/")
            return None if name.startswith(ON_HOST) else f"{name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return None


def trained(config: RunConfig) -> dict[str, Any]:
    """`train(config)` on this rank, counted."""
    from parallel import partitioning_all

    from exlm_dist.parallel.traffic import Traffic
    from exlm_dist.training.engine import base as engines
    from exlm_dist.training.loop import train
    from exlm_dist.training.session import Session

    engines.deepspeed_config = partitioning_all(engines.deepspeed_config)
    counts, plain, found = Counts(), Session.train_step, {}

    def train_step(session: Session) -> None:
        if session.step == WARM:
            found["opened"] = counts.opened
        if session.step == COUNTED - 1:
            found["exchanges"] = counts.exchanges
        if session.step != COUNTED:
            return plain(session)
        found["opened"] = (counts.opened - found["opened"]) / (COUNTED - WARM)
        found["exchanges"] = counts.exchanges - found["exchanges"]
        with Traffic() as traffic, counts:
            plain(session)
        found["calls"], found["bytes"] = dict(traffic.calls), dict(traffic.bytes)

    Session.train_step = train_step  # type: ignore[method-assign]
    code = train(config)
    assert code == 0, f"the run ended with {code}"
    return {**found, "reads": dict(counts.reads), "filled": counts.filled, "verified": counts.verified}


def counted(name: str) -> list[dict[str, Any]]:
    """A row for each rank of a layout."""
    from parallel import on_ranks

    folder = Path(tempfile.mkdtemp(prefix="exlm-counts-"))
    try:
        make_shards(folder / "data")
        on_ranks(trained, config_of(folder, LAYOUTS[name], 2))
        (saved,) = (folder / "runs" / "counted" / "checkpoints").glob("step-*")
        size = sum(path.stat().st_size for path in saved.glob("*.safetensors"))
        found = on_ranks(trained, config_of(folder, LAYOUTS[name], STEPS))
    finally:
        shutil.rmtree(folder)
    return [
        {
            "layout": name, "rank": rank,
            "collectives": sum(this["calls"].values()), "bytes": sum(this["bytes"].values()),
            "by_kind": json.dumps({kind: [this["calls"][kind], this["bytes"][kind]] for kind in sorted(this["calls"])}),
            "exchanges": this["exchanges"], "synchronisations": sum(this["reads"].values()),
            "places": json.dumps(dict(sorted(this["reads"].items()))), "files_opened": round(this["opened"], 2),
            "resume_filled": this["filled"], "resume_verified": this["verified"], "checkpoint": size,
        }
        for rank, this in enumerate(found)
    ]  # fmt: skip


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: the most of any rank, for each layout; of the bytes read also the sum over the ranks."""
    lines = [
        "| | collectives | bytes | agreements | synchronisations | files opened | read to resume, of the checkpoint "
        "| hashed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in LAYOUTS:
        mine = [row for row in rows if row["layout"] == name]
        most = {key: max(row[key] for row in mine) for key in mine[0] if key not in ("layout", "by_kind", "places")}
        parts = [
            most["resume_filled"],
            *(sum(row[key] for row in mine) for key in ("resume_filled", "resume_verified")),
        ]
        one, all_, hashed = (f"{part / most['checkpoint']:.2f}" for part in parts)
        lines.append(
            f"| {name} | {most['collectives']} | {most['bytes']:,} | {most['exchanges']} | {most['synchronisations']} "
            f"| {most['files_opened']:.1f} | {one} a rank, {all_} in all | {hashed} in all |"
        )
    return lines


def count_all(out: Path, about: dict[str, str], write: Callable[[Path, list[dict[str, Any]]], None]) -> None:
    """Count every layout, print the table and write the CSV."""
    rows = [{**row, **about} for name in LAYOUTS for row in counted(name)]
    write(out, rows)
    print("\n".join(table(rows)))
