"""What becomes of damaged shards and of a faulty network: each kind of damage at each moment, tried and compared.

    python benchmarks/damage.py            # two tables in Markdown, a minute on a CPU

A folder of `exlm prepare` and WebDataset tars of the same molecules, indexed by `exlm data index`, are damaged in nine
ways before the index is made, before the data is opened, and while they are read. After each all samples are read: a
sample must be what it was, or be replaced and named, or the reading must end with an error that names the file. A
sample that is silently another ends this program with exit code 1.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import shutil
import sys
import tarfile
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
from prepared_folder import random_sequences, write_folder  # noqa: E402
from range_server import FAULTS, serving  # noqa: E402

from exlm_dist.data import mirror, shard_files  # noqa: E402
from exlm_dist.data.opening import open_dataset  # noqa: E402
from exlm_dist.data.shards import ShardDataset  # noqa: E402
from exlm_dist.prepare.demo.demo_molecules import prepare_demo_smiles  # noqa: E402
from exlm_dist.prepare.index_shards import index_shards  # noqa: E402
from exlm_dist.tokenizers import load_tokenizer  # noqa: E402
from exlm_dist.utils.errors import DataError, UserError  # noqa: E402

MOLECULES, SHARDS = 600, 3
KINDS = (
    "byte flipped in a sample",
    "byte flipped in the first header",
    "byte flipped in a later header",
    "cut off in a header",
    "cut off in a sample",
    "cut off between two members",
    "block of zeros",
    "empty",
    "missing",
)


class SilentDamage(Exception):
    """A sample was another one, and nothing said so."""


def damage(path: Path, kind: str, sample: int, header: int) -> None:
    """Damage a shard in place. sample, header: first byte of one of each, somewhere in the middle."""
    sizes = {
        "cut off in a header": header + 100,
        "cut off in a sample": sample + 3,
        "cut off between two members": header,
        "empty": 0,
    }
    writes = {
        "byte flipped in a sample": (sample + 2, None),
        "byte flipped in the first header": (100, None),
        "byte flipped in a later header": (header + 100, None),
        "block of zeros": (header, bytes(2048)),
    }
    if kind == "missing":
        path.unlink()
    elif kind in sizes:
        os.truncate(path, sizes[kind])
    else:
        offset, content = writes[kind]
        with open(path, "r+b") as file:
            file.seek(offset)
            old = file.read(1)
            file.seek(offset)
            file.write(content or bytes([old[0] ^ 0x10]))


def places_in(path: Path) -> tuple[int, int]:
    """A byte of a sample in the middle of a tar, and the first byte of the header of its member."""
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    middle = next(n for n in range(len(members) // 2, len(members)) if not members[n].name.endswith(".lengths.npy"))
    is_array = members[middle].name.endswith(".npy")  # its content begins after its own header
    return members[middle].offset_data + (400 if is_array else 0), members[middle].offset


class Case:
    """One form of data: where it lies whole, how it is opened, and what its samples are."""

    def __init__(self, root: Path, name: str, shards: Path, data: str) -> None:
        """shards: the folder in `root` that has the tars; data: name of the folder that is opened."""
        self.root, self.name, self.shards, self.data = root, name, shards, data
        dataset = open_dataset(root / data, "train")
        self.whole = [dataset.read(np.array([sample]))[0] for sample in range(len(dataset))]
        dataset.close()

    def try_it(self, kind: str, moment: str) -> str:
        """What came of one kind of damage at one moment."""
        with tempfile.TemporaryDirectory(prefix="exlm-damage-") as name:
            copy = Path(shutil.copytree(self.root, Path(name) / "copy"))
            target = copy / self.shards / sorted(path.name for path in (self.root / self.shards).glob("*.tar"))[1]
            sample, header = places_in(target)
            if moment == "before the index":
                damage(target, kind, sample, header)
                refused = _shortened(lambda: _index(copy), copy)
                return f"refused: {refused}" if refused else "cannot be known: the index is made of what is there"
            self._point_to(copy)
            if moment == "before opening":
                damage(target, kind, sample, header)
            opened: list[ShardDataset] = []
            refused = _shortened(
                lambda: opened.append(open_dataset(copy / self.data, "train", max_bad_records=1.0)), copy
            )
            if refused:
                return f"refused: {refused}"
            dataset = opened[0]
            if moment == "while it is read":
                dataset.read(np.arange(0, len(dataset), 50))
                damage(target, kind, sample, header)
            try:
                return self._read(dataset, copy)
            finally:
                dataset.close()

    def _point_to(self, copy: Path) -> None:
        path = copy / self.data / mirror.SHARDS_AT
        if path.is_file():
            path.write_text(f"{copy / self.shards}\n")

    def _read(self, dataset: ShardDataset, copy: Path) -> str:
        """Read all samples, one by one, and compare."""
        found: list[np.ndarray] = []
        error = _shortened(
            lambda: found.extend(dataset.read(np.array([sample]))[0] for sample in range(len(dataset))), copy
        )
        bad = {record.sample for record in dataset.bad_records}
        wrong = [
            n for n, (was, now) in enumerate(zip(self.whole, found)) if n not in bad and not np.array_equal(was, now)
        ]
        if wrong:
            raise SilentDamage(f"{self.name}: samples {wrong[:5]} are others")
        if error:
            return f"the reading ends: {error}"
        return f"{len(bad)} of {len(found)} samples replaced and named" if bad else "touches no sample: all as before"


def _shortened(action: Callable[[], object], folder: Path) -> str:
    """The error of an action, from the name of the file on; empty if there is none."""
    try:
        action()
    except UserError as error:
        text = str(error).replace(f"{folder}/", "").replace("\n", " ").partition("cannot be indexed: ")
        return textwrap.shorten(text[2] or text[0], 75, placeholder=" ...")
    return ""


def _index(root: Path) -> None:
    shutil.rmtree(root / "index", ignore_errors=True)
    index_shards(
        [str(root / "tars" / f"part-{{0..{SHARDS - 1}}}.tar")], root / "index", tokenizer=root / "molecules", workers=1
    )


def make(root: Path) -> None:
    """A prepared folder of several shards, and tars of molecules, one a member, with an index."""
    write_folder(root / "prepared", random_sequences(MOLECULES), shard_bytes=1 << 14)
    prepare_demo_smiles(out=root / "molecules", count=MOLECULES, max_length=128, workers=1, overwrite=False)
    dataset, tokenizer = open_dataset(root / "molecules", "train"), load_tokenizer(root / "molecules" / "tokenizer")
    texts = [tokenizer.decode(dataset.read(np.array([n]))[0].tolist()) for n in range(len(dataset))]
    dataset.close()
    (root / "tars").mkdir()
    for shard in range(SHARDS):
        with tarfile.open(root / "tars" / f"part-{shard}.tar", "w") as tar:
            for number in range(shard, len(texts), SHARDS):
                info = tarfile.TarInfo(f"{number:06d}.txt")
                info.size = len(texts[number])
                tar.addfile(info, io.BytesIO(texts[number].encode()))
    _index(root)


def damage_table(root: Path) -> list[str]:
    """Kinds of damage against forms and moments."""
    indexed = Case(root, "tars", Path("tars"), "index")
    prepared = Case(root, "prepared", Path("prepared/train"), "prepared")
    columns = [
        (indexed, "before the index"), (indexed, "before opening"), (indexed, "while it is read"),
        (prepared, "before opening"), (prepared, "while it is read"),
    ]  # fmt: skip
    lines = [f"| | {' | '.join(f'{case.name}, {moment}' for case, moment in columns)} |", "|---" * 6 + "|"]
    for kind in KINDS:
        cells = []
        for case, moment in columns:
            cells.append(case.try_it(kind, moment))
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return lines


def network_table(root: Path) -> list[str]:
    """Kinds of faults of a server, a fault in every second answer, with small blocks, so that there are many."""
    shard_files.BLOCK = 4000
    lines = ["| fault | answers, of which faults | asked again | tokens | replaced |", "|---" * 5 + "|"]
    case = Case(root, "tars", Path("tars"), "index")
    for kinds in (*((kind,) for kind in FAULTS if kind != "slow"), tuple(FAULTS)):
        with tempfile.TemporaryDirectory() as cache, serving(root) as server:
            os.environ["EXLM_CACHE"] = cache
            (root / "index" / mirror.SHARDS_AT).write_text(f"{server.address}/tars\n")
            dataset = open_dataset(root / "index", "train", max_bad_records=0.0)
            server.faults, server.kinds = 0.5, kinds
            found = [dataset.read(np.array([n]))[0] for n in np.random.default_rng(0).permutation(len(dataset))]
            faults = sum(count for kind, count in server.given.items() if kind)
            order = np.random.default_rng(0).permutation(len(dataset))
            same = all(np.array_equal(case.whole[n], row) for n, row in zip(order, found))
            if not same:
                raise SilentDamage(f"{kinds}: other tokens")
            lines.append(
                f"| {', '.join(kinds)} | {server.given.total()}, {faults} | {dataset.retries} | the same | "
                f"{len(dataset.bad_records)} |"
            )
            dataset.close()
        (root / "index" / mirror.SHARDS_AT).write_text(f"{root / 'tars'}\n")
    return lines


def main() -> int:
    """Try all, and print the tables; 1 if a sample was silently another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="exlm-damage-") as name:
        root = Path(name)
        make(root)
        try:
            print("\n".join(damage_table(root)), "\n", sep="")
            print("\n".join(network_table(root)))
        except (SilentDamage, DataError) as error:
            print(f"WRONG: {error}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
