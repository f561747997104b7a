"""`exlm data index`: everything in a shard accounted for, nothing run, damage named, and an interrupted run goes on."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from foreign_shards import MOLECULES, npy, smiles_tokenizer, text_members, write_tar
from prepared_folder import overwrite

from exlm_dist.cli import main
from exlm_dist.data.manifest import read_manifest
from exlm_dist.data.opening import open_dataset
from exlm_dist.prepare import index_shards as module
from exlm_dist.prepare.index_shards import index_shards
from exlm_dist.utils.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return smiles_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write_shards(folder: Path, count: int = 4, ending: str = "txt") -> str:
    size = len(MOLECULES) // count
    for shard in range(count):
        part = MOLECULES[size * shard : size * (shard + 1)]
        write_tar(folder / f"s-{shard:03d}.tar", text_members(part, ending))
    return str(folder / f"s-{{000..{count - 1:03d}}}.tar")


def test_counts_add_up_and_what_is_set_aside_is_listed(tmp_path, tokenizer):
    good = text_members(MOLECULES[:60])
    other = [("000000.cls", b"1"), ("000001.jpg", b"\xff\xd8"), ("../000002.txt", b"C"), ("x/none", b"C")]
    bad = [("b1.txt", b"not a molecule"), ("b2.txt", b""), ("b3.txt", b"\xff"), ("b4.txt", b"C" * 300)]
    write_tar(tmp_path / "a.tar", good + other + bad)
    write_tar(tmp_path / "b.tar", text_members(MOLECULES[60:90] + MOLECULES[:2]))
    pattern = str(tmp_path / "{a,b}.tar")
    with pytest.raises(DataError, match=r"4 of 96 samples \(4.2%\).*\n.*a\.tar, b1\.txt, record 1: not SMILES"):
        index_shards([pattern], tmp_path / "d", tokenizer=tokenizer, workers=1, max_rejected=0.01, max_length=128)
    assert not (tmp_path / "d").exists()
    summary = index_shards([pattern], tmp_path / "d", tokenizer=tokenizer, workers=1, max_length=128)
    counts = summary.manifest["statistics"]
    assert (counts["members"], counts["members_used"], counts["rows"], counts["kept"]) == (100, 96, 96, 92)
    assert counts["members_set_aside"] == {
        "other ending (.cls)": 1, "other ending (.jpg)": 1, "unsafe name": 1, "other ending (.)": 1,
    }  # fmt: skip
    assert counts["quarantined"] == {"not SMILES": 1, "empty": 1, "not UTF-8": 1, "too long": 1}
    assert counts["repeated"] == 2 and sum(summary.sequences.values()) == 92
    listed = (tmp_path / "d" / "quarantine.tsv").read_text().splitlines()
    assert len(listed) == 5 and listed[1].startswith("a.tar/b1.txt\t1\tnot SMILES")
    assert "members" in str(summary) and "repeated" in str(summary)
    again = index_shards([pattern], tmp_path / "d", tokenizer=tokenizer, workers=1, max_length=128)
    assert again.reused
    with pytest.raises(DataError, match="max_length: 128 then, 64 now"):
        index_shards([pattern], tmp_path / "d", tokenizer=tokenizer, workers=1, max_length=64)


class Marker:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_nothing_in_a_shard_is_ever_run(tmp_path, tokenizer):
    mark = tmp_path / "was-run"
    payload = pickle.dumps(Marker(mark))
    endings = ["pyd", "pickle", "pkl", "pth", "pt", "npz", "py", "txt.pickle", "pickle.txt", "pyd.gz"]
    members = [(f"e{i}.{ending}", payload) for i, ending in enumerate(endings)]
    members += [("o.npy", npy(np.array([Marker(mark)], object))), ("p.npy", payload), ("q.txt", payload)]
    write_tar(tmp_path / "a.tar", text_members(MOLECULES) + members)
    summary = index_shards(
        [str(tmp_path / "a.tar")], tmp_path / "d", tokenizer=tokenizer, endings=["txt", "npy"], workers=1
    )
    dataset = open_dataset(tmp_path / "d", "train")
    dataset.read(np.arange(len(dataset)))
    assert not mark.exists()
    aside = summary.manifest["statistics"]["members_set_aside"]
    assert sum(count for reason, count in aside.items() if reason.startswith("code or pickle")) == len(endings)
    assert sum(summary.quarantined.values()) == 3
    with pytest.raises(ConfigError, match="never read"):
        index_shards([str(tmp_path / "a.tar")], tmp_path / "e", tokenizer=tokenizer, endings=["pth"])
    for command in (f"pipe:touch {mark}", f"PIPE:touch {mark}"):
        with pytest.raises(DataError, match="commands are never run"):
            index_shards([command], tmp_path / "e", tokenizer=tokenizer)
    with pytest.raises(DataError, match="nothing is read from ftp://"):
        index_shards(["ftp://host/a.tar"], tmp_path / "e", tokenizer=tokenizer)
    assert not mark.exists() and not (tmp_path / "e").exists()


def test_several_kinds_of_members_or_none_are_asked_about(tmp_path, tokenizer):
    write_tar(tmp_path / "a.tar", text_members(MOLECULES[:9]) + text_members(MOLECULES[:9], "json"))
    with pytest.raises(ConfigError, match=r"several kinds.*9 \.txt, 9 \.json.*--ending txt"):
        index_shards([str(tmp_path / "a.tar")], tmp_path / "d", tokenizer=tokenizer)
    write_tar(tmp_path / "b.tar", [("a.jpg", b"1")])
    with pytest.raises(DataError, match=r"1 \.jpg"):
        index_shards([str(tmp_path / "b.tar")], tmp_path / "d", tokenizer=tokenizer)
    with pytest.raises(DataError, match=r"is a folder\. Name its shards: '.*/\*\.tar'"):
        index_shards([str(tmp_path)], tmp_path / "d", tokenizer=tokenizer)
    with pytest.raises(DataError, match="no such shard"):
        index_shards([str(tmp_path / "none-{0..3}.tar")], tmp_path / "d", tokenizer=tokenizer)


def test_all_damaged_shards_are_named_and_the_next_run_goes_on_from_the_others(tmp_path, tokenizer, monkeypatch):
    pattern = write_shards(tmp_path)
    kept = [(tmp_path / f"s-{shard:03d}.tar").read_bytes() for shard in (1, 3)]
    (tmp_path / "s-001.tar").write_bytes(kept[0][:3000])
    overwrite(tmp_path / "s-003.tar", 2048, bytes(1024))
    arguments = [
        "data",
        "index",
        pattern,
        "--tokenizer",
        str(tokenizer),
        "--out",
        str(tmp_path / "d"),
        "--workers",
        "1",
    ]
    assert main(arguments) == 77
    with pytest.raises(DataError, match=r"(?s)2 of 4 shards.*s-001\.tar: cut off.*s-003\.tar: zeros from byte 2048"):
        index_shards([pattern], tmp_path / "d", tokenizer=tokenizer, workers=1)
    assert not (tmp_path / "d").exists()
    (tmp_path / "s-001.tar").write_bytes(kept[0])
    (tmp_path / "s-003.tar").write_bytes(kept[1])
    read: list[str] = []
    whole = module.index_shard
    monkeypatch.setattr(module, "index_shard", lambda folder, task: _noted(whole, folder, task, read))
    index_shards([pattern], tmp_path / "d", tokenizer=tokenizer, workers=1)
    assert read == ["s-001.tar", "s-003.tar"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    monkeypatch.undo()
    straight = index_shards([pattern], tmp_path / "e", tokenizer=tokenizer, workers=2)
    assert straight.manifest["fingerprint"] == read_manifest(tmp_path / "d")["fingerprint"]


def _noted(function, folder, task, read):
    if not task.part(Path(folder)).exists():
        read.append(Path(task.place).name)
    return function(folder, task)


def test_an_edited_shard_is_read_again_and_shards_can_be_moved(tmp_path, tokenizer):
    (tmp_path / "here").mkdir()
    pattern = write_shards(tmp_path / "here", 2)
    folder = tmp_path / "d"
    index_shards([pattern], folder, tokenizer=tokenizer, workers=1)
    before = read_manifest(folder)["fingerprint"]
    first = open_dataset(folder, "train").read(np.arange(50))[0]
    (tmp_path / "here").rename(tmp_path / "there")
    with pytest.raises(DataError, match=r"s-000\.tar"):
        open_dataset(folder, "train")
    (folder / "shards-at.txt").write_text(f"{tmp_path / 'there'}\n")
    assert np.array_equal(open_dataset(folder, "train").read(np.arange(50))[0], first)
    assert read_manifest(folder)["fingerprint"] == before


def test_commands_that_look_at_data(tmp_path, tokenizer, capsys):
    folder = tmp_path / "d"
    index_shards([write_shards(tmp_path)], folder, tokenizer=tokenizer, workers=1)
    assert main(["data", "verify", str(folder)]) == 0
    assert main(["data", "stats", str(folder)]) == 0
    assert main(["data", "sample", str(folder), "--count", "3", "--split", "valid"]) == 0
    assert main(["data", "inspect", str(folder), "0"]) == 0
    said = capsys.readouterr().out
    assert "whole: every file" in said and "228 samples of 4 files" in said and MOLECULES[0] in said
    dataset = open_dataset(folder, "train")
    shard, record = dataset.record(20)
    overwrite(Path(dataset.place(shard)), int(record["offset"]), b"#")
    assert main(["data", "verify", str(folder)]) == 77
    said = capsys.readouterr().out
    assert f"train record 20 at byte {record['offset']}: expected crc32 {record['crc']:08x}, got crc32" in said
    assert main(["data", "inspect", str(folder), "20"]) == 77
    assert "DAMAGED" in capsys.readouterr().out
    assert main(["data", "inspect", str(folder), "9999"]) == 77


def test_json_fields_may_lie_within_others(tmp_path, tokenizer):
    rows = [(f"{i}.json", json.dumps({"meta": {"s": m}}).encode()) for i, m in enumerate(MOLECULES[:20])]
    write_tar(tmp_path / "a.tar", rows)
    summary = index_shards([str(tmp_path / "a.tar")], tmp_path / "d", tokenizer=tokenizer, field="meta.s", workers=1)
    assert sum(summary.sequences.values()) == 20
    with pytest.raises(DataError, match="no sample can be used: 20 no field"):
        index_shards([str(tmp_path / "a.tar")], tmp_path / "e", tokenizer=tokenizer, workers=1)
