"""What is written down of damaged records."""

from __future__ import annotations

import csv

import numpy as np
from prepared_folder import overwrite, random_sequences, record_offset, write_folder

from exlm_dist.data.shards import ShardDataset
from exlm_dist.training.damage_log import FOLDER, DamageLog


def test_each_damaged_record_is_written_once_with_where_it_is(tmp_path):
    folder = write_folder(tmp_path / "data", random_sequences(200))
    data = [ShardDataset.open(folder, split, max_bad_records=1.0) for split in ("train", "valid")]
    where = [record_offset(data[0], 7), record_offset(data[0], 150), record_offset(data[1], 3)]
    for path, offset in where:
        overwrite(path, offset, b"\xff")
    log = DamageLog(tmp_path, 2, data)
    assert log.counts() == [0.0, 0.0] and not (tmp_path / FOLDER).exists()
    data[0].read(np.array([7, 8]))
    assert log.counts() == log.counts() and log.counts()[0] == 1.0
    data[0].read(np.array([7, 150]))
    data[1].read(np.arange(10))
    bad, retries = log.counts()
    assert bad == 3.0 and retries >= 3.0
    with open(tmp_path / FOLDER / "rank-00002.tsv", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    found = [(row["split"], int(row["sample"]), row["shard"], int(row["offset"])) for row in rows]
    samples = [("train", 7), ("train", 150), ("valid", 3)]
    assert found == [(*sample, str(path), offset) for sample, (path, offset) in zip(samples, where)]
    assert all(row["crc32_expected"] != row["crc32_got"] and row["data"] == str(folder) for row in rows)
    assert [int(row["replacement"]) for row in rows] == [
        record.replacement for one in data for record in one.bad_records
    ]
    DamageLog(tmp_path, 2, data).counts()  # another launch
    assert len((tmp_path / FOLDER / "rank-00002.tsv").read_text().splitlines()) == 1 + 2 * 3
