"""Which files are read, and how: what the user says, what the name says, and what the content makes certain.

A guess is made only where the content leaves no doubt, and then said in a line of the log. Otherwise an error names the
option that settles it.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from exlm_dist.tables.columns import kind_of, kind_of_column, suggestion
from exlm_dist.tables.delimited import first_rows
from exlm_dist.tables.json_lines import refuse_documents
from exlm_dist.tables.text_files import COMPRESSED, encoding, open_text
from exlm_dist.utils.errors import ConfigError, DataError
from exlm_dist.utils.logs import get_logger

_log = get_logger(__name__)
FORMATS = ("csv", "tsv", "txt", "smi", "jsonl", "parquet")
ENDINGS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".txt": "txt",
    ".text": "txt",
    ".smi": "smi",
    ".smiles": "smi",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
#: Delimiters that files have besides that of their format, and how each is named on the command line.
DELIMITERS = {",": "','", ";": "';'", "\t": "tab", "|": "'|'"}
#: Rows and lines from which a file's form is worked out, and the longest part of a line that is looked at.
_SAMPLE, _LONGEST = 50, 1 << 20


@dataclass(frozen=True)
class InputOptions:
    """What a user may say of an input; None: worked out where it is certain, and said.

    column: its name, or its number from 1 where the file has no such name. format: one of `FORMATS`. delimiter: one
    character, or 'tab'. header: whether the first row of csv or tsv holds the names of the columns.
    """

    column: str | None = None
    format: str | None = None
    delimiter: str | None = None
    header: bool | None = None

    def __post_init__(self) -> None:
        if self.format is not None and self.format not in FORMATS:
            raise ConfigError(f"format = {self.format!r}: must be one of {', '.join(FORMATS)}.")
        if self.delimiter in ("tab", "\\t"):
            object.__setattr__(self, "delimiter", "\t")
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n'):
            raise ConfigError(f"delimiter = {self.delimiter!r}: must be one character, or tab.")
        if self.delimiter is not None and self.format in ("txt", "smi"):
            raise ConfigError(f"--format {self.format} has no columns: with --delimiter, say --format csv.")

    def given(self) -> dict[str, Any]:
        """What the user has said, by name; the column in any case."""
        return {"column": self.column, **{name: value for name, value in asdict(self).items() if value is not None}}


def expand_inputs(inputs: Sequence[str], options: InputOptions = InputOptions()) -> list[Path]:
    """The files that paths and patterns name, in the order given, those of one pattern sorted. DataError if missing."""
    files: dict[Path, None] = {}
    for item in inputs:
        path = Path(item).expanduser()
        if path.is_dir():
            raise DataError(
                f"{item}: is a folder; name files, or quote a pattern such as '{item.rstrip('/')}/*.smi.gz'."
            )
        names = [path] if path.is_file() else map(Path, sorted(glob.glob(str(path), recursive=True)))
        found = [name for name in names if name.is_file()]
        if not found:
            raise DataError(_missing(path, item))
        files.update(dict.fromkeys(found))
    if not files:
        raise DataError("no input file given.")
    for path in files:
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty.")
        if options.format is None:
            file_format(path)
    return list(files)


def file_format(path: Path) -> str:
    """'csv', 'tsv', 'txt', 'smi', 'jsonl' or 'parquet': from the ending of the name without that of a compression, or
    from the content where that is certain. DataError if neither says it."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    found = ENDINGS.get(suffix) or _format_of_content(path)
    if found is None:
        raise DataError(
            f"{path}: cannot read '{suffix or path.name}' files; the name must end in one of {', '.join(ENDINGS)}, "
            f"which {' or '.join(COMPRESSED)} may follow, or --format must say what is in it, as in --format txt "
            f"({', '.join(FORMATS)})."
        )
    return found


def resolved(path: Path, options: InputOptions) -> InputOptions:
    """`options` with what the user has not said worked out: format, and of csv and tsv also delimiter and header.

    DataError names the option that settles what is not certain.
    """
    form = options.format or file_format(path)
    said = [] if options.format or _named(path) else [f"read as {form}"]
    if form == "parquet":
        return _said(path, replace(options, format=form), said)
    if (kind := encoding(path)) != "utf-8-sig":
        said.append(f"decoded as {kind.upper()}")
    lines = head(path)
    if form in ("txt", "smi") and options.format is None:
        table = _format_of_lines(path, form, lines, options)
        said += [f"read as {table}: it has columns"] if table != form else []
        form = table
    if form == "jsonl":
        refuse_documents(path, lines)
    if form not in ("csv", "tsv"):
        return _said(path, replace(options, format=form), said)
    delimiter = options.delimiter or _delimiter(path, form, lines)
    header = options.header
    if header is None:
        with open_text(path) as file:
            rows = first_rows(file, delimiter, form == "csv", _SAMPLE)
        header = _has_header(path, rows, options.column)
        said += [] if header else [f"no header: {rows[0]!r} are data"]
    return _said(path, replace(options, format=form, delimiter=delimiter, header=header), said)


