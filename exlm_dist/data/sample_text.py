"""What a member of a foreign shard holds: texts, molecules or token ids. Nothing is unpickled or run.

One pair of functions for each kind of content: `split_content` at the index, which finds the records of a member, and
`record_value` when a record is read. Both decode by `_decoded`, so that they cannot differ.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from exlm_dist.data.tar_members import MOST_BYTES
from exlm_dist.utils.errors import DataError

#: Endings of members that are read, and how. Lines: a record per line; the others: one record.
ENDINGS = {"txt": "text", "text": "text", "json": "json", "jsonl": "json lines", "ndjson": "json lines"} | {
    "smi": "molecules",
    "smiles": "molecules",
    "npy": "ids",
}
FORMS = ("text", "json", "json lines", "molecules", "ids")
OF_LINES = ("json lines", "molecules")
#: Endings of members that would be code or pickles; never read, whatever is asked for.
FORBIDDEN = ("pyd", "pickle", "pkl", "pth", "pt", "npz", "py", "so", "dill", "joblib")


class Unusable(DataError):
    """A record that cannot be used; the message is the reason alone."""


@dataclass(frozen=True)
class Ending:
    """The ending of a member's name: what follows the first dot of its last part, as WebDataset counts."""

    name: str  # as given, lower case: 'txt.gz', 'target.json'
    form: str  # one of FORMS; empty: none that is read
    gzip: bool


def ending_of(name: str) -> Ending:
    """How a member of this name is read."""
    ending = name.rpartition("/")[2].partition(".")[2].lower()
    zipped = ending.endswith(".gz")
    return Ending(ending, ENDINGS.get(ending.removesuffix(".gz").rpartition(".")[2], ""), zipped)


def split_content(content: bytes, form: str, zipped: bool) -> Iterator[tuple[int, int, int]]:
    """(offset, size, line) of each record in a member's `content`: the bytes that have it, and which line of them it
    is. Where the member is gzipped the bytes are all of it. Unusable if it cannot be unpacked."""
    if form not in OF_LINES:
        yield 0, len(content), 0
        return
    if zipped:
        for number, line in enumerate(unzipped(content).split(b"\n")):
            if line.strip():
                yield 0, len(content), number
        return
    position = 0
    for line in content.split(b"\n"):
        if line.strip():
            yield position, len(line), 0
        position += len(line) + 1


def record_value(content: bytes, form: str, zipped: bool, line: int, field: str) -> str | np.ndarray:
    """The text of a record, or its token ids int64 [n]; `field`: of a JSON object, `a.b` for one within another.
    Unusable with the reason."""
    if zipped:
        content = unzipped(content)
        if form in OF_LINES:
            content = content.split(b"\n")[line]
    if form == "ids":
        return _ids(content)
    return _decoded(content, form, field)


def unzipped(content: bytes) -> bytes:
    """The content of a gzipped member, of several parts too. Unusable if it is damaged or longer than MOST_BYTES."""
    parts, rest, room = [], content, MOST_BYTES
    while rest:
        unpacker = zlib.decompressobj(wbits=31)
        try:
            part = unpacker.decompress(rest, room + 1)
        except zlib.error as error:
            raise Unusable(f"not gzip: {error}") from error
        if len(part) > room:
            raise Unusable(f"too large: more than {MOST_BYTES:,} bytes unpacked")
        if not unpacker.eof:
            raise Unusable("not gzip: cut off")
        parts.append(part)
        rest, room = unpacker.unused_data, room - len(part)
    return b"".join(parts)


def _decoded(content: bytes, form: str, field: str) -> str:
    try:
        text = content.decode().removeprefix("\ufeff")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise Unusable("not UTF-8") from error
    if form == "molecules":
        text = next(iter(text.split()), "")
    elif form in ("json", "json lines"):
        text = _text_in(text, field)
    if "\0" in text:
        raise Unusable("NUL character")
    return text


def _text_in(text: str, field: str) -> str:
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unusable("not JSON") from error
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        raise Unusable("not a JSON object with named fields")
    found: Any = value.get(field)
    if field not in value:
        found = value
        for name in field.split("."):
            if not isinstance(found, dict) or name not in found:
                raise Unusable(f"no field: {field}")
            found = found[name]
    if found is None:
        raise Unusable("empty")
    if not isinstance(found, str):
        raise Unusable("not text")
    return found


def _ids(content: bytes) -> np.ndarray:
    """The array in a .npy file, of which the header is read as text and never run."""
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = read_header[version](stream)
    except (ValueError, KeyError, SyntaxError, TypeError, RecursionError) as error:
        raise Unusable("not a .npy array") from error
    rest = content[stream.tell() :]
    if len(shape) != 1 or dtype.kind not in "iu" or dtype.hasobject:
        raise Unusable("not token ids: one dimension of integers is needed")
    if len(rest) != shape[0] * dtype.itemsize:
        raise Unusable("not a .npy array: its size is not that of its header")
    return np.frombuffer(rest, dtype).astype(np.int64)
