"""Columns of a table: their names, the one that is asked for, and what kind of values they have."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exlm_dist.utils.errors import DataError

#: What tables write where a value is missing.
_MISSING = {"", "na", "n/a", "nan", "null", "none", "-", "?"}
_SMILES = re.compile(r"(?=.*[A-Za-z*])(?:\[[^\[\]\s]+\]|Br|Cl|[BCNOPSFIbcnops*]|[=#\-+\\/:~.()$<>]|%\d\d|\d)+")


def unique_names(header: Sequence[str]) -> list[str]:
    """Names of the columns below `header`: a column without a name gets its number from 1, and names that occur more
    than once get it in brackets. Nameless columns at the end are left out."""
    names = [name.strip() for name in header]
    while names and not names[-1]:
        names.pop()
    names = [name or str(number) for number, name in enumerate(names, 1)]
    counts = Counter(names)
    return [f"{name} ({number})" if counts[name] > 1 else name for number, name in enumerate(names, 1)]


def choose_column(path: Path, names: Sequence[str], asked: str | None, default: str = "") -> str:
    """The column `asked` for, by its name, or by its number from 1 where none has such a name; if None, the only column
    or the one called `default` in upper or lower case. DataError lists the columns and suggests a similar one."""
    if asked is not None:
        if asked in names:
            return asked
        if asked.isdigit() and 1 <= int(asked) <= len(names):
            return names[int(asked) - 1]
        raise DataError(f"{path}: has no column {asked!r}{suggestion(asked, names)}. Its columns: {listed(names)}.")
    if len(names) == 1:
        return names[0]
    matches = [name for name in names if name.strip().lower() == default]
    if len(matches) == 1:
        return matches[0]
    wanted = f" of the {default}" if default else ""
    raise DataError(f"{path}: name the column{wanted} with --column NAME. Its columns: {listed(names)}.")


def kind_of(value: str) -> str:
    """What a cell looks like: 'missing', 'number', 'molecule' (SMILES, as far as its characters tell), 'word' or 'text'
    (several words)."""
    value = value.strip()
    if value.lower() in _MISSING:
        return "missing"
    try:
        float(value)
        return "number"
    except ValueError:
        pass
    if _SMILES.fullmatch(value):
        return "molecule"
    return "text" if len(value.split(None, 1)) > 1 else "word"


def kind_of_column(values: Sequence[str], least: float = 1.0) -> str:
    """The kind of those `values` that are not missing, or at least of the fraction `least` of them; else 'mixed'."""
    kinds = Counter(kind_of(value) for value in values)
    del kinds["missing"]
    kind, count = max(kinds.items(), key=lambda item: item[1], default=("mixed", 0))
    return kind if count >= least * kinds.total() else "mixed"


def as_text(value: Any) -> str | None:
    """A value as the text of a cell: null and NaN as None, bytes as UTF-8, lists and objects as JSON, as which true and
    false are written too."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, (bool, list, dict)):
        return json.dumps(value, ensure_ascii=False, default=as_text)
    return str(value)


def suggestion(wrong: str, names: Sequence[str]) -> str:
    """' (did you mean ...?)' with the most similar of `names`, if one is similar."""
    lowered = {name.lower(): name for name in names}
    near = difflib.get_close_matches(wrong.lower(), list(lowered), n=1)
    return f" (did you mean {lowered[near[0]]!r}?)" if near else ""


def listed(names: Sequence[str], limit: int = 30) -> str:
    """The first `limit` names in quotes, and how many more there are."""
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