def head(path: Path) -> list[str]:
    """The first lines that are not blank, without their ends, each up to `_LONGEST` characters."""
    with open_text(path) as file:
        lines = iter(lambda: file.readline(_LONGEST), "")
        return list(islice((line.rstrip("\r\n") for line in lines if line.strip()), _SAMPLE))


def _said(path: Path, options: InputOptions, said: list[str]) -> InputOptions:
    if said:
        _log.info("%s: %s", path, "; ".join(said))
    return options


def _named(path: Path) -> bool:
    return any(suffix.lower() in ENDINGS for suffix in path.suffixes[-2:])


def _format_of_content(path: Path) -> str | None:
    """The format of a file whose name does not say it, if there is no doubt."""
    with open(path, "rb") as file:
        if file.read(4) == b"PAR1":
            return "parquet"
    lines = head(path)
    if lines and all(_is_object(line) for line in lines):
        return "jsonl"
    return "tsv" if _columns(lines, "\t") > 1 else None


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _columns(lines: Sequence[str], delimiter: str) -> int:
    """Into how many columns each of at least two lines is split, 1 if not all into the same number."""
    counts = {line.count(delimiter) for line in lines}
    return counts.pop() + 1 if len(counts) == 1 and len(lines) > 1 else 1


def _format_of_lines(path: Path, form: str, lines: list[str], options: InputOptions) -> str:
    """The format of a txt or smi file: tsv if its lines have columns, one of which the user has named."""
    if options.delimiter is not None:
        return "tsv" if options.delimiter == "\t" else "csv"
    column = options.column
    count = _columns(lines, "\t")
    names = lines[0].split("\t") if lines else []
    if count > 1 and column is not None and column in names:
        return "tsv"
    if count > 1 and form == "txt":
        raise DataError(
            f"{path}: each line has {count} columns with a tab between them (first: {lines[0][:80]!r}). For a table "
            "say --format tsv (and --column), for lines of text --format txt."
        )
    if column is not None and column.isdigit() and column != "1":
        raise DataError(
            f"{path}: {form} files have no column {column}. For a table say --format tsv (a tab between columns) or "
            f"--format csv with --delimiter; without --column, {'the first word' if form == 'smi' else 'all'} of each "
            "line is read."
        )
    return form


def _delimiter(path: Path, form: str, lines: list[str]) -> str:
    """That of the format. DataError if the header does not have it, but it and nearly all lines have another one."""
    own = "," if form == "csv" else "\t"
    if not lines or own in lines[0]:
        return own
    for other, name in DELIMITERS.items():
        count = lines[0].count(other)
        if count and sum(line.count(other) >= count for line in lines) > 0.9 * len(lines):
            raise DataError(
                f"{path}: its first line has no {DELIMITERS[own]}, but {name} between {count + 1} columns "
                f"({lines[0][:80]!r}). Say --delimiter {name}, or --delimiter {DELIMITERS[own]} if it has one column."
            )
    return own


def _has_header(path: Path, rows: list[list[str]], column: str | None) -> bool:
    """Whether the first row holds names: it has that of a column that is looked for, or the values below are numbers,
    SMILES or sentences where it has none. DataError if that is not certain."""
    if not rows:
        return True
    names = [name.strip() for name in rows[0]]
    lowered = [name.lower() for name in names]
    if any(name in ("text", "smiles") or name.endswith(("_smiles", " smiles")) for name in lowered):
        return True
    if column is not None and not column.isdigit() and column in names:
        return True
    names_above, data_above = set(), set()
    for index, name in enumerate(names):
        below, own = kind_of_column([row[index] for row in rows[1:] if index < len(row)]), kind_of(name)
        if own == below and below in ("number", "molecule"):
            data_above.add(below)
        elif own != "missing" and (below in ("number", "molecule") or (below, own) == ("text", "word")):
            names_above.add(below)
    if "molecule" in data_above and not names_above:
        return False
    if names_above and "molecule" not in data_above:
        return True
    if len(rows) == 1 and all(kind_of(name) in ("word", "text") for name in names):
        return True
    raise DataError(
        f"{path}: does its first row have names of columns, or data? {rows[0][:10]!r}. If data, say --no-header (the "
        f"columns then have numbers, as in --column 1); if names, the one to read, as in --column {_quoted(names)}."
    )


def _quoted(names: list[str]) -> str:
    name = next((name for name in names if name and not name.isdigit()), "NAME")
    return "'" + name.replace("'", "'\\''") + "'"


def _missing(path: Path, item: str) -> str:
    if any(character in item for character in "*?["):
        return f"{item}: no file matches this pattern."
    names = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    return f"{item}: no such file{suggestion(path.name, names)}."
