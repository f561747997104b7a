"""Input files: every format gives the same rows, and what cannot be read says why."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from exlm_dist.tables.records import InputOptions, column_names, expand_inputs, read_records, read_rows, text_column
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


def test_a_json_row_without_the_field_changes_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"id": n, **({"text": f"words {n}"} if n not in (0, 5) else {})} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for column in (None, "text", "2"):
        found = list(read_rows(path, InputOptions(column), "text"))
        assert [row.text for row in found if not row.problem] == [f"words {n}" for n in (1, 2, 3, 4, 6, 7)]
        assert [(row.row, row.problem, row.text) for row in found if row.problem] == [
            (1, "no field: 'text'", '{"id": 0}'),
            (6, "no field: 'text'", '{"id": 5}'),
        ]
    records = list(read_records(path, InputOptions("text")))
    assert records[5].problem == "no field: 'text'" and records[5].values == {"id": "5", "text": None}
    assert not any(record.problem for record in read_records(path, InputOptions()))


def test_values_of_json(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    values = ["x", ["a", "b"], {"inner": 1}, 12, 0.5, True, None, float("nan"), "\ud800", "nul\0"]
    path.write_text("".join(json.dumps({"text": value, "meta": {"url": "u", "n": [1]}}) + "\n" for value in values))
    assert column_names(path, InputOptions()) == ["text", "meta.url", "meta.n", "text.inner"]
    assert texts(path, "meta.url") == ["u"] * 10
    found = [(row.text, row.problem) for row in read_rows(path, InputOptions("text"), "text")]
    raw = json.dumps({"text": ["a", "b"], "meta": {"url": "u", "n": [1]}})
    assert found[:2] == [("x", ""), (raw, "not text: a list in 'text'")]
    assert found[2][1] == "not text: an object in 'text'"
    assert [text for text, _ in found[3:8]] == ["12", "0.5", "true", "", ""]
    assert [problem for _, problem in found[3:]] == [""] * 5 + ["not UTF-8", "NUL character"]
    records = list(read_records(path, InputOptions()))
    assert records[1].values["text"] == '["a", "b"]' and records[0].values["meta.n"] == "[1]"
    assert [record.values["text.inner"] for record in records[1:4]] == [None, "1", None]


def test_json_lines_of_strings(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('"one"\n"two"\n')
    assert texts(path) == ["one", "two"] and column_names(path, InputOptions()) == ["text"]
    assert [record.values for record in read_records(path, InputOptions())] == [{"text": "one"}, {"text": "two"}]


def test_fields_that_come_late_are_in_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exlm_dist.tables.json_lines.SAMPLE", 2)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n{"text": "c", "late": 1}\n')
    assert [record.values for record in read_records(path, InputOptions())][2] == {"text": "c", "late": "1"}


def test_kinds_of_parquet_columns(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    words = ["one two", None, "naïve"]
    table = {
        "string": words,
        "large": arrow.array(words, arrow.large_string()),
        "binary": arrow.array([word and word.encode() for word in words], arrow.binary()),
        "coded": arrow.array(words).dictionary_encode(),
        "coded_bytes": arrow.array([word and word.encode() for word in words]).dictionary_encode(),
        "meta": [{"text": "one two", "inner": {"deep": "x"}}, None, {"text": "naïve", "inner": None}],
        "dotted.name": words,
        "list": [["a"], None, []],
        "number": [1.5, None, float("nan")],
        "flag": [True, False, None],
    }
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table(table), path, row_group_size=2)
    for column in ("string", "large", "binary", "coded", "coded_bytes", "meta.text", "dotted.name"):
        assert texts(path, column) == ["one two", "", "naïve"], column
    assert texts(path, "meta.inner.deep") == ["x", "", ""] and texts(path, "number") == ["1.5", "", ""]
    with pytest.raises(DataError, match="column 'list' holds list<.*string>, not text. Its columns: 'string'"):
        text_column(path, InputOptions("list"), "text")
    records = list(read_records(path, InputOptions("string")))
    assert list(records[0].values) == column_names(path, InputOptions()) and records[0].values["flag"] == "true"
    assert records[0].values["list"] == '["a"]' and records[1].values["meta.text"] is None
    parquet.write_table(arrow.table({"text": [b"caf\xe9", b"fine"]}), path)
    assert [row.problem for row in read_rows(path, InputOptions(), "text")] == ["not UTF-8", ""]
    for kind in (arrow.string(), arrow.large_string(), arrow.dictionary(arrow.int32(), arrow.string())):
        wrong = arrow.array([b"caf\xe9", b"fine"]).view(arrow.string()).cast(kind)  # what other writers let pass
        parquet.write_table(arrow.table({"text": wrong}), path)
        assert [row.problem for row in read_rows(path, InputOptions(), "text")] == ["not UTF-8", ""], kind


def test_parquet_that_is_damaged_packed_or_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"text": [str(number) for number in range(10_000)]}), path, compression="gzip")
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:200] + b"\0" * 2000 + whole[2200:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="a.parquet: not readable as parquet"):
            texts(path)
    packed = tmp_path / "a.parquet.gz"
    packed.write_bytes(gzip.compress(whole))
    with pytest.raises(DataError, match="decompress it first"):
        texts(packed)
    (tmp_path / "bare").write_bytes(whole)
    assert len(texts(tmp_path / "bare")) == 10_000
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="reading parquet needs pyarrow: pip install pyarrow$"):
        texts(path)


def test_records_of_every_format(tmp_path: Path) -> None:
    for name, content in PLAIN.items():
        path = tmp_path / name
        path.write_text(content, newline="")
        names = column_names(path, InputOptions())
        records = list(read_records(path, InputOptions()))
        assert all(list(record.values) == names for record in records)
        column = text_column(path, InputOptions(), "smiles")
        assert [record.values[column] for record in records] == TEXTS
    assert records[0].values == {"n": "1", "smiles": "CCO"} and names == ["n", "smiles"]


def test_lines_end_as_in_any_system(tmp_path: Path) -> None:
    for end in ("\n", "\r\n", "\r"):
        for name in ("a.txt", "a.smi", "a.csv", "a.tsv"):
            lines = ["smiles", *TEXTS] if name[2:] in ("csv", "tsv") else TEXTS
            (tmp_path / name).write_text("".join(line + end for line in lines), newline="")
            assert texts(tmp_path / name) == TEXTS
