"""The manifest of a prepared folder: what is in it, with hashes, and one fingerprint over all of it.

`manifest.json` is written last and the folder is renamed into place after it, so a folder that has a manifest is whole.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exlm_dist.utils.errors import DataError
from exlm_dist.utils.files import fingerprint_of, sha256_file

SCHEMA = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
QUARANTINE = "quarantine.tsv"
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
        return asdict(self)


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """`manifest` with the fingerprint over everything else in it."""
    content = {key: value for key, value in manifest.items() if key != "fingerprint"}
    return {**content, "fingerprint": fingerprint_of(content)}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Manifest of the prepared folder; DataError when it is missing, of another version, or altered."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise DataError(_missing(Path(folder)))
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


def verify_folder(folder: Path) -> list[str]:
    """Compare every file of the prepared folder with its recorded size and SHA-256; the problems found, in words."""
    manifest = read_manifest(folder)
    expected = dict(manifest["tokenizer"]["files"])
    for split in SPLITS:
        for shard in manifest["splits"][split]["shards"]:
            expected[shard["name"]] = shard["sha256"]
            expected[shard["index"]] = shard["index_sha256"]
    problems = []
    for name, digest in sorted(expected.items()):
        path = Path(folder) / name
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif (got := sha256_file(path)) != digest:
            problems.append(f"{path}: sha256 {got}, expected {digest}")
    return problems


def _missing(folder: Path) -> str:
    hint = "Write it with `exlm prepare smiles|text --input FILE --out FOLDER`."
    if not folder.exists():
        return f"{folder}: no such folder of prepared data. {hint}"
    return f"{folder}: has no {MANIFEST}, so it is not a (finished) folder of prepared data. {hint}"
