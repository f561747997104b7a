"""Files of a task in the folder that people have downloaded it into."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from exlm_dist.tables.columns import listed
from exlm_dist.tables.input_files import ENDINGS
from exlm_dist.tables.text_files import COMPRESSED
from exlm_dist.utils.errors import DataError


def files_below(folder: Path, deepest: int) -> list[Path]:
    """What is in a folder and up to so many levels below it, sorted within each level."""
    depths = ["/".join(["*"] * depth) for depth in range(1, deepest + 1)]
    return [path for depth in depths for path in sorted(folder.glob(depth))]


def names_of_tables(stems: Iterable[str], endings: Iterable[str] = tuple(ENDINGS)) -> set[str]:
    """Names of files, in lower case, that a table with one of these stems may have, compressed or not."""
    endings = tuple(endings)
    return {f"{stem}{ending}{packed}" for stem in stems for ending in endings for packed in ("", *COMPRESSED)}


def only_one(name: str, found: Sequence[Path], folder: Path) -> Path | None:
    """The file of a task; None of none. DataError if several could be it."""
    if len(found) > 1:
        raise DataError(
            f"{name}: {listed([str(path) for path in found])} could each be its file. Leave one in {folder}."
        )
    return found[0] if found else None
