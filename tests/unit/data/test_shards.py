"""Shards: byte-reproducible, read equal by webdataset, damage found and named, replacement fixed."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from exlm_dist.data.manifest import MANIFEST, SCHEMA, sealed, verify_folder
from exlm_dist.data.shards import ShardDataset, ShardWriter
from exlm_dist.utils.errors import DataError


def sequences(count: int, vocab_size: int = 300, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(5, vocab_size, size=generator.integers(1, 60)) for _ in range(count)]


def write_folder(
    root: Path, rows: list[np.ndarray], *, vocab_size: int = 300, shard_bytes: int = 1 << 15, chunk: int = 77
) -> Path:
    """A prepared folder with the same rows in both splits."""
    splits = {}
    for split in ("train", "valid"):
        writer = ShardWriter(root, split, vocab_size=vocab_size, shard_bytes=shard_bytes, per_member=64)
        for first in range(0, len(rows), chunk):
            part = rows[first : first + chunk]
            writer.write(np.concatenate(part), np.array([len(row) for row in part]))
        entries = writer.close()
        splits[split] = {"sequences": len(rows), "shards": [entry.as_dict() for entry in entries]}
    manifest = {
        "schema": SCHEMA,
        "domain": "smiles",
        "vocab_size": vocab_size,
        "max_length": 64,
        "splits": splits,
        "tokenizer": {"fingerprint": "none", "files": {}},
    }
    (root / MANIFEST).write_text(json.dumps(sealed(manifest)))
    return root


@pytest.fixture
def rows() -> list[np.ndarray]:
    return sequences(1500)


@pytest.fixture
def folder(tmp_path: Path, rows: list[np.ndarray]) -> Path:
    return write_folder(tmp_path / "data", rows)


def split_rows(tokens: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    return [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]


def record_place(dataset: ShardDataset, sample: int) -> tuple[Path, int]:
    """File and byte offset of the payload of a sample, from the index files."""
    for shard in dataset.manifest["splits"][dataset.split]["shards"]:
        index = np.load(dataset.path / shard["index"])
        if sample < len(index):
            return dataset.path / shard["name"], int(index["offset"][sample])
        sample -= len(index)
    raise AssertionError("no such sample")


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


@pytest.mark.parametrize("vocab_size", [300, 100_000])
def test_reads_back_what_was_written_in_any_order(tmp_path: Path, vocab_size: int) -> None:
    rows = sequences(900, vocab_size)
    dataset = ShardDataset.open(write_folder(tmp_path / "d", rows, vocab_size=vocab_size), "train")
    assert len(dataset) == 900 and dataset.lengths.dtype == np.int32
    assert dataset.lengths.tolist() == [len(row) for row in rows]
    assert len(dataset.manifest["splits"]["train"]["shards"]) > 1
    ids = np.random.default_rng(1).integers(0, 900, size=400)
    tokens, lengths = dataset.read(ids)
    assert tokens.dtype == np.int32 and lengths.dtype == np.int64
    assert split_rows(tokens, lengths) == [rows[i].tolist() for i in ids]
    assert dataset.bad_records == []
    tokens, lengths = dataset.read(np.array([], dtype=np.int64))
    assert len(tokens) == 0 and len(lengths) == 0
    with pytest.raises(IndexError, match="outside"):
        dataset.read(np.array([900]))


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
        "    tokens, place = sample['tokens.npy'].tolist(), 0\n"
        "    for length in sample['lengths.npy'].tolist():\n"
        "        rows.append(tokens[place:place + length]); place += length\n"
        "json.dump(rows, sys.stdout)\n"
    )
    environment = {**os.environ, "WDS_SECURE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder)], env=environment, capture_output=True, timeout=120, check=True
    )
    assert json.loads(result.stdout) == [row.tolist() for row in rows]


def test_flipped_byte_is_found_named_and_replaced_alike(folder: Path, rows: list[np.ndarray]) -> None:
    dataset = ShardDataset.open(folder, "train", max_bad_records=0.01)
    path, offset = record_place(dataset, 700)
    content = path.read_bytes()
    overwrite(path, offset, bytes([content[offset] ^ 4]))
    tokens, lengths = dataset.read(np.array([3, 700, 700, 9]))
    same = [i for i in range(len(rows)) if len(rows[i]) == len(rows[700]) and i != 700]
    stand_in = next((i for i in same if i > 700), same[0])
    expected = [rows[3].tolist(), rows[stand_in].tolist(), rows[stand_in].tolist(), rows[9].tolist()]
    assert split_rows(tokens, lengths) == expected
    (event,) = dataset.bad_records
    assert (event.sample, event.file, event.offset, event.replacement) == (700, str(path), offset, stand_in)
    assert event.got != event.expected
    other = ShardDataset.open(folder, "train", max_bad_records=0.01)
    assert np.array_equal(other.read(np.array([700]))[0], rows[stand_in])
    assert any(str(path) in problem for problem in verify_folder(folder))


def test_zeroed_block_never_gives_wrong_bytes(folder: Path, rows: list[np.ndarray]) -> None:
    dataset = ShardDataset.open(folder, "train", max_bad_records=1.0)
    path, offset = record_place(dataset, 500)
    overwrite(path, offset // 512 * 512, b"\0" * 2048)
    tokens, lengths = dataset.read(np.arange(len(rows)))
    bad = {event.sample: event.replacement for event in dataset.bad_records}
    assert 500 in bad and len(bad) > 5
    whole = {row.tobytes(): None for row in rows}
    for sample, row in enumerate(split_rows(tokens, lengths)):
        if sample not in bad:
            assert row == rows[sample].tolist()
        else:
            assert bad[sample] not in bad and row == rows[bad[sample]][: len(row)].tolist()
    assert len(whole) > 1400


def test_above_the_budget_the_run_stops(folder: Path) -> None:
    dataset = ShardDataset.open(folder, "train", max_bad_records=1e-4)
    path, offset = record_place(dataset, 10)
    overwrite(path, offset, b"\xff\xff")
    with pytest.raises(
        DataError, match=r"shard-000000.tar: record 10 at byte \d+ is damaged.*max_bad_records = 0.0001"
    ):
        dataset.read(np.array([10]))


def test_unique_length_is_cut_from_a_longer_record(tmp_path: Path) -> None:
    rows = [np.full(n, 5 + n) for n in (4, 9, 4, 6)]
    dataset = ShardDataset.open(write_folder(tmp_path / "d", rows), "train", max_bad_records=1.0)
    path, offset = record_place(dataset, 3)
    overwrite(path, offset, b"\0\0")
    tokens, lengths = dataset.read(np.array([3]))
    assert lengths.tolist() == [6] and tokens.tolist() == [14] * 6
    path, offset = record_place(dataset, 1)
    overwrite(path, offset, b"\0\0")
    with pytest.raises(DataError, match="no whole record can stand in"):
        dataset.read(np.array([1]))


def test_truncated_missing_and_altered_files_are_refused_at_open(folder: Path) -> None:
    shard = folder / "train/shard-000001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:-700])
    with pytest.raises(DataError, match=rf"shard-000001.tar: {len(content) - 700} bytes, {len(content)} expected"):
        ShardDataset.open(folder, "train")
    shard.unlink()
    with pytest.raises(DataError, match="shard-000001.tar: listed in manifest.json but No such file"):
        ShardDataset.open(folder, "train")
    assert any("missing" in problem for problem in verify_folder(folder))
    shard.write_bytes(content)
    overwrite(folder / "train/shard-000000.idx.npy", 200, b"\x01\x02")
    with pytest.raises(DataError, match="shard-000000.idx.npy: sha256"):
        ShardDataset.open(folder, "train")


def test_shard_cut_after_opening_is_found(folder: Path) -> None:
    dataset = ShardDataset.open(folder, "train", max_bad_records=1.0)
    path, offset = record_place(dataset, 0)
    os.truncate(path, offset + 1)
    dataset.read(np.array([0]))
    assert dataset.bad_records[0].got == -1


def test_folder_that_is_not_prepared(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataError, match="no such folder.*exlm prepare"):
        ShardDataset.open(tmp_path / "nothing", "train")
    with pytest.raises(DataError, match="has no manifest.json"):
        ShardDataset.open(tmp_path, "train")
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "vocab_size": 999}))
    with pytest.raises(DataError, match="does not match its fingerprint"):
        ShardDataset.open(folder, "train")
    (folder / MANIFEST).write_text(json.dumps({**manifest, "schema": 99}))
    with pytest.raises(DataError, match="schema version 99"):
        ShardDataset.open(folder, "train")
    (folder / MANIFEST).write_text("{")
    with pytest.raises(DataError, match="not readable as JSON"):
        ShardDataset.open(folder, "train")


def test_writer_refuses_special_ids_and_wrong_lengths(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train", vocab_size=50)
    for tokens, lengths in (([7, 4], [2]), ([7, 50], [2]), ([7, 7], [1]), ([7, 7], [2, 0])):
        with pytest.raises(ValueError):
            writer.write(np.array(tokens), np.array(lengths))
    writer.write(np.array([7, 3, 8]), np.array([3]))
    assert [entry.sequences for entry in writer.close()] == [1]
