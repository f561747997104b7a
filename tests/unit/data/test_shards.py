"""Reading shards: any order, damage found and named, and always the same replacement."""

import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from prepared_folder import overwrite, random_sequences, record_offset, verify_folder, write_folder

from exlm_dist.data import shard_files
from exlm_dist.data.manifest import MANIFEST
from exlm_dist.data.order import Order
from exlm_dist.data.shards import ShardDataset
from exlm_dist.utils.errors import DataError


@pytest.fixture
def rows() -> list[np.ndarray]:
    return random_sequences(1500)


@pytest.fixture
def folder(tmp_path: Path, rows: list[np.ndarray]) -> Path:
    return write_folder(tmp_path / "data", rows)


def split_rows(tokens: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    return [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]


@pytest.fixture(params=[{}, {"block": 50, "kept_blocks": 4}], ids=["by sample", "in blocks"])
def reading(request: pytest.FixtureRequest) -> dict[str, int]:
    return request.param


@pytest.mark.parametrize("vocab_size", [300, 100_000])
def test_reads_back_what_was_written_in_any_order(tmp_path: Path, vocab_size: int, reading: dict[str, int]) -> None:
    rows = random_sequences(900, vocab_size)
    dataset = ShardDataset.open(write_folder(tmp_path / "d", rows, vocab_size=vocab_size), "train", **reading)
    assert len(dataset) == 900 and dataset.lengths[:].dtype == np.int32
    assert dataset.lengths[:].tolist() == [len(row) for row in rows]
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


def test_flipped_byte_is_found_named_and_replaced_alike(
    folder: Path, rows: list[np.ndarray], reading: dict[str, int]
) -> None:
    dataset = ShardDataset.open(folder, "train", max_bad_records=0.01, **reading)
    path, offset = record_offset(dataset, 700)
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
    other = ShardDataset.open(folder, "train", max_bad_records=0.01, **reading)
    assert np.array_equal(other.read(np.array([700]))[0], rows[stand_in])
    assert any(str(path) in problem for problem in verify_folder(folder))


def test_zeroed_block_never_gives_wrong_bytes(folder: Path, rows: list[np.ndarray], reading: dict[str, int]) -> None:
    dataset = ShardDataset.open(folder, "train", max_bad_records=1.0, **reading)
    path, offset = record_offset(dataset, 500)
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
    path, offset = record_offset(dataset, 10)
    overwrite(path, offset, b"\xff\xff")
    with pytest.raises(
        DataError, match=r"shard-000000.tar: record 10 at byte \d+ is damaged.*max_bad_records = 0.0001"
    ):
        dataset.read(np.array([10]))


def test_unique_length_is_cut_from_a_longer_record(tmp_path: Path, reading: dict[str, int]) -> None:
    rows = [np.full(n, 5 + n) for n in (4, 9, 4, 6)]
    dataset = ShardDataset.open(write_folder(tmp_path / "d", rows), "train", max_bad_records=1.0, **reading)
    path, offset = record_offset(dataset, 3)
    overwrite(path, offset, b"\0\0")
    tokens, lengths = dataset.read(np.array([3]))
    assert lengths.tolist() == [6] and tokens.tolist() == [14] * 6
    dataset = ShardDataset.open(dataset.path, "train", max_bad_records=1.0, **reading)
    path, offset = record_offset(dataset, 1)
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


def test_shard_cut_after_opening_is_found(folder: Path, reading: dict[str, int]) -> None:
    dataset = ShardDataset.open(folder, "train", max_bad_records=1.0, **reading)
    path, offset = record_offset(dataset, 0)
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


def test_ranks_of_a_node_divide_the_checking(folder: Path) -> None:
    overwrite(folder / "train/shard-000001.idx.npy", 200, b"\x01\x02")
    with pytest.raises(DataError, match="shard-000001.idx.npy: sha256"):
        ShardDataset.open(folder, "train", part=(1, 3))
    ShardDataset.open(folder, "train", part=(0, 3))


def test_lengths_are_those_of_the_index(folder: Path, rows: list[np.ndarray]) -> None:
    lengths, expected = ShardDataset.open(folder, "train").lengths, np.array([len(row) for row in rows])
    ids = np.random.default_rng(0).integers(0, len(rows), 300)
    assert np.array_equal(lengths[ids], expected[ids]) and np.array_equal(lengths[5:900:7], expected[5:900:7])
    assert (lengths.min(), lengths.max(), lengths.max(initial=999)) == (expected.min(), expected.max(), 999)
    assert len(lengths) == len(rows) and lengths.mean() == pytest.approx(expected.mean())


def test_slow_storage_is_read_by_several_threads_and_gives_the_same(
    folder: Path, rows: list[np.ndarray], reading: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: set[int] = set()

    def pread(*where: int) -> bytes:
        readers.add(threading.get_ident())
        return os.pread(*where)

    monkeypatch.setattr(shard_files, "os", SimpleNamespace(**{**vars(os), "pread": pread}))
    monkeypatch.setattr(shard_files, "SLOW", 0.0)
    monkeypatch.setattr(shard_files, "PROBED", 1)
    monkeypatch.setattr(shard_files, "OPEN_FILES", 2)
    dataset = ShardDataset.open(folder, "train", **reading)
    assert len(dataset.manifest["splits"]["train"]["shards"]) > 2
    for seed in range(3):
        ids = np.random.default_rng(seed).integers(0, 1500, size=300)
        assert split_rows(*dataset.read(ids)) == [rows[i].tolist() for i in ids]
        assert len(dataset._files._files) <= 2
    assert len(readers) > 1
    dataset.close()
    record_offset(dataset, 1499)[0].unlink()
    with pytest.raises(DataError, match="cannot be opened"):
        dataset.read(np.arange(1500))
    dataset.close()


def test_windows_read_each_block_once_and_ahead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[int, int]] = []
    pread = os.pread
    monkeypatch.setattr(
        os, "pread", lambda handle, size, offset: reads.append((size, offset)) or pread(handle, size, offset)
    )
    order = Order(1, 1500, block=50, window=6)
    dataset = ShardDataset.open(folder, "train", block=50, kept_blocks=12)
    by_sample = ShardDataset.open(folder, "train")
    shards = len(dataset.manifest["splits"]["train"]["shards"])
    demanded = []
    for first in range(0, 3000, 25):  # two epochs
        positions = np.arange(first, first + 25)
        dataset.preload(order.upcoming(positions))
        ids, before = order.at(positions)[1], len(reads)
        tokens, lengths = dataset.read(ids)
        demanded.append(len(reads) - before)
        counted = len(reads)
        assert np.array_equal(tokens, by_sample.read(ids)[0])
        del reads[counted:]
    assert sum(demanded[600 // 25 :]) == 0, "after the first windows everything was read ahead"
    assert 60 <= len(reads) <= 72 + 3 * shards, "30 blocks in each epoch and the window after them, some in two shards"
