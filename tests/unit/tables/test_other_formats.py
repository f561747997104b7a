"""Files of formats that are not read are known by their content, and the advice that is given makes readable ones."""

import gzip
import io
import re
import shlex
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from exlm_dist.tables.input_files import InputOptions, expand_inputs
from exlm_dist.utils.errors import DataError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PAGE = b"\xef\xbb\xbf\n<!DOCTYPE html><html><head><title>Log in</title></head></html>\n"


def packed(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("table.csv", "smiles\nCCO\n")
    else:
        with tarfile.open(fileobj=buffer, mode=kind) as archive:
            archive.addfile(tarfile.TarInfo("a.txt"))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("corpus.txt", POINTER, "git lfs pull"),
        ("table.parquet", POINTER, "git lfs pull"),
        ("table.csv", PAGE, "a web page"),
        ("table.csv", "zip", "unzip"),
        ("sheet.xlsx", "zip", "save the sheet as CSV"),
        ("shards.tar", "w", "exlm data index"),
        ("table.csv.tar.gz", "w:gz", "tar -xf"),
        ("table.csv", b"SQLite format 3\0", "sqlite3 -header"),
        ("a.txt", b"%PDF-1.7\n", "pdftotext"),
        ("a.csv", b"\x89HDF\r\n", "HDF5"),
        ("old.xls", b"\xd0\xcf\x11\xe0", "Save it as CSV"),
    ],
)
def test_other_content_is_refused_with_what_to_do(tmp_path, name, content, what):
    path = tmp_path / name
    # Archives carry the time at which they were made, so they are made here: a test's name must not depend on it.
    path.write_bytes(packed(content) if isinstance(content, str) else content)
    for options in (InputOptions(), InputOptions(format="csv")):
        with pytest.raises(DataError, match=re.escape(what)) as caught:
            expand_inputs([str(path)], options)
        assert str(caught.value).startswith(f"{path}: its content is ")


def test_pages_may_be_texts(tmp_path):
    (tmp_path / "page.txt").write_bytes(PAGE)
    (tmp_path / "page").write_bytes(PAGE)
    assert expand_inputs([str(tmp_path / "page.txt")]) == [tmp_path / "page.txt"]
    assert expand_inputs([str(tmp_path / "page")], InputOptions(format="txt")) == [tmp_path / "page"]


def follow(message: str, start: str, folder: Path) -> None:
    """Run the command that the message ends with."""
    line = message[message.index(start) :].replace("python -c", f"{shlex.quote(sys.executable)} -c")
    subprocess.run(["bash", "-c", line], cwd=folder, check=True, timeout=120)


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        expand_inputs([str(path)])
    return str(caught.value)


def test_the_advice_on_arrow_works(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is an extra")
    import pyarrow.feather
    import pyarrow.parquet

    table = arrow.table({"smiles": ["CCO", "CCN"]})
    pyarrow.feather.write_feather(table, tmp_path / "a b.feather")
    with arrow.ipc.new_stream(tmp_path / "data.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("a b.feather", "data.arrow"):
        follow(refusal(tmp_path / name), "python -c", tmp_path)
        assert pyarrow.parquet.read_table(tmp_path / f"{name}.parquet") == table


def test_the_advice_on_structures_works(tmp_path):
    from rdkit import Chem

    blocks = "".join(f"{Chem.MolToMolBlock(Chem.MolFromSmiles(smiles))}$$$$\n" for smiles in ("CCO", "CCN"))
    (tmp_path / "some.sdf.gz").write_bytes(gzip.compress(blocks.encode()))
    follow(refusal(tmp_path / "some.sdf.gz"), "gzip -dcf", tmp_path)
    assert (tmp_path / "molecules.smi").read_text().split() == ["CCO", "CCN"]
