"""Writing shards: reproducible to the byte, plain tars that webdataset reads, unusable input refused."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from prepared_folder import random_sequences, verify_folder, write_folder

from exlm_dist.data.manifest import MANIFEST
from exlm_dist.prepare.shard_writer import ShardWriter


@pytest.fixture
def rows() -> list[np.ndarray]:
    return random_sequences(1500)


@pytest.fixture
def folder(tmp_path: Path, rows: list[np.ndarray]) -> Path:
    return write_folder(tmp_path / "data", rows)


def test_bytes_do_not_depend_on_how_the_rows_arrive(tmp_path: Path, rows: list[np.ndarray]) -> None:
    first = write_folder(tmp_path / "a", rows, chunk=77)
    second = write_folder(tmp_path / "b", rows, chunk=1)
    assert (first / MANIFEST).read_bytes() == (second / MANIFEST).read_bytes()
    for path in sorted(first.rglob("*.tar")):
        assert path.read_bytes() == (second / path.relative_to(first)).read_bytes()
    assert verify_folder(first) == []


def test_tar_is_plain_ustar(folder: Path) -> None:
    with tarfile.open(folder / "train/shard-000000.tar") as tar:
        members = tar.getmembers()
        lengths = np.load(io.BytesIO(tar.extractfile("000000.lengths.npy").read()))
    assert [m.name for m in members[:3]] == ["000000.tokens.npy", "000000.lengths.npy", "000001.tokens.npy"]
    assert len(lengths) == 64 and {(m.mtime, m.uid, m.gid) for m in members} == {(0, 0, 0)}


def test_webdataset_reads_the_same(folder: Path, rows: list[np.ndarray]) -> None:
    """In a process of its own, with WDS_SECURE=1 set before webdataset is imported."""
    code = (
        "import sys, json, glob, webdataset as wds\n"
        "urls = sorted(glob.glob(sys.argv[1] + '/train/*.tar'))\n"
        "rows = []\n"
        "for sample in wds.WebDataset(urls, shardshuffle=False).decode():\n"
        "    tokens, start = sample['tokens.npy'].tolist(), 0\n"
        "    for length in sample['lengths.npy'].tolist():\n"
        "        rows.append(tokens[start:start + length]); start += length\n"
        "json.dump(rows, sys.stdout)\n"
    )
    environment = {**os.environ, "WDS_SECURE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder)], env=environment, capture_output=True, timeout=120, check=True
    )
    assert json.loads(result.stdout) == [row.tolist() for row in rows]


def test_writer_refuses_special_ids_and_wrong_lengths(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train", vocab_size=50)
    for tokens, lengths in (([7, 4], [2]), ([7, 50], [2]), ([7, 7], [1]), ([7, 7], [2, 0])):
        with pytest.raises(ValueError):
            writer.write(np.array(tokens), np.array(lengths))
    writer.write(np.array([7, 3, 8]), np.array([3]))
    assert [entry.sequences for entry in writer.close()] == [1]
