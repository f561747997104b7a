"""Output tables: what is written comes back, missing stays missing, and a failure leaves nothing."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from exlm_dist.tables.failed_rows import FailedRows, failed_rows_path
from exlm_dist.tables.records import InputOptions, read_records
from exlm_dist.tables.table_writer import TableWriter
from exlm_dist.utils.errors import ConfigError, DataError, OutputError

TEXTS = ["CCO", 'a "quoted", one', None, "F/C=C\\F", "line\nbreak", "", "naïve 日本", "tab\there", "cr\rhere", " x "]
EMBEDDING = np.linspace(-1, 1, 30, dtype=np.float32).reshape(10, 3)
EMBEDDING[3] = np.nan
SCORES = np.array([0.1, np.nan, *range(8)])


def write(path: Path, **options: bool) -> Path:
    with TableWriter(path, **options) as table:
        for part in (slice(0, 4), slice(4, 4), slice(4, 10)):
            table.write(
                {
                    "smiles": TEXTS[part],
                    "embedding": EMBEDDING[part],
                    "score": SCORES[part],
                    "count": list(range(10))[part],
                }
            )
    return path


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_cells_come_back(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"out{ending}")
    records = list(read_records(path, InputOptions()))
    assert list(records[0].values) == ["smiles", "embedding_0", "embedding_1", "embedding_2", "score", "count"]
    texts = [record.values["smiles"] for record in records]
    if ending == ".tsv":
        texts = [text and text.replace("\\t", "\t").replace("\\n", "\n").replace("\\r", "\r") for text in texts]
    assert texts == [text or None for text in TEXTS] and not any(record.problem for record in records)
    assert [record.values["embedding_0"] for record in records] == [
        None if np.isnan(value) else str(value) for value in EMBEDDING[:, 0]
    ]
    assert [record.values["score"] for record in records][:3] == ["0.1", None, "0.0"]
    assert [record.values["count"] for record in records] == [str(number) for number in range(10)]


def test_missing_cells_are_empty_and_rows_of_them_stay(tmp_path: Path) -> None:
    with TableWriter(tmp_path / "a.csv") as table:
        table.write({"a": ["x", None], "b": np.array([[1.0, 2.0], [np.nan, np.nan]])})
    assert (tmp_path / "a.csv").read_text() == "a,b_0,b_1\nx,1.0,2.0\n,,\n"
    with TableWriter(tmp_path / "b.csv") as table:
        table.write({"a": ["x", None, "y"]})
    assert [record.values["a"] for record in read_records(tmp_path / "b.csv", InputOptions(header=True))] == [
        "x",
        None,
        "y",
    ]


def test_a_column_is_never_written_over_another(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="two columns would be called 'b_1'"), TableWriter(tmp_path / "a.csv") as table:
        table.write({"b_1": ["x"], "b": np.zeros((1, 2))})
    assert not list(tmp_path.iterdir())


def test_json_lines(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in write(tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["smiles"] for row in rows] == TEXTS and rows[3]["embedding"] is None and rows[1]["score"] is None
    assert rows[0]["embedding"][0] == -1.0 and len(rows[0]["embedding"]) == 3 and rows[9]["count"] == 9


def test_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(write(tmp_path / "out.parquet"))
    assert str(table.schema.field("embedding").type) == "list<element: float>" and table.num_rows == 10
    assert table["smiles"].to_pylist() == TEXTS and table["score"].null_count == 1 and table["score"][0].as_py() == 0.1
    embedding = table["embedding"].to_pylist()
    assert embedding[3] is None and np.array_equal(embedding[:3] + embedding[4:], np.delete(EMBEDDING, 3, axis=0))
    assert not any(record.problem for record in read_records(tmp_path / "out.parquet", InputOptions("smiles")))


def test_npz(tmp_path: Path) -> None:
    with np.load(write(tmp_path / "out.npz"), allow_pickle=False) as arrays:
        assert (
            np.array_equal(arrays["embedding"], EMBEDDING, equal_nan=True) and arrays["embedding"].dtype == np.float32
        )
        assert arrays["smiles"].tolist() == [text or "" for text in TEXTS]
        assert np.array_equal(arrays["score"], SCORES, equal_nan=True) and arrays["count"].tolist() == list(range(10))


def test_texts_too_long_for_npz_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exlm_dist.tables.table_formats.NPZ_TEXT_BYTES", 1000)
    with pytest.raises(DataError, match="'text' has texts of up to 300 characters.*parquet"):
        with TableWriter(tmp_path / "out.npz") as table:
            table.write({"text": ["x" * 300]})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".parquet", ".npz"])
def test_a_failure_leaves_nothing(tmp_path: Path, ending: str) -> None:
    if ending == ".parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"out{ending}"
    with pytest.raises(RuntimeError), TableWriter(path) as table:
        table.write({"a": ["x"], "b": np.zeros((1, 2))})
        assert len(list(tmp_path.iterdir())) == 1 and not path.exists()
        raise RuntimeError
    with pytest.raises(DataError, match="nothing to write"), TableWriter(path):
        pass
    assert not list(tmp_path.iterdir())
    path.write_text("before")
    with pytest.raises(RuntimeError), TableWriter(path, overwrite=True) as table:
        table.write({"a": ["x"]})
        raise RuntimeError
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 1
    write(path, overwrite=True)
    assert path.stat().st_size > 100 and len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_written_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old.csv").write_text("x")
    with pytest.raises(ConfigError, match="old.csv: exists.*--overwrite"):
        TableWriter(tmp_path / "old.csv")
    with pytest.raises(OutputError, match="cannot be made, as .*old.csv is a file"):
        TableWriter(tmp_path / "old.csv" / "a.csv")
    with pytest.raises(OutputError, match=r"/proc/new/a.csv: cannot be made: nothing can be written in /proc \("):
        TableWriter(Path("/proc/new/a.csv"))
    with pytest.raises(ConfigError, match="must end in one of .csv, .tsv, .jsonl, .parquet, .npz"):
        TableWriter(tmp_path / "a.xlsx")
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        TableWriter(tmp_path / "a.csv", overwrite=True)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match="pip install pyarrow$"):
        TableWriter(tmp_path / "a.parquet")


def test_the_folder_is_made(tmp_path: Path) -> None:
    write(tmp_path / "new" / "deep" / "a.csv")
    assert (tmp_path / "new" / "deep" / "a.csv").is_file()


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    os.symlink(tmp_path / "disk" / "out.csv", tmp_path / "out.csv")
    write(tmp_path / "out.csv")
    assert (tmp_path / "out.csv").is_symlink() and (tmp_path / "disk" / "out.csv").is_file()


def test_chunks_must_agree(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one length"), TableWriter(tmp_path / "a.csv") as table:
        table.write({"a": ["x"], "b": []})
    with pytest.raises(ValueError, match="in the first chunk"), TableWriter(tmp_path / "a.csv") as table:
        table.write({"a": ["x"]})
        table.write({"b": ["x"]})


def test_types_are_those_of_the_first_chunk(tmp_path: Path) -> None:
    with TableWriter(tmp_path / "a.npz") as table:
        table.write({"text": [None], "number": [1.5], "flag": [True]})
        table.write({"text": [2], "number": [None], "flag": [False]})
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["text"].tolist() == ["", "2"] and arrays["flag"].tolist() == [True, False]
        assert arrays["number"][0] == 1.5 and np.isnan(arrays["number"][1])


def test_bytes_that_are_not_text_pass_through(tmp_path: Path) -> None:
    """A column that is only carried along keeps its bytes, where the format can hold them."""
    for ending in (".csv", ".tsv", ".jsonl", ".parquet", ".npz"):
        if ending == ".parquet":
            pytest.importorskip("pyarrow")
        with TableWriter(tmp_path / f"a{ending}") as table:
            table.write({"name": ["caf\udce9", "x"]})
    assert b"caf\xe9\n" in (tmp_path / "a.csv").read_bytes() and b"caf\xe9\n" in (tmp_path / "a.tsv").read_bytes()
    assert json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0]) == {"name": "caf\udce9"}


def test_failed_rows_are_listed_beside(tmp_path: Path) -> None:
    path = failed_rows_path(tmp_path / "out.csv")
    with FailedRows(path) as failed:
        failed.add("a.csv", 3, "not SMILES", "x\ty\\z\n")
        failed.add("a.csv", 4, "empty")
        assert not path.exists() and failed.count == 2
    assert path.name == "out.csv.failed.tsv"
    assert path.read_text() == ("file\trow\treason\ttext\na.csv\t3\tnot SMILES\tx\\ty\\\\z\\n\na.csv\t4\tempty\t\n")
    with pytest.raises(RuntimeError), FailedRows(path) as failed:
        failed.add("b.csv", 1, "empty")
        raise RuntimeError
    assert "a.csv" in path.read_text() and len(list(tmp_path.iterdir())) == 1
    with FailedRows(path) as failed:
        assert failed.count == 0
    assert not list(tmp_path.iterdir())
