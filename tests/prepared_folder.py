"""Prepared folders of random sequences, for tests of what writes and reads shards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from exlm_dist.data.manifest import MANIFEST, SCHEMA, SPLITS, read_manifest, sealed
from exlm_dist.data.shards import ShardDataset
from exlm_dist.prepare.shard_writer import ShardWriter
from exlm_dist.tokenizers import load_tokenizer
from exlm_dist.utils.files import sha256_file


def random_sequences(count: int, vocab_size: int = 300, seed: int = 0) -> list[np.ndarray]:
    """`count` sequences of 1 to 59 ordinary tokens."""
    generator = np.random.default_rng(seed)
    return [generator.integers(5, vocab_size, size=generator.integers(1, 60)) for _ in range(count)]


def write_folder(
    root: Path, rows: list[np.ndarray], *, vocab_size: int = 300, shard_bytes: int = 1 << 15, chunk: int = 77
) -> Path:
    """A prepared folder with the same rows in both splits."""
    splits = {}
    for split in ("train", "valid"):
        writer = ShardWriter(root, split, vocab_size=vocab_size, shard_bytes=shard_bytes, per_member=64)
        for first in range(0, len(rows), chunk):
            part = rows[first : first + chunk]
            writer.write(np.concatenate(part), np.array([len(row) for row in part]))
        entries = writer.close()
        splits[split] = {"sequences": len(rows), "shards": [entry.as_dict() for entry in entries]}
    manifest = {
        "schema": SCHEMA,
        "domain": "smiles",
        "vocab_size": vocab_size,
        "max_length": 64,
        "splits": splits,
        "tokenizer": {"fingerprint": "none", "files": {}},
    }
    (root / MANIFEST).write_text(json.dumps(sealed(manifest)))
    return root


def record_offset(dataset: ShardDataset, sample: int) -> tuple[Path, int]:
    """File and byte offset of the payload of a sample, from the index files."""
    for shard in dataset.manifest["splits"][dataset.split]["shards"]:
        index = np.load(dataset.path / shard["index"])
        if sample < len(index):
            return dataset.path / shard["name"], int(index["offset"][sample])
        sample -= len(index)
    raise AssertionError("no such sample")


def overwrite(path: Path, offset: int, content: bytes) -> None:
    """Replace the bytes from `offset` on by `content`: damage, as a disk or a network does it."""
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


def verify_folder(folder: Path) -> list[str]:
    """Compare every file of a prepared folder with the SHA-256 in its manifest; the problems found, in words."""
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


def texts_of(folder: Path, split: str) -> list[str]:
    """What the sequences of a split say, in the order of the index."""
    dataset = ShardDataset.open(folder, split)
    tokenizer = load_tokenizer(dataset.tokenizer_path)
    tokens, lengths = dataset.read(np.arange(len(dataset)))
    return [tokenizer.decode(part) for part in np.split(tokens, np.cumsum(lengths)[:-1])]


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of each file, by its path within the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
