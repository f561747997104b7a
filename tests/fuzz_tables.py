"""Random tables, encodings, compressions and damage through every reader of `exlm_dist.tables`: nothing is lost without
being counted.

    python tests/fuzz_tables.py --seconds 3600

`tests/unit/tables/test_table_fuzz.py` runs some seconds of it. The slow, obvious reader is the table itself: a file is
written from cells that are known, so what it holds needs no reader. Each row has a mark in its text that no other has.
A table that is whole must come back cell by cell; of one that is damaged, each mark must be in what was read or in what
was set aside, and rows that the damage does not touch must be as they were. All but rows or a `UserError` fails.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import io
import json
import lzma
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
from locations import ROOT

sys.path.insert(0, str(ROOT))

from exlm_dist.tables.records import InputOptions, read_records, read_rows, resolved, text_column  # noqa: E402
from exlm_dist.utils.errors import UserError  # noqa: E402

FORMATS = ("csv", "tsv", "txt", "smi", "jsonl", "parquet")
DELIMITERS = {"csv": ",;|\t:", "tsv": "\t"}
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32")
PACKINGS = ("", ".gz", ".bz2", ".xz", ".zst")
PIECES = ["CCO", "c1ccccc1", "two words", "1", "2.5", "-3e5", "naïve", "日本語", "😀", "'", "\\", "\\n", "{}", "[1]"]
PIECES += ["null", "nan", "#", "=", "\x85", "\u2028", "\ufeff", "\x1c", "  ", "|", ";", ",", "\t", ":", '"', '""']
PIECES += ["\n", "\r\n", "\r"]
#: Kinds of damage, and the formats to which each does something.
DAMAGES = {
    "": (),
    "quote": ("csv",),
    "cell more": ("csv", "tsv"),
    "cell less": ("csv", "tsv"),
    "cut line": ("csv", "tsv", "jsonl"),
    "bytes": ("csv", "tsv", "txt", "smi", "jsonl"),
    "nul": ("csv", "tsv", "txt", "smi", "jsonl"),
    "cut file": FORMATS,
}


@dataclass(frozen=True)
class Table:
    """A table and how it is written. `texts`: what a reader must return of each row; `other`: a second column."""

    format: str
    texts: list[str]
    other: list[str]
    delimiter: str
    header: bool
    line_end: str
    encoding: str
    packing: str
    quoted: bool  # also cells that need no quotes
    damage: str
    damaged: int  # the row that it hits


@st.composite
def tables(draw: st.DrawFn) -> Table:
    """Any table that can be written in its format."""
    form = draw(st.sampled_from(FORMATS))
    delimiter = draw(st.sampled_from(DELIMITERS.get(form, ",")))
    forbidden = {"tsv": "\t\r\n", "txt": "\r\n", "smi": ""}.get(form, "")
    pieces = [piece for piece in PIECES if not set(piece) & set(forbidden)]
    if form == "smi":  # one word
        pieces = [piece for piece in pieces if piece.split() == [piece]]
    cells = st.lists(st.sampled_from(pieces), max_size=4).map("".join)
    count = draw(st.integers(1, 12))
    texts = [f"<{n}>" + draw(cells) for n in range(count)]
    if form == "txt":
        texts = [text for text in texts if text.strip()]
    others = [draw(cells) for _ in texts]
    return Table(
        form,
        texts,
        others,
        delimiter,
        draw(st.booleans()),
        draw(st.sampled_from(["\n", "\r\n", "\r"])),
        "utf-8" if form == "parquet" else draw(st.sampled_from(ENCODINGS)),
        "" if form == "parquet" else draw(st.sampled_from(PACKINGS)),
        draw(st.booleans()),
        draw(st.sampled_from(list(DAMAGES))),
        draw(st.integers(0, count - 1)),
    )


def content(table: Table) -> bytes:
    """The file, damaged as the table says."""
    if table.format == "parquet":
        return _cut(_parquet(table), table)
    lines = [_line(table, text, other) for text, other in zip(table.texts, table.other)]
    if table.damage in ("quote", "cell more", "cell less", "cut line") and not is_whole(table):
        lines[table.damaged] = _damaged_line(table)
    if table.header and table.format in ("csv", "tsv", "smi"):
        lines.insert(0, "smiles" if table.format == "smi" else table.delimiter.join(["id", "text"]))
    data = "".join(line + table.line_end for line in lines).encode(table.encoding)
    if table.damage in ("bytes", "nul") and not is_whole(table):
        mark = f"<{table.damaged}>".encode()
        data = data.replace(mark, mark + (b"\xff\xfe" if table.damage == "bytes" else b"\0"), 1)
    return _cut(_packed(data, table.packing), table)


def _line(table: Table, text: str, other: str) -> str:
    if table.format == "jsonl":
        return json.dumps({"id": other, "text": text}, ensure_ascii=table.quoted)
    if table.format == "txt":
        return text
    if table.format == "smi":
        return f"{text} {other}".rstrip() if other.strip() else text
    return table.delimiter.join(_cell(table, value) for value in (other, text))


def _cell(table: Table, value: str) -> str:
    needed = bool(set(value) & {table.delimiter, '"', "\r", "\n"})
    return '"' + value.replace('"', '""') + '"' if table.format == "csv" and (needed or table.quoted) else value


def _damaged_line(table: Table) -> str:
    text, other = table.texts[table.damaged], table.other[table.damaged]
    line = _line(table, text, other)
    if table.damage == "quote":
        return f'{line}"' if table.damaged % 2 else f'"{line}'
    if table.damage == "cell more":
        return f"{line}{table.delimiter}more"
    if table.damage == "cell less":
        return _cell(table, text)
    return line[: line.index(">") + 1]


def _packed(data: bytes, packing: str) -> bytes:
    if packing == ".zst":
        import zstandard

        return zstandard.ZstdCompressor().compress(data)
    packers: dict[str, Any] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    return packers[packing](data) if packing else data


def _parquet(table: Table) -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"id": table.other, "text": table.texts}), file)
    return file.getvalue()


def _cut(data: bytes, table: Table) -> bytes:
    return data[: max(1, len(data) * (table.damaged + 1) // 13)] if table.damage == "cut file" else data


def is_whole(table: Table) -> bool:
    """Whether the file is not damaged."""
    of_bytes = table.damage in ("bytes", "nul") and not table.encoding.startswith("utf-8")
    return of_bytes or table.format not in DAMAGES[table.damage]


def check(table: Table, folder: Path) -> str:
    """AssertionError if a row is lost; what came of the table, in a word."""
    path = folder / f"table.{table.format}{table.packing}"
    path.write_bytes(content(table))
    is_table = table.format in ("csv", "tsv")
    options = InputOptions(
        column=None if table.format in ("txt", "smi") else "text" if table.header or not is_table else "2",
        format=table.format,
        delimiter=table.delimiter if is_table else None,
        header=None if table.header or not is_table else False,
    )
    whole = is_whole(table)
    try:
        form = resolved(path, options)
        assert resolved(path, form) == form
        rows = list(read_rows(path, options, "text"))
        column = text_column(path, options, "text")
        records = list(read_records(path, replace(options, column=column)))
    except UserError:
        assert not whole, "a table that is whole is refused"
        return "refused"
    _check_records(table, rows, records, column)
    if table.damage == "cut file" and not whole:
        assert not table.packing, "a compressed file that was cut off is read as whole"
        return "cut"
    if (
        not whole
        and table.format in ("csv", "tsv")
        and table.damaged == 0
        and not table.header
        and len(table.texts) < 3
    ):
        return "of unknown width"  # which row has too many cells?
    lines = "".join(_line(table, *row) for row in zip(table.texts, table.other))
    if not whole and table.format == "csv" and table.damage == "quote" and set(lines) & set("\r\n"):
        # What lies between a stray quote and that of a later field over several lines may be a well-formed field too.
        cells = [row.text for row in rows] + [str(value) for record in records for value in record.values.values()]
        assert all(any(f"<{n}>" in cell for cell in cells) for n in range(len(table.texts))), "a row is nowhere"
        return "of two readings"
    _check_marks(table, rows)
    _check_others(table, rows, whole)
    return "whole" if whole else "damaged"


def _check_records(table: Table, rows: list[Any], records: list[Any], column: str) -> None:
    """Both ways to read a file agree, but for blank lines of txt files, which are no records."""
    if table.format == "txt":
        rows = [row for row in rows if row.text.strip() or row.problem]
    assert [(row.row, bool(row.problem)) for row in rows] == [(row.row, bool(row.problem)) for row in records]
    for row, record in zip(rows, records):
        assert row.problem or (record.values.get(column) or "") == row.text


def _check_marks(table: Table, rows: list[Any]) -> None:
    """Each row of the table is in what was read or in what was set aside, once, and in its place."""
    found = [n for row in rows for n in range(len(table.texts)) if f"<{n}>" in row.text]
    assert found == list(range(len(table.texts))), f"rows {found} of {len(table.texts)}"


def _check_others(table: Table, rows: list[Any], whole: bool) -> None:
    """Rows that the damage does not touch are as they were. (Quoted text over several lines may be taken for a stray
    quote, and a stray quote for the beginning of a text that ends at the next quote.)"""
    lines = "".join(_line(table, *row) for row in zip(table.texts, table.other))
    if table.format == "csv" and (set(lines) & set("\r\n") or (table.damage == "quote" and '"' in lines)):
        return
    expected = [text for n, text in enumerate(table.texts) if whole or f"<{table.damaged}>" not in text]
    read = [row.text for row in rows if not row.problem and (whole or f"<{table.damaged}>" not in row.text)]
    assert read == expected
    assert not whole or len(rows) == len(read)


def main() -> None:
    """Check random tables for `--seconds`, and print what came of how many."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="how long to go on")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first tables")
    options = parser.parse_args()
    outcomes: Counter[str] = Counter()
    end, seed = time.monotonic() + options.seconds, options.seed
    with tempfile.TemporaryDirectory() as folder:

        @hypothesis.given(tables())
        @hypothesis.settings(max_examples=200, deadline=None, database=None)
        def round_of_tables(table: Table) -> None:
            outcomes[f"{table.format}: {check(table, Path(folder))}"] += 1

        while time.monotonic() < end:
            print(f"seed {seed}: {outcomes.total():,} tables so far", flush=True)
            hypothesis.seed(seed)(round_of_tables)()
            seed += 1
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:10,}  {outcome}")


if __name__ == "__main__":
    main()
