"""Where shards are: paths of this machine, and addresses that are read over the network (http, s3, gs, hf)."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from exlm_dist.utils.errors import DataError

#: What is read over the network: http(s) by Python itself, the others through fsspec.
HTTP, BUCKETS = ("http", "https"), ("s3", "gs", "hf")
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):/+", re.IGNORECASE)
_PIPE = re.compile(r"pipe:", re.IGNORECASE)


def address_of(place: Path | str) -> str | None:
    """The address that `place` is, None for a path of this machine. `s3:/x`, as pathlib writes it, is `s3://x`.

    DataError for what is not read: `pipe:` (commands are never run) and unknown kinds of address.
    """
    text = str(place)
    if _PIPE.match(text):
        raise DataError(f"{text}: commands are never run to get data. Give the address or the file itself.")
    found = _SCHEME.match(text)
    if found is None:
        return None
    scheme = found.group(1).lower()
    if scheme not in HTTP + BUCKETS:
        known = ", ".join(f"{name}://" for name in HTTP + BUCKETS)
        raise DataError(f"{text}: nothing is read from {scheme}://. Give a path, or one of {known}.")
    return f"{scheme}://{text[found.end() :]}"


def scheme_of(address: str) -> str:
    """`https` of `https://...`."""
    return address.partition(":")[0]


def joined(root: str, name: str) -> str:
    """The place `name` seen from the folder or address `root`; `name` itself if it is absolute or an address."""
    if not root or name.startswith("/") or address_of(name):
        return name
    return f"{root.rstrip('/')}/{name}"


def common_root(places: Sequence[str]) -> str:
    """The folder or address in which all of `places` are; empty if there is none."""
    addresses = [place for place in places if address_of(place)]
    if not addresses:
        return os.path.dirname(places[0]) if len(places) == 1 else os.path.commonpath(list(places))
    prefix = os.path.commonprefix(list(places))
    root = prefix.rpartition("/")[0]
    return root if "://" in root and not root.endswith((":", ":/")) else ""
