"""`exlm prepare --dry-run`: what was understood of each input file, and what would become of its first rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from exlm_dist.data.random_smiles import RandomSmiles
from exlm_dist.prepare.folder import check_out, read_forms
from exlm_dist.prepare.smiles import clean_rows, given_tokenizer, policy_for
from exlm_dist.prepare.tally import reasons
from exlm_dist.tables.columns import listed
from exlm_dist.tables.input_files import DELIMITERS, InputOptions
from exlm_dist.tables.records import Row, column_names, read_rows, text_column
from exlm_dist.tables.text_files import compression, encoding
from exlm_dist.utils.outputs import user_path

#: Rows of a file that are judged, and how many are shown; files that are described one by one.
ROWS, SHOWN, FILES = 1000, 3, 20
#: A row to what it becomes, and why it would be set aside, or ''.
Judge = Callable[[Row], tuple[str, str]]


def preview_smiles(
    inputs: Sequence[str],
    out: Path | str,
    *,
    options: InputOptions,
    max_length: int,
    max_rejected: float,
    stereo: str | None = None,
    salts: str | None = None,
    valid_inputs: Sequence[str] = (),
    tokenizer: str | None = None,
    random_smiles: int = 0,
    random_seed: int = 0,
    overwrite: bool = False,
    **_: Any,
) -> str:
    """What `prepare_smiles` with the same arguments would do with each file; nothing is written. The same errors."""
    RandomSmiles(random_smiles, random_seed)  # refuses what cannot be
    policy = policy_for(None if tokenizer is None else given_tokenizer(user_path(tokenizer)), stereo, salts)

    def judge(row: Row) -> tuple[str, str]:
        (cleaned,) = clean_rows(policy, max_length, [row])
        return ("", cleaned.text) if cleaned.unusable else (cleaned.text, "")

    check_out(user_path(out), overwrite)
    return _preview([*inputs, *valid_inputs], options, "smiles", judge, max_rejected)


def preview_text(
    inputs: Sequence[str],
    out: Path | str,
    *,
    options: InputOptions,
    max_rejected: float,
    valid_inputs: Sequence[str] = (),
    overwrite: bool = False,
    **_: Any,
) -> str:
    """The same for `prepare_text`."""

    def judge(row: Row) -> tuple[str, str]:
        text = " ".join(row.text.split())
        return text, row.problem or ("" if text else "empty")

    check_out(user_path(out), overwrite)
    return _preview([*inputs, *valid_inputs], options, "text", judge, max_rejected)


def _preview(
    inputs: Sequence[str], options: InputOptions, default_column: str, judge: Judge, max_rejected: float
) -> str:
    forms = read_forms(inputs, options, default_column)
    lines = []
    for path, form in islice(forms.items(), FILES):
        lines += [f"{path}: {_described(path, form, default_column)}"]
        lines += [f"  {line}" for line in _judged(path, form, default_column, judge, max_rejected)]
    if len(forms) > FILES:
        lines.append(f"and {len(forms) - FILES:,} more files, whose columns are there")
    return "\n".join([*lines, "dry run: nothing was written"])


def _described(path: Path, form: InputOptions, default_column: str) -> str:
    parts = [str(form.format)]
    if packed := compression(path):
        parts.append(f"compressed ({packed})")
    if form.format != "parquet":
        parts.append(encoding(path).upper().removesuffix("-SIG"))
    if form.format in ("csv", "tsv"):
        delimiter = form.delimiter or ","
        parts.append(f"{DELIMITERS.get(delimiter, repr(delimiter))} between columns")
        parts.append("no header" if form.header is False else "header")
    if form.format not in ("txt", "smi"):
        names = column_names(path, form)
        parts.append(f"column {text_column(path, form, default_column)!r} of {listed(names, 10)}")
    return ", ".join(parts)


def _judged(path: Path, form: InputOptions, default_column: str, judge: Judge, max_rejected: float) -> Iterator[str]:
    """Lines on the first rows; blank lines of txt files are no rows."""
    rows = (
        row for row in read_rows(path, form, default_column) if form.format != "txt" or row.problem or row.text.strip()
    )
    judged = [(row, *judge(row)) for row in islice(rows, ROWS)]
    for row, text, _ in [item for item in judged if not item[2]][:SHOWN]:
        yield f"row {row.row}: {text[:100]!r}"
    aside = [(row, reason) for row, _, reason in judged if reason]
    counts = Counter(reason.split(":")[0] for _, reason in aside)
    yield f"of the first {len(judged):,} rows {len(judged) - len(aside):,} would be kept, {len(aside):,} set aside" + (
        f" ({reasons(counts)})" if aside else ""
    )
    for row, reason in aside[:SHOWN]:
        yield f"row {row.row} would be set aside: {reason}: {row.text[:80]!r}"
    if len(aside) > max_rejected * len(judged):
        yield f"that is more than --max-rejected {max_rejected:g} allows"
