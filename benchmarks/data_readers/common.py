"""What the readers of all libraries do alike: the tasks that `benchmarks/data_libraries.py` asks of them.

A reader is a program of its own, run by the Python of the library's environment: `python read_litdata.py TASK JSON`.
Its last line of output is the answer, in JSON. Heavy imports are made before anything is timed.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
import time
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402

BATCH = 256


class Stream(Protocol):
    """One epoch of a data set, of one rank, in the library's order of training."""

    def __iter__(self) -> Iterator[Sequence[np.ndarray]]:
        """Batches of sequences."""
        ...

    #: Whether a position can be told without reading up to it.
    computes_positions: bool

    def save(self, path: Path, batches: int) -> None:
        """The position after as many batches of this rank, which have just been read unless it is computed."""
        ...

    def restore(self, path: Path, rank: int) -> None:
        """Go on where ranks have saved theirs: each in `path`, with the number of the rank as its suffix."""
        ...


class Reader(Protocol):
    """One library."""

    versions: dict[str, str]

    def write(self, sequences: list[np.ndarray], folder: Path) -> None:
        """Store uint16 sequences in the library's own form."""
        ...

    def index(self, how: dict[str, Any]) -> int:
        """Make an index of `tars` in `folder`; the number of its rows. Ours needs `valid`, a tar, and `tokenizer`."""
        ...

    def open(self, folder: Path, how: dict[str, Any]) -> Stream:
        """how: form ('own' or 'tars'), variant, batch, rank, world; of tars `tokenizer`, a folder."""
        ...


class Ragged(Sequence[np.ndarray]):
    """Sequences one after another, cut only where somebody looks at one: `tokens` [sum of lengths], `lengths` [m]."""

    def __init__(self, tokens: np.ndarray, lengths: np.ndarray):
        self.tokens, self._lengths = tokens, lengths

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(np.split(self.tokens, np.cumsum(self._lengths)[:-1]))

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]


class NotOffered(Exception):
    """The library has no such thing."""


def sequences_of(source: Path) -> list[np.ndarray]:
    """The sequences that all libraries store, uint16 each; `source`: an .npz with `tokens` and `lengths`."""
    with np.load(source) as stored:
        return np.split(stored["tokens"], np.cumsum(stored["lengths"])[:-1])


def tokenized(texts: Iterator[list[str]], folder: str) -> Iterator[list[np.ndarray]]:
    """Batches of texts as batches of ids, by the tokenizer saved in `folder`; the same on all sides."""
    from exlm_dist.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(Path(folder))
    for batch in texts:
        tokens, lengths = tokenizer.encode_batch(batch)
        yield np.split(tokens, np.cumsum(lengths)[:-1])


def batched(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items; the last may be shorter."""
    while batch := list(islice(items, size)):
        yield batch


def write_tars(folder: Path, contents: Sequence[bytes], ending: str, shards: int) -> None:
    """A WebDataset: one member for each content, in tars of nearly equal size; what webdataset's own writer makes."""
    folder.mkdir(parents=True, exist_ok=True)
    edges = np.linspace(0, len(contents), shards + 1).astype(int).tolist()
    for shard, (first, last) in enumerate(zip(edges, edges[1:])):
        with tarfile.open(folder / f"{shard:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(first, last):
                member = tarfile.TarInfo(f"{number:09d}.{ending}")
                member.size = len(contents[number])
                tar.addfile(member, io.BytesIO(contents[number]))


def run(reader: Reader) -> None:
    """The task of the command line; prints its answer."""
    task, how = sys.argv[1], json.loads(sys.argv[2])
    answer = {
        "write": _write,
        "index": _index,
        "pass": _pass,
        "names": _names,
        "advance": _advance,
        "resume": _resume,
    }[task](reader, how)
    print(json.dumps({**answer, "versions": reader.versions}), flush=True)
    os._exit(0)  # whatever threads the library has left behind


def _write(reader: Reader, how: dict[str, Any]) -> dict[str, Any]:
    sequences = sequences_of(Path(how["source"]))
    start = time.perf_counter()
    reader.write(sequences, Path(how["folder"]))
    return {"seconds": time.perf_counter() - start}


def _index(reader: Reader, how: dict[str, Any]) -> dict[str, Any]:
    start, used = time.perf_counter(), _processor()
    rows = reader.index(how)
    return {"rows": rows, "seconds": time.perf_counter() - start, "processor": _processor() - used}


def _pass(reader: Reader, how: dict[str, Any]) -> dict[str, Any]:
    """One epoch: opening and reading are timed apart."""
    begun = time.perf_counter()
    stream = reader.open(Path(how["folder"]), {"rank": 0, "world": 1, "batch": BATCH, **how})
    start, used = time.perf_counter(), _processor()
    samples = tokens = 0
    for batch in stream:
        samples += len(batch)
        tokens += len(batch.tokens) if isinstance(batch, Ragged) else sum(map(len, batch))
    ended = time.perf_counter()
    return {
        "open": start - begun,
        "seconds": ended - start,
        "processor": _processor() - used,
        "samples": samples,
        "tokens": tokens,
    }


def _names(reader: Reader, how: dict[str, Any]) -> dict[str, Any]:
    """Which sequences come, batch by batch, each by its crc32: from the saved position on if `restore`, `batches` of
    them; their end is saved if `save`."""
    stream = reader.open(Path(how["folder"]), how)
    if how.get("restore"):
        stream.restore(Path(how["state"]), how["rank"])
    names: list[list[int]] = []
    try:
        for batch in islice(iter(stream), how.get("batches")):
            names.append([zlib.crc32(np.asarray(ids).astype(np.uint16).tobytes()) for ids in batch])
    except Exception as error:  # what becomes of damage is the question
        return {"names": names, "error": f"{type(error).__name__}: {error}"[:300]}
    if how.get("save"):
        stream.save(Path(f"{how['state']}.{how['rank']}"), len(names))
    return {"names": names, "error": ""}


def _advance(reader: Reader, how: dict[str, Any]) -> dict[str, Any]:
    """Save the position after `batches`."""
    stream = reader.open(Path(how["folder"]), how)
    if not stream.computes_positions:
        for _ in islice(iter(stream), how["batches"]):
            pass
    stream.save(Path(f"{how['state']}.{how['rank']}"), how["batches"])
    return {}


def _resume(reader: Reader, how: dict[str, Any]) -> dict[str, Any]:
    """Seconds from nothing open to the first batch after `batches`."""
    how = {"rank": 0, "world": 1, "batch": BATCH, **how}
    start = time.perf_counter()
    stream = reader.open(Path(how["folder"]), how)
    stream.restore(Path(how["state"]), how["rank"])
    first = next(iter(stream))
    return {"seconds": time.perf_counter() - start, "samples": len(first)}


def _processor() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
