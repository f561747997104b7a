"""megatron-energon: tars that `energon prepare` has indexed, crude samples, a cooker, a buffer of 1,000 shuffled."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import run, write_tars
from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    Sample,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_savable_loader,
    get_train_dataset,
    stateless,
)

from exlm_dist.tokenizers import load_tokenizer

SHARDS, BUFFER, PER_SEQUENCE = 16, 1_000, 100


@edataclass
class _Ids(Sample):
    ids: np.ndarray


@edataclass
class _Text(Sample):
    text: str


@stateless
def _cook_ids(sample: dict[str, Any]) -> _Ids:
    return _Ids(**basic_sample_keys(sample), ids=np.frombuffer(sample["ids"], np.uint16))


@stateless
def _cook_text(sample: dict[str, Any]) -> _Text:
    return _Text(**basic_sample_keys(sample), text=sample["txt"].decode())


class _OfIds(DefaultTaskEncoder):
    decoder = None
    cookers = [Cooker(_cook_ids)]

    @stateless
    def batch(self, samples: list[_Ids]) -> list[np.ndarray]:
        return [sample.ids for sample in samples]


class _OfTexts(DefaultTaskEncoder):
    decoder = None
    cookers = [Cooker(_cook_text)]

    def __init__(self, tokenizer: str):
        super().__init__()
        self._tokenizer = load_tokenizer(Path(tokenizer))

    @stateless
    def batch(self, samples: list[_Text]) -> list[np.ndarray]:
        tokens, lengths = self._tokenizer.encode_batch([sample.text for sample in samples])
        return np.split(tokens, np.cumsum(lengths)[:-1])


class _Stream:
    computes_positions = False

    def __init__(self, folder: Path, how: dict[str, Any]):
        dataset = get_train_dataset(
            folder,
            worker_config=WorkerConfig(rank=how["rank"], world_size=how["world"], num_workers=0),
            batch_size=how["batch"],
            shuffle_buffer_size=BUFFER,
            max_samples_per_sequence=PER_SEQUENCE,
            repeat=False,
            task_encoder=_OfIds() if how["form"] == "own" else _OfTexts(how["tokenizer"]),
        )
        self._loader = get_savable_loader(dataset, watchdog_timeout_seconds=None)

    def __iter__(self) -> Iterator[Sequence[np.ndarray]]:
        return iter(self._loader)

    def save(self, path: Path, batches: int) -> None:
        torch.save(self._loader.save_state_rank(), path)

    def restore(self, path: Path, rank: int) -> None:
        """As its guide says: the list of the states of all ranks that have saved one."""
        states = sorted(path.parent.glob(f"{path.name}.*"), key=lambda one: int(one.suffix[1:]))
        self._loader.restore_state_global([torch.load(one, weights_only=False) for one in states])


class _Energon:
    versions = {"megatron-energon": version("megatron-energon"), "torch": torch.__version__}

    def write(self, sequences: list[np.ndarray], folder: Path) -> None:
        write_tars(folder, [ids.tobytes() for ids in sequences], "ids", SHARDS)
        self.index({"folder": folder})

    def index(self, how: dict[str, Any]) -> int:
        """All tars of the folder, by one worker."""
        command = [str(Path(sys.executable).with_name("energon")), "prepare", str(how["folder"]), "--non-interactive"]
        command += ["--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset", "--num-workers", "1", "--no-progress"]
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode:
            raise RuntimeError(answer.stdout + answer.stderr)
        with closing(sqlite3.connect(Path(how["folder"]) / ".nv-meta" / "index.sqlite")) as rows:
            return int(rows.execute("SELECT COUNT(*) FROM samples").fetchone()[0])

    def open(self, folder: Path, how: dict[str, Any]) -> _Stream:
        return _Stream(folder, how)


if __name__ == "__main__":
    run(_Energon())
