"""Input files: every format gives the same rows, and what cannot be read says why."""

import gzip
import json
from pathlib import Path

import pytest

from exlm_dist.tables.records import InputOptions, expand_inputs, read_rows
from exlm_dist.utils.errors import DataError

TEXTS = ["CCO", "c1ccccc1", "CC(=O)O"]
PLAIN = {
    "a.csv": 'id,Smiles,name\n1,CCO,"a, b"\n2,c1ccccc1,x\n3,CC(=O)O,y\n',
    "a.tsv": "id\tSmiles\n1\tCCO\n2\tc1ccccc1\n3\tCC(=O)O\n",
    "a.txt": "CCO\nc1ccccc1\r\nCC(=O)O",
    "a.smi": "smiles name\nCCO ethanol\n\nc1ccccc1\tbenzene ring\nCC(=O)O\n",
    "a.jsonl": "".join(json.dumps({"n": 1, "smiles": text}) + "\n" for text in TEXTS),
}


def texts(path: Path, column: str | None = None) -> list[str]:
    return [row.text for row in read_rows(path, InputOptions(column), "smiles")]


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_formats_and_compression(tmp_path: Path, name: str, packing: str) -> None:
    import zstandard

    content = PLAIN[name].encode()
    packed = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[packing](content)
    path = tmp_path / (name + packing)
    path.write_bytes(packed)
    assert texts(path) == TEXTS


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"smiles": [*TEXTS, None], "x": [1, 2, 3, 4]}), path)
    assert texts(path) == [*TEXTS, ""] and texts(path, "x") == ["1", "2", "3", "4"]
    with pytest.raises(DataError, match="no column 'smile' \\(did you mean 'smiles'"):
        texts(path, "smile")
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="not readable as parquet"):
        texts(path)


def test_rows_carry_their_position(tmp_path: Path) -> None:
    path = tmp_path / "a.smi"
    path.write_text(PLAIN["a.smi"])
    assert [row.row for row in read_rows(path, InputOptions(), "smiles")] == [2, 4, 5]
    path = tmp_path / "a.csv"
    path.write_text(PLAIN["a.csv"])
    assert [(row.file, row.row) for row in read_rows(path, InputOptions("name"), "smiles")] == [
        (str(path), n) for n in (1, 2, 3)
    ]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_wrong_column_lists_the_columns(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(PLAIN[name])
    with pytest.raises(
        DataError, match=r"a\..*has no column 'smilez' \(did you mean '(S|s)miles'\?\). Its columns: ('id'|'n')"
    ):
        texts(path, "smilez")


def test_columns_without_a_default(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("x,y\n1,2\n")
    with pytest.raises(DataError, match="name the column of the smiles with --column NAME. Its columns: 'x', 'y'"):
        texts(path)
    path.write_text("only\nCCO\n")
    assert texts(path) == ["CCO"]


def test_odd_rows_are_carried_not_fatal(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"smiles": "CCO"}\n{oops\n[1]\n"CC"\n{"smiles": null}\n')
    rows = list(read_rows(path, InputOptions(), "smiles"))
    assert [(row.text, row.problem) for row in rows] == [
        ("CCO", ""),
        ("{oops", "not JSON"),
        ("[1]", "not a JSON object with named fields"),
        ("CC", ""),
        ("", ""),
    ]
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfCC\xff\nCC\n")
    first, second = read_rows(path, InputOptions(), "smiles")
    assert first.text == "CC\udcff" and second.text == "CC"


def test_missing_empty_unknown_and_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "zinc.smi").write_text("C\n")
    with pytest.raises(DataError, match="zinc.sm: no such file \\(did you mean 'zinc.smi'"):
        expand_inputs([str(tmp_path / "zinc.sm")])
    with pytest.raises(DataError, match="no file matches this pattern"):
        expand_inputs([str(tmp_path / "*.csv")])
    with pytest.raises(DataError, match="is a folder"):
        expand_inputs([str(tmp_path)])
    with pytest.raises(DataError, match="no input file given"):
        expand_inputs([])
    (tmp_path / "e.txt").touch()
    with pytest.raises(DataError, match="e.txt: the file is empty"):
        expand_inputs([str(tmp_path / "e.txt")])
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(DataError, match=r"cannot read '.docx' files; the name must end in one of .csv"):
        expand_inputs([str(tmp_path / "a.docx")])
    damaged = tmp_path / "a.txt.gz"
    damaged.write_bytes(gzip.compress(b"CCO\n" * 10_000)[:-20])
    with pytest.raises(DataError, match="a.txt.gz: damaged or cut off"):
        texts(damaged)
    damaged = tmp_path / "a.txt.zst"
    damaged.write_bytes(b"this is not zstd")
    with pytest.raises(DataError, match="a.txt.zst: damaged or cut off"):
        texts(damaged)


def test_zstd_frames_are_joined_and_a_cut_one_is_found(tmp_path: Path) -> None:
    """The library's own stream reader takes a truncated file for a whole one."""
    import zstandard

    lines = [f"line {number}" for number in range(50_000)]
    frame = zstandard.ZstdCompressor().compress("\n".join([*lines, ""]).encode())
    path = tmp_path / "a.txt.zst"
    path.write_bytes(frame + frame)
    assert texts(path) == lines + lines
    for kept in (frame[: len(frame) // 2], frame[:-1], frame + frame[:100]):
        path.write_bytes(kept)
        with pytest.raises(DataError, match="a.txt.zst: damaged or cut off"):
            texts(path)


def test_patterns_are_sorted_and_files_come_once(tmp_path: Path) -> None:
    for name in ("b.smi", "a.smi", "c.txt"):
        (tmp_path / name).write_text("C\n")
    found = expand_inputs([str(tmp_path / "*.smi"), str(tmp_path / "a.smi"), str(tmp_path / "c.txt")])
    assert [path.name for path in found] == ["a.smi", "b.smi", "c.txt"]
