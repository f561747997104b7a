"""Files of formats that are not read here, known by their content, and the command that makes readable ones of them.

They come under any name: a spreadsheet saved as `.csv`, the page of a log-in instead of the download, the pointer that
a clone without Git LFS has in place of the data.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from exlm_dist.tables.text_files import open_binary
from exlm_dist.utils.errors import DataError

_HEAD = 512
#: What the decompressed content begins with (at a byte), what that is, and what to do with FILE.
_CONTENT: list[tuple[int, bytes, str, str]] = [
    (
        0,
        b"version https://git-lfs.github.com/spec/",
        "the pointer of Git LFS to a file, not the file",
        "Fetch it in its repository: git lfs pull",
    ),
    (0, b"PK\x03\x04", "a zip archive or a spreadsheet", "Unpack it: unzip FILE   (or save the sheet as CSV)."),
    (
        257,
        b"ustar",
        "a tar archive",
        "Unpack it: tar -xf FILE   (WebDataset shards are read as they are: exlm data index).",
    ),
    (
        0,
        b"ARROW1\0\0",
        "an Arrow file (feather)",
        "Make it parquet: python -c 'import sys, pyarrow.feather as f, pyarrow.parquet as p; "
        'p.write_table(f.read_table(sys.argv[1]), sys.argv[1] + ".parquet")\' FILE',
    ),
    (
        0,
        b"\xff\xff\xff\xff",
        "an Arrow stream (as `datasets` caches it)",
        "Make it parquet: python -c 'import sys, pyarrow as a, pyarrow.parquet as p; "
        'p.write_table(a.ipc.open_stream(sys.argv[1]).read_all(), sys.argv[1] + ".parquet")\' FILE',
    ),
    (0, b"\x89HDF", "an HDF5 file", "Write the column of interest to a csv file."),
    (0, b"SQLite format 3\0", "an SQLite database", "Write it as csv: sqlite3 -header -csv FILE 'select ...'"),
    (0, b"%PDF", "a PDF document", "Take its text out first: pdftotext FILE"),
    (0, b"\xd0\xcf\x11\xe0", "an old Excel or Word file", "Save it as CSV or text."),
]
_PAGE = (b"<!doctype html", b"<html")
_STRUCTURES = (
    "gzip -dcf FILE | python -c 'import sys; from rdkit import Chem; [print(Chem.MolToSmiles(m)) for m in "
    "Chem.ForwardSDMolSupplier(sys.stdin.buffer) if m]' > molecules.smi"
)


def refuse_other_formats(path: Path, form: str | None) -> None:
    """DataError, with what to do, if the content of `path` is of a format that is not read. `form`: what the user says
    that it is; a web page is refused unless it is read as txt."""
    with open_binary(path) as file:
        head = file.read(_HEAD)
    if form is None and {".sdf", ".mol"} & {suffix.lower() for suffix in path.suffixes}:
        _refuse(path, "structures", f"Make SMILES of them: {_STRUCTURES}")
    for offset, magic, what, advice in _CONTENT:
        if head[offset:].startswith(magic):
            _refuse(path, what, advice)
    is_text = form == "txt" or (form is None and ".txt" in path.suffixes)
    if not is_text and head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_PAGE):
        _refuse(path, "a web page", "Look at it in a browser: the download may want a log-in, or be elsewhere.")


def _refuse(path: Path, what: str, advice: str) -> None:
    raise DataError(f"{path}: its content is {what}. {advice.replace('FILE', shlex.quote(str(path)))}")
