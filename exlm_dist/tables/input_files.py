"""Which files are read, and how: what the user says, what the name says, and what the content makes certain.

A guess is made only where the content leaves no doubt, and then said in a line of the log. Otherwise an error names the
option that settles it.
"""

from __future__ import annotations

import glob
import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from exlm_dist.tables.columns import kind_of, kind_of_column, suggestion, unique_names
from exlm_dist.tables.delimited import first_rows, width_without_header
from exlm_dist.tables.json_lines import refuse_documents
from exlm_dist.tables.other_formats import refuse_other_formats
from exlm_dist.tables.text_files import COMPRESSED, encoding, open_text
from exlm_dist.utils.errors import ConfigError, DataError
from exlm_dist.utils.logs import get_logger
from exlm_dist.utils.outputs import user_path

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
#: A column is of a kind, for telling a header, if this fraction of its values are: files have bad rows.
_MOST = 0.9
#: How many files have had the same said of them, and how many are named.
_said: Counter[str] = Counter()
_NAMED = 5


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
        path = user_path(item)
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
        refuse_other_formats(path, options.format)
        if options.format is None:
            file_format(path)
    return list(files)


def file_format(path: Path) -> str:
    """'csv', 'tsv', 'txt', 'smi', 'jsonl' or 'parquet': from the ending of the name without that of a compression, or
    from the content where that is certain. DataError if neither says it."""
    ending = _ending(path)
    form = ENDINGS.get(ending) or _format_of_content(path)
    if form is None:
        raise DataError(
            f"{path}: cannot read '{ending or path.name}' files; the name must end in one of {', '.join(ENDINGS)}, "
            f"which {' or '.join(COMPRESSED)} may follow, or --format must say what is in it, as in --format txt "
            f"({', '.join(FORMATS)})."
        )
    return form


def resolved(path: Path, options: InputOptions) -> InputOptions:
    """`options` with what the user has not said worked out: format, and of csv and tsv also delimiter and header.

    DataError names the option that settles what is not certain.
    """
    form = options.format or file_format(path)
    said = [] if options.format or _ending(path) in ENDINGS else [f"read as {form}"]
    if form != "parquet":
        if (code := encoding(path)) != "utf-8-sig":
            said.append(f"decoded as {code.upper()}")
        lines = head(path)
    if form in ("txt", "smi"):
        table = _table_in_lines(path, form, lines, options)
        said += [f"read as {table}: it has columns"] if table else []
        form = table or form
    options = replace(options, format=form)
    if form == "jsonl":
        refuse_documents(path, lines)
    if form in ("csv", "tsv"):
        options = replace(options, delimiter=options.delimiter or _delimiter(path, form, lines))
        header, why = _header(path, options)
        said += [why] if why else []
        options = replace(options, header=header)
    if said:
        _say_once(path, "; ".join(said))
    return options


def head(path: Path) -> list[str]:
    """The first lines that are not blank, without their ends, each up to `_LONGEST` characters."""
    with open_text(path) as file:
        lines = iter(lambda: file.readline(_LONGEST), "")
        return list(islice((line.rstrip("\r\n") for line in lines if line.strip()), _SAMPLE))


@lru_cache(maxsize=100_000)
def _say_once(path: Path, what: str) -> None:
    """Of many files of which there is the same to say, only the first are named."""
    _said[what] += 1
    if _said[what] <= _NAMED:
        more = " (and so on: further files are not listed)" if _said[what] == _NAMED else ""
        _log.info("%s: %s%s", path, what, more)


