"""From patterns as people write them (braces, wildcards) to the shards that they name."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence

from exlm_dist.data.places import HTTP, address_of, scheme_of
from exlm_dist.data.remote import file_system
from exlm_dist.utils.errors import DataError
from exlm_dist.utils.outputs import user_path


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


def _matching(pattern: str) -> list[str]:
    path = os.path.abspath(user_path(pattern))
    if os.path.isdir(path):
        raise DataError(f"{pattern}: is a folder. Name its shards: '{pattern.rstrip('/')}/*.tar'")
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
    system, path = file_system(address)
    found = sorted(f"{scheme}://{name.removeprefix(f'{scheme}://')}" for name in system.glob(path))
    if not found:
        raise DataError(f"{address}: names nothing there.")
    return found
