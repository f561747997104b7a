"""What a file is: said, named, certain from its content, or asked for by an error whose advice works."""

import bz2
import gzip
import logging
import lzma
import re
from pathlib import Path

import pytest

from exlm_dist.tables.records import (
    InputOptions,
    column_names,
    expand_inputs,
    read_records,
    read_rows,
    resolved,
    text_column,
)
from exlm_dist.utils.errors import ConfigError, DataError

SMILES = ["CC(C)N" + "C" * number for number in range(1, 30)]
OBJECTS = "".join(f'{{"text": "some words {number}"}}\n' for number in range(5))


def made(path: Path, content: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(content.encode(encoding))
    return path


def texts(path: Path, default: str = "smiles", **said: object) -> list[str]:
    return [row.text for row in read_rows(path, InputOptions(**said), default)]


@pytest.mark.parametrize(
    "name",
    [
        "c4-train.00000-of-00001.json.gz",  # C4
        "cc_en_head-0000.json.gz",  # Dolma
        "part-00000.jsonl.zst",
        "wiki_00",  # WikiExtractor
        "train.00000-of-01024",
        "data.ndjson.xz",
        "data.JSON.bz2",
    ],
)
def test_names_of_corpora(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    import zstandard

    pack = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress, "xz": lzma.compress, "bz2": bz2.compress}
    path = tmp_path / name
    path.write_bytes(pack.get(name.rsplit(".", 1)[-1], bytes)(OBJECTS.encode()))
    caplog.set_level(logging.INFO, "exlm_dist")
    assert expand_inputs([str(path)]) == [path] and texts(path, "text") == [f"some words {n}" for n in range(5)]
    assert ("read as jsonl" in caplog.text) == ("json" not in name.lower())


def test_content_says_the_compression(tmp_path: Path) -> None:
    path = tmp_path / "a.smi"
    path.write_bytes(gzip.compress(b"CCO\n") + gzip.compress(b"CCN\n"))  # two members, and no ending
    assert texts(path) == ["CCO", "CCN"]
    with pytest.raises(DataError, match="a.smi.gz: damaged or cut off.*take .gz off its name"):
        texts(made(tmp_path / "a.smi.gz", "CCO\n"))
    for pack, ending in ((bz2.compress, ".bz2"), (lzma.compress, ".xz"), (gzip.compress, ".gz")):
        path = tmp_path / f"b.txt{ending}"
        content = pack("\n".join(map(str, range(50_000))).encode())
        for cut in (content[:-30], content[: len(content) // 2], content[:20_000] + b"\0" * 50 + content[20_050:]):
            path.write_bytes(cut)
            with pytest.raises(DataError, match=f"b.txt{ending}: damaged or cut off"):
                texts(path)


def test_zstd_with_the_longest_window(tmp_path: Path) -> None:
    import zstandard

    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=31)
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = tmp_path / "a.smi.zst"
    path.write_bytes(b"\x50\x2a\x4d\x18\x04\0\0\0skip" + frame.compress(b"CCO\nCCN\n") + frame.flush())
    assert texts(path) == ["CCO", "CCN"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv", "a.jsonl", "a.smi"])
def test_the_mark_says_the_encoding(tmp_path: Path, name: str, encoding: str) -> None:
    delimiter = "," if name == "a.csv" else "\t"
    content = {
        "a.txt": "naïve\n日本\n",
        "a.jsonl": '{"text": "naïve"}\n{"text": "日本"}\n',
        "a.smi": "naïve x\n日本\n",
    }.get(name, f"id{delimiter}text\n1{delimiter}naïve\n2{delimiter}日本\n")
    assert texts(made(tmp_path / name, content, encoding), "text") == ["naïve", "日本"]


@pytest.mark.parametrize(("encoding", "name"), [("utf-16-le", "UTF-16LE"), ("utf-16-be", "UTF-16BE")])
def test_utf16_without_a_mark_is_refused_by_name(tmp_path: Path, encoding: str, name: str) -> None:
    path = made(tmp_path / "a b.txt", "some text\n" * 50, encoding)
    with pytest.raises(DataError, match=rf"UTF-16 without.*iconv -f {name} -t UTF-8 '.*a b.txt'"):
        texts(path, "text")


def test_damaged_utf16_and_nul_characters(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("some text\n".encode("utf-16") + b"x")
    with pytest.raises(DataError, match="a.txt: damaged or cut off"):
        texts(path, "text")
    path.write_bytes(b"one\nt\0wo\nthree\n")
    assert [row.problem for row in read_rows(path, InputOptions(), "text")] == ["", "NUL character", ""]


def test_tables_of_chembl_and_pubchem(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "exlm_dist")
    rows = "".join(f"CHEMBL{number}\t{smiles}\n" for number, smiles in enumerate(SMILES))
    path = tmp_path / "chembl_36_chemreps.txt.gz"
    path.write_bytes(gzip.compress(f"chembl_id\tcanonical_smiles\n{rows}".encode()))
    assert texts(path, column="canonical_smiles") == SMILES and "read as tsv: it has columns" in caplog.text
    assert texts(path, column="2", format="tsv") == SMILES
    with pytest.raises(DataError, match="2 columns with a tab between them.*--format tsv"):
        texts(path)
    path = made(tmp_path / "CID-SMILES", "".join(f"{number}\t{smiles}\n" for number, smiles in enumerate(SMILES)))
    assert texts(path, column="2") == SMILES and "it has no header" in caplog.text
    assert texts(path, column="2", format="tsv", header=False) == SMILES
    with pytest.raises(DataError, match="name the column of the smiles with --column NAME. Its columns: '1', '2'"):
        texts(path)
    path = made(tmp_path / "web.csv", '"ChEMBL ID";"Name";"Smiles"\n' + "".join(f'"C";"a, b";"{s}"\n' for s in SMILES))
    with pytest.raises(DataError, match="--delimiter ';'"):
        texts(path)
    assert texts(path, delimiter=";") == SMILES


def test_lines_of_text_with_tabs(tmp_path: Path) -> None:
    path = made(tmp_path / "a.txt", "1\tone text\n0\tanother text\n")
    with pytest.raises(DataError, match="each line has 2 columns with a tab.*--format tsv.*--format txt"):
        texts(path, "text")
    assert texts(path, "text", format="txt") == ["1\tone text", "0\tanother text"]
    assert texts(path, "text", format="tsv", header=False, column="2") == ["one text", "another text"]
    assert texts(made(path, "a\tb\nc\n"), "text") == ["a\tb", "c"]


def test_a_column_that_lines_do_not_have(tmp_path: Path) -> None:
    path = made(tmp_path / "a.smi", "1\tCCO\n2\tCCN\n")
    for said in ({}, {"format": "smi"}):
        with pytest.raises(DataError, match="smi files have no column 2. For a table say --format tsv"):
            texts(path, column="2", **said)
    assert texts(path, column="2", format="tsv") == ["CCO", "CCN"] == texts(path, column="2", delimiter="tab")
    path = made(tmp_path / "b.smi", "smiles name\nCCO ethanol\n")
    assert texts(path, column="smiles") == texts(path, column="1") == ["CCO"]


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_another_delimiter_is_named(tmp_path: Path, delimiter: str) -> None:
    lines = ["id,text", *(f"{number},words, and more, number {number}" for number in range(20)), "20"]
    path = made(tmp_path / "a.csv", "\n".join(line.replace(",", delimiter, 1) for line in lines))
    with pytest.raises(DataError, match="a.csv: its first line has no ','") as refused:
        texts(path, "text")
    advised = re.search("Say --delimiter ('.'|tab)", str(refused.value))[1].strip("'")
    rows = list(read_rows(path, InputOptions(delimiter=advised), "text"))
    assert rows[3].text == "words, and more, number 3" and rows[20].problem.startswith("ragged: 1 columns where 2")


def test_text_with_unquoted_commas(tmp_path: Path) -> None:
    path = made(tmp_path / "a.csv", "text\n" + "Hello, world, again\n" * 20)
    with pytest.raises(DataError, match=r"1 column\(s\), but 20 of the next 20 rows have not .*--delimiter tab"):
        texts(path, "text")
    assert texts(path, "text", delimiter="tab") == ["Hello, world, again"] * 20
    path = made(tmp_path / "b.csv", "id,text\n" + "1,Hello world\n" * 20 + "2,Hello, world\n3\n4,x,,\n")
    rows = list(read_rows(path, InputOptions(), "text"))
    assert [(row.text, row.problem) for row in rows[20:]] == [
        ("2,Hello, world", "ragged: 3 columns where 2 are expected"),
        ("3", "ragged: 1 columns where 2 are expected"),
        ("x", ""),
    ]
    records = list(read_records(path, InputOptions()))
    assert records[20].raw == "2,Hello, world" and records[21].values == {"id": "3", "text": None}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("excel.csv", "sep=;\nid;smiles\n1;CCO\n", "for Excel alone. Take it off: sed -i 1d .*excel.csv"),
        ("r.tsv", "smiles\ty\n1\tCCO\t1\n2\tCCN\t0\n", "header that names every column, not a comment.$"),
        ("comment.csv", "# by hand\nid,smiles\n1,CCO\n2,CCN\n", "not a comment. Text with ',' in it"),
        ("empty.csv", ",,\n1,CCO,x\n", "its first row is empty.*--no-header"),
    ],
)
def test_what_is_no_header_is_refused(tmp_path: Path, name: str, content: str, words: str) -> None:
    path = made(tmp_path / name, content)
    with pytest.raises(DataError, match=words):
        texts(path)
    if name == "excel.csv":
        path.write_text(content.split("\n", 1)[1])
        assert texts(path, delimiter=";") == ["CCO"]


@pytest.mark.parametrize(
    ("content", "header"),
    [
        ("smiles\n" + "\n".join(SMILES), True),
        ("\n".join(SMILES), False),  # not even the first molecule is lost
        ("CCO\nCCN\n", False),
        ("only\nCCO\n", True),
        ("mol,Class\nCCO,1\nCCN,0\n", True),
        ("CCO,1\nCCN,0\n", False),
        ("mol\nnot a molecule\n" + "\n".join(SMILES), True),
        ("\n".join([*SMILES, "not a molecule"]), False),
        (",0\n0,CCO\n1,CCN\n", True),  # pandas
        ("0,CCO\n1,CCN\n", False),
        ("sentence,label\nso good,1\nso bad,0\n", True),
        ("id,1,2\n0,0.5,0.7\n1,0.1,0.2\n", True),
        ("question,answer\nhow so,like that\nwhy this,for no reason\n", True),
        ("text\nbanana\n", True),
        ("id,name\n", True),
        ("gj04,1,,Our friends won't buy it.\ngj04,0,*,They will.\n", None),
        ("2019,2020\n1,2\n3,4\n", None),
        ("cat\ndog\nmouse\n", None),
        ("How are you?,Fine thanks\nAre you well?,Yes I am\n", None),
        ("CCO\n", None),
    ],
)
def test_a_header_is_told_or_asked_for(tmp_path: Path, content: str, header: bool | None) -> None:
    path = made(tmp_path / "a.csv", content)
    if header is None:
        with pytest.raises(DataError, match=r"names of columns, or data\? .*--no-header.*--column 1.*--column"):
            resolved(path, InputOptions())
        advised = InputOptions(header=False, column="1")
        assert len(list(read_rows(path, advised, "text"))) == len(content.splitlines())
        first = column_names(path, InputOptions(header=True))[0]
        assert len(list(read_rows(path, InputOptions(column=first, header=True), "text"))) == content.count("\n") - 1
        return
    assert resolved(path, InputOptions()).header is header
    rows = list(read_records(path, InputOptions()))
    assert len(rows) == len(content.splitlines()) - header
    assert resolved(path, resolved(path, InputOptions())) == resolved(path, InputOptions())


def test_columns_by_name_and_by_number(tmp_path: Path) -> None:
    path = made(tmp_path / "a.csv", "id,,smiles,id\n7,x,CCO,8\n9,y,CCN,10\n")
    assert column_names(path, InputOptions()) == ["id (1)", "2", "smiles", "id (4)"]
    assert texts(path, column="2") == ["x", "y"] and texts(path, column="4") == ["8", "10"]
    assert text_column(path, InputOptions(column="3"), "text") == "smiles"
    with pytest.raises(DataError, match=r"no column 'id'. Its columns: 'id \(1\)', '2', 'smiles', 'id \(4\)'"):
        texts(path, column="id")
    with pytest.raises(DataError, match="no column '5'"):
        texts(path, column="5")
    path = made(tmp_path / "b.csv", "2,smiles\nx,CCO\n")
    assert texts(path, column="2") == ["x"]  # a name comes before a number


@pytest.mark.parametrize(
    "content", ['[{"text": "a"},\n {"text": "b"}]\n', '[\n{"text": "a"}\n]', '{\n "text": "a"\n}', '[{"text": "a"}]']
)
def test_one_json_document_is_refused(tmp_path: Path, content: str) -> None:
    for name in ("a.json", "a.jsonl"):
        with pytest.raises(DataError, match="one JSON document, not JSON lines.*jq -c"):
            texts(made(tmp_path / name, content), "text")


def test_options_that_contradict_themselves() -> None:
    with pytest.raises(ConfigError, match="format = 'xls': must be one of csv"):
        InputOptions(format="xls")
    with pytest.raises(ConfigError, match="delimiter = ', ': must be one character, or tab"):
        InputOptions(delimiter=", ")
    with pytest.raises(ConfigError, match="--format txt has no columns"):
        InputOptions(format="txt", delimiter=";")
    assert InputOptions(delimiter="tab") == InputOptions(delimiter="\\t") == InputOptions(delimiter="\t")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = made(tmp_path / "a.smi", "CCO\n")
    assert expand_inputs(["~/*.smi"]) == expand_inputs(["~/a.smi"]) == [path]


def test_an_unknown_file_asks_for_its_format(tmp_path: Path) -> None:
    path = made(tmp_path / "notes", "some words\nand more\n")
    with pytest.raises(DataError, match="cannot read 'notes' files.*as in --format txt"):
        expand_inputs([str(path)])
    assert expand_inputs([str(path)], InputOptions(format="txt")) == [path]
    assert texts(path, "text", format="txt") == ["some words", "and more"]
