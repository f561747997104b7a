"""Damaged files of a folder of data are replaced by those of a copy, wherever it is, and by whole ones only."""

import shutil
from pathlib import Path

import pytest
from foreign_shards import MOLECULES, smiles_tokenizer, text_members, write_tar
from prepared_folder import overwrite, random_sequences, verify_folder, write_folder
from range_server import serving

from exlm_dist.cli import main
from exlm_dist.data import mirror
from exlm_dist.data.manifest import read_manifest
from exlm_dist.prepare.data_check import verify_data
from exlm_dist.prepare.data_repair import repair_data
from exlm_dist.prepare.index_shards import index_shards
from exlm_dist.utils.errors import ConfigError, DataError


@pytest.fixture()
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A folder of data with three damaged files and a missing one, and its whole copy."""
    folder = write_folder(tmp_path / "data", random_sequences(900), shard_bytes=1 << 14)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    shards = read_manifest(folder)["splits"]["train"]["shards"]
    overwrite(folder / shards[0]["name"], 3000, b"####")
    with open(folder / shards[1]["name"], "r+b") as file:
        file.truncate(5000)
    (folder / shards[2]["name"]).unlink()
    overwrite(folder / shards[0]["index"], 200, b"####")
    return folder, copy


def test_all_that_is_damaged_is_replaced_and_nothing_else(pair, capsys):
    folder, copy = pair
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert main(["data", "repair", str(folder), "--from", str(copy)]) == 0
    assert "4 file(s) replaced, 0 still damaged" in capsys.readouterr().out
    assert verify_folder(folder) == [] == list(verify_data(folder))
    changed = [path for path in before if path.stat().st_mtime_ns != before[path]]
    assert len(changed) == 3 and not [path for path in folder.rglob("*") if path.name.startswith(".")]
    assert main(["data", "repair", str(folder), "--from", str(copy)]) == 0
    assert "nothing to repair" in capsys.readouterr().out


def test_a_copy_that_is_damaged_too_replaces_nothing(pair, capsys):
    folder, copy = pair
    name = read_manifest(folder)["splits"]["train"]["shards"][0]["name"]
    overwrite(copy / name, 4000, b"##")
    damaged = (folder / name).read_bytes()
    assert main(["data", "repair", str(folder), "--from", str(copy)]) == 77
    said = capsys.readouterr().out
    assert f"the copy is damaged too: {copy / name}: sha256" in said and "3 file(s) replaced, 1 still damaged" in said
    assert (folder / name).read_bytes() == damaged
    shutil.rmtree(copy / "train")
    left = list(repair_data(folder, copy))
    assert [repair.failure.partition(":")[0] for repair in left] == ["the copy cannot be read"]


def test_a_copy_may_be_behind_an_address(pair, tmp_path, monkeypatch):
    folder, copy = pair
    monkeypatch.setenv("EXLM_CACHE", str(tmp_path / "cache"))
    mirror._mirrored.cache_clear()
    with serving(copy, faults=0.0) as server:
        assert [repair.failure for repair in repair_data(folder, server.address)] == [""] * 4
    assert verify_folder(folder) == []
    with pytest.raises(ConfigError, match="only data on this machine"):
        list(repair_data("http://127.0.0.1:9/data", copy))
    with pytest.raises(DataError, match="no such folder"):
        list(repair_data(folder, tmp_path / "none"))


def test_shards_of_others_are_taken_from_another_folder_of_shards(tmp_path, capsys):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        write_tar(tmp_path / place / "m.tar", text_members(MOLECULES[:80]))
    tokenizer = smiles_tokenizer(tmp_path / "tokenizer")
    index_shards([str(tmp_path / "here" / "m.tar")], tmp_path / "d", tokenizer=tokenizer, workers=1)
    overwrite(tmp_path / "here" / "m.tar", 512, b"#")
    assert main(["data", "repair", str(tmp_path / "d"), "--from", str(tmp_path / "there")]) == 0
    assert f"replaced by {tmp_path / 'there' / 'm.tar'}" in capsys.readouterr().out
    assert list(verify_data(tmp_path / "d")) == []
