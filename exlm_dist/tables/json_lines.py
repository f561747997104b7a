"""JSON lines: one object a line. The fields of an object inside another have dotted names (`meta.url`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from exlm_dist.tables.columns import as_text
from exlm_dist.utils.errors import DataError

#: The columns are the fields of the first so many lines.
SAMPLE = 1000
#: Name of the only column of a file whose lines are strings.
BARE = "text"


class JsonLines:
    """A file of JSON lines. names: the fields of its first lines, in the order in which they appear."""

    def __init__(self, path: Path, file: TextIO):
        items = _items(path, file)
        self._head = list(islice(items, SAMPLE))
        self._rest = items
        objects = [item for _, item, _, _ in self._head if isinstance(item, dict)]
        self.names = list(dict.fromkeys(name for item in objects for name in flattened(item)))
        self.not_text: dict[str, str] = {}
        self._bare = not self.names
        if self._bare:
            self.names = [BARE]

    def texts(self, column: str) -> Iterator[tuple[int, str | None, str]]:
        """(number, text, problem) of each line; with a problem, the text is the line itself."""
        for number, item, problem, raw in self._items():
            if isinstance(item, str):
                yield number, item, ""
                continue
            if not problem:
                text, problem = _text(item, column)
            yield (number, raw, problem) if problem else (number, text, "")

    def records(self, text: str | None) -> Iterator[tuple[int, dict[str, str | None], str, str]]:
        """(number, values, problem, the line itself if there is a problem) of each line. `text`: the field without
        which a line cannot be used."""
        for number, item, problem, raw in self._items():
            values: dict[str, str | None] = dict.fromkeys(self.names)
            if isinstance(item, str):
                if text is not None or self._bare:
                    values[text or BARE] = item
                else:
                    problem = "not a JSON object with named fields"
            elif not problem:
                values.update((name, as_text(value)) for name, value in flattened(item).items())
                problem = _text(item, text)[1] if text is not None else ""
            yield number, values, problem, raw if problem else ""

    def _items(self) -> Iterator[tuple[int, Any, str, str]]:
        return chain(self._head, self._rest)


def flattened(item: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of an object, those of objects inside it under dotted names."""
    fields: dict[str, Any] = {}
    for name, value in item.items():
        if isinstance(value, dict) and value:
            fields.update(flattened(value, f"{prefix}{name}."))
        else:
            fields[prefix + name] = value
    return fields


def _text(item: dict[str, Any], name: str) -> tuple[str | None, str]:
    """(text, problem) of the field `name`, or of the field in inner objects that a dotted name leads to."""
    value: Any = item
    for part in [name] if name in item else name.split("."):
        if not isinstance(value, dict) or part not in value:
            return None, f"no field: {name!r}"
        value = value[part]
    if isinstance(value, (list, dict)):
        return None, f"not text: {'a list' if isinstance(value, list) else 'an object'} in {name!r}"
    return as_text(value), ""


def _items(path: Path, file: TextIO) -> Iterator[tuple[int, Any, str, str]]:
    """(number, object or string or None, problem, the line) of the lines that are not blank."""
    for number, line in enumerate(file, 1):
        raw = line.strip()
        if not raw:
            continue
        try:
            item = json.loads(raw)
        except (ValueError, RecursionError):
            yield number, None, "not JSON", raw
            continue
        if isinstance(item, (dict, str)):
            yield number, item, "", raw
        else:
            yield number, None, "not a JSON object with named fields", raw


def refuse_documents(path: Path, lines: list[str]) -> None:
    """DataError if the file with these first lines is one JSON document instead of one a line."""
    filled = [line.strip() for line in lines if line.strip()]
    if not filled or filled[0][0] not in "[{":
        return
    try:
        whole = json.loads(filled[0])
    except (ValueError, RecursionError):
        one = filled[0] in ("[", "{", "[{") or filled[0][0] == "["
    else:
        one = isinstance(whole, list) and len(filled) == 1
    if one:
        raise DataError(
            f"{path}: is one JSON document, not JSON lines (one object a line). Make it that: "
            "jq -c '.[]' FILE > FILE.jsonl (for a list of objects)."
        )
