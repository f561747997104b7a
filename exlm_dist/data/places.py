"""Where shards are: paths of this machine, and addresses that are read over the network (http, s3, gs, hf)."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from exlm_dist.utils.errors import DataError
from exlm_dist.utils.outputs import user_path

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


def expand_places(patterns: Sequence[str]) -> list[str]:
    """All shards that the patterns name, each once and in their order: braces (`{000..127}`, `{a,b}`), and `*`, `?`
    and `[...]` but for http. Paths become absolute. DataError for a pattern that names nothing."""
    import braceexpand

    found: list[str] = []
    for pattern in patterns:
        try:
            named = list(braceexpand.braceexpand(pattern))
        except ValueError as error:
            raise DataError(f"{pattern}: its braces cannot be understood ({error}).") from error
        for name in named:
            address = address_of(name)
            found += _matching(name) if address is None else _matching_addresses(address)
    return list(dict.fromkeys(found))


def common_root(places: Sequence[str]) -> str:
    """The folder or address in which all of `places` are; empty if there is none."""
    addresses = [place for place in places if address_of(place)]
    if not addresses:
        return os.path.dirname(places[0]) if len(places) == 1 else os.path.commonpath(list(places))
    prefix = os.path.commonprefix(list(places))
    root = prefix.rpartition("/")[0]
    return root if "://" in root and not root.endswith((":", ":/")) else ""


def _matching(pattern: str) -> list[str]:
    path = os.path.abspath(user_path(pattern))
    if os.path.exists(path):
        return [path]
    found = sorted(glob.glob(path, recursive=True))
    if not found:
        raise DataError(f"{pattern}: no such shard.")
    return found


def _matching_addresses(address: str) -> list[str]:
    if not any(sign in address.partition("://")[2] for sign in "*?["):
        return [address]
    scheme = scheme_of(address)
    if scheme in HTTP:
        if "?" in address and not any(sign in address for sign in "*["):
            return [address]  # a query
        raise DataError(f"{address}: a web server does not list its files. Write braces: shard-{{000000..000127}}.tar")
    from exlm_dist.data.remote import file_system

    system, path = file_system(address)
    found = sorted(f"{scheme}://{name.removeprefix(f'{scheme}://')}" for name in system.glob(path))
    if not found:
        raise DataError(f"{address}: names nothing there.")
    return found