def _ending(path: Path) -> str:
    """The ending of the name without that of a compression, in lower case."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


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


def _table_in_lines(path: Path, form: str, lines: list[str], options: InputOptions) -> str | None:
    """'tsv' or 'csv' if a txt or smi file is a table: the user has named its delimiter, or a column that it has."""
    if options.delimiter is not None:
        return "tsv" if options.delimiter == "\t" else "csv"
    column, guess = options.column, options.format is None
    count = _columns(lines, "\t")
    names = lines[0].split("\t") if count > 1 else []
    if guess and column in (names if form == "txt" else names[1:]):
        return "tsv"
    if guess and count > 1 and form == "txt":
        raise DataError(
            f"{path}: each line has {count} columns with a tab between them (first: {lines[0][:80]!r}). For a table "
            "say --format tsv (and --column), for lines of text --format txt."
        )
    if column is not None and column.isdigit() and column != "1":
        raise DataError(
            f"{path}: {form} files have no column {column}. For a table say --format tsv (a tab between columns) or "
            f"--format csv (with --delimiter, if it is not a comma)."
        )
    return None


def _delimiter(path: Path, form: str, lines: list[str]) -> str:
    """That of the format. DataError if the header does not have it, but it and nearly all lines have another one."""
    own = "," if form == "csv" else "\t"
    if not lines or own in lines[0] or lines[0].lower().startswith("sep="):
        return own
    for other, name in DELIMITERS.items():
        count = lines[0].count(other)
        if count and sum(line.count(other) >= count for line in lines) > 0.9 * len(lines):
            raise DataError(
                f"{path}: its first line has no {DELIMITERS[own]}, but {name} between {count + 1} columns "
                f"({lines[0][:80]!r}). Say --delimiter {name}, or --delimiter {DELIMITERS[own]} if it has one column."
            )
    return own


def _header(path: Path, options: InputOptions) -> tuple[bool, str]:
    """(whether the first row is a header, what to say of it). DataError if that is not certain."""
    with open_text(path) as file:
        rows = first_rows(file, options.delimiter or ",", options.format == "csv", _SAMPLE)
    if rows:
        _refuse_ragged(path, rows, options)
    if options.header is not None or not rows:
        return options.header is not False, ""
    names = [name.strip() for name in rows[0]]
    known = [name.lower() for name in names]
    if any(name in ("text", "smiles") or name.endswith(("_smiles", " smiles")) for name in known):
        return True, ""
    if options.column in names and not str(options.column).isdigit():
        return True, ""
    return _header_by_kinds(path, names, rows[1:])


def _refuse_ragged(path: Path, rows: list[list[str]], options: InputOptions) -> None:
    """DataError if the first row names no column, or most of the others do not have its columns."""
    width = width_without_header(rows) if options.header is False else len(unique_names(rows[0]))
    if not width and options.header is not False:
        raise DataError(f"{path}: its first row is empty, so its columns have no names. If data, say --no-header.")
    if rows[0][0].lower().startswith("sep="):
        raise DataError(f"{path}: its first line is for Excel alone. Take it off: sed -i 1d {shlex.quote(str(path))}")
    ragged = [row for row in rows if len(row) < width or any(cell.strip() for cell in row[width:])]
    if len(ragged) <= len(rows) / 2:
        return
    name = DELIMITERS.get(options.delimiter or ",", repr(options.delimiter))
    advice = "The first row must be a header that names every column, not a comment."
    if options.format == "csv":
        advice += (
            f" Text with {name} in it must stand in double quotes; --delimiter says what else is between the columns "
            "(--delimiter tab, if each line is one text)."
        )
    raise DataError(
        f"{path}: its first row has {width} column(s), but {len(ragged)} of the next {len(rows) - 1} rows have not "
        f"(the first: {len(ragged[0])}, {ragged[0]!r:.80}). {advice}"
    )


def _header_by_kinds(path: Path, names: list[str], rows: list[list[str]]) -> tuple[bool, str]:
    """A header has words where the rows below have numbers, SMILES or sentences; data have SMILES where they have."""
    above, data = set(), set()
    for index, name in enumerate(names):
        below, own = kind_of_column([row[index] for row in rows if index < len(row)], _MOST), kind_of(name)
        if own == below and below in ("number", "molecule"):
            data.add(below)
        elif own != "missing" and (below in ("number", "molecule") or (below, own) == ("text", "word")):
            above.add(below)
    if above and "molecule" not in data:
        return True, ""
    if not above and "molecule" in data:
        return False, f"it has no header: its first row is data: {names[:10]}"
    if not rows and all(kind_of(name) in ("word", "text") for name in names):
        return True, ""
    raise DataError(
        f"{path}: does its first row have names of columns, or data? {names[:10]}. If data, say --no-header (the "
        f"columns then have numbers, as in --column 1); if names, the one to read, as in --column {_shell_word(names)}."
    )


def _shell_word(names: list[str]) -> str:
    """A name of `names` as it is typed."""
    return shlex.quote(next((name for name in names if name and not name.isdigit()), "NAME"))


def _missing(path: Path, item: str) -> str:
    if any(character in item for character in "*?["):
        return f"{item}: no file matches this pattern."
    names = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    return f"{item}: no such file{suggestion(path.name, names)}."
