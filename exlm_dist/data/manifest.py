"""The manifest of a prepared folder: what is in it, with hashes, and one fingerprint of it all.

`manifest.json` is written last, before the folder is renamed to its final name: a folder with a manifest is complete.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exlm_dist.data.mirror import data_folder
from exlm_dist.utils.errors import DataError
from exlm_dist.utils.files import fingerprint_of

SCHEMA = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
QUARANTINE = "quarantine.tsv"
#: What the shards of a folder hold: token ids that were prepared, or the members of shards that others wrote.
TOKENS, MEMBERS = "tokens", "members"
SPLITS = ("train", "valid")


@dataclass(frozen=True)
class ShardEntry:
    """One tar shard and its index; names are relative to the prepared folder, sizes in bytes."""

    name: str
    size: int
    sha256: str
    index: str
    index_size: int
    index_sha256: str
    sequences: int
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        """The entry as the manifest lists it."""
        return asdict(self)


def split_entry(split: str, shards: list[ShardEntry], unknown: int, histogram: list[int]) -> dict[str, Any]:
    """A split as the manifest lists it. unknown: tokens that are; histogram: sequences of each length, BOS and EOS
    counted. DataError if it has no sequences."""
    sequences, tokens = sum(shard.sequences for shard in shards), sum(shard.tokens for shard in shards)
    if not sequences:
        raise DataError(f"nothing is left for the {split} split.")
    return {
        "sequences": sequences,
        "tokens": tokens,
        "unknown_tokens": unknown,
        "unknown_rate": unknown / tokens,
        "mean_length": tokens / sequences + 2,
        "length_histogram": histogram,
        "shards": [shard.as_dict() for shard in shards],
    }


def forms_of(split: dict[str, Any]) -> int:
    """Forms in which a split, as the manifest lists it, has each molecule: 1 without random SMILES."""
    return int(split.get("forms", 1))


def epoch_size(split: dict[str, Any]) -> int:
    """Sequences of one epoch of a split, which has each molecule in one form."""
    return int(split["sequences"]) // forms_of(split)


def form_of(manifest: dict[str, Any]) -> str:
    """TOKENS or MEMBERS."""
    return str(manifest.get("form", TOKENS))


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """`manifest` with the fingerprint of everything else in it."""
    content = {key: value for key, value in manifest.items() if key != "fingerprint"}
    return {**content, "fingerprint": fingerprint_of(content)}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder, here or behind an address; DataError if it is missing, of another version, or
    altered."""
    folder = data_folder(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(_missing(folder))
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not readable as JSON ({error}). Prepare the data again.") from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        found = manifest.get("schema") if isinstance(manifest, dict) else type(manifest).__name__
        raise DataError(f"{path}: schema version {found}, this version reads {SCHEMA}. Prepare the data again.")
    if sealed(manifest)["fingerprint"] != manifest.get("fingerprint"):
        raise DataError(
            f"{path}: its content does not match its fingerprint; it was altered or damaged. "
            "Prepare the data again, or copy the folder again."
        )
    return manifest


def _missing(folder: Path) -> str:
    hint = (
        "Write it with `exlm prepare smiles|text --input FILE --out FOLDER`, or of WebDataset shards `exlm data index`."
    )
    if not folder.exists():
        return f"{folder}: no such folder of prepared data. {hint}"
    return f"{folder}: has no {MANIFEST}, so it is not a (finished) folder of prepared data. {hint}"
