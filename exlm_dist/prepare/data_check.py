"""What `exlm data verify|inspect|sample` find in a folder of data, prepared or indexed, here or behind an address."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exlm_dist.data.manifest import SPLITS, read_manifest
from exlm_dist.data.mirror import data_folder, named_files, shard_root
from exlm_dist.data.opening import open_dataset
from exlm_dist.data.places import joined
from exlm_dist.data.remote import NotGiven
from exlm_dist.data.shard_files import open_shards
from exlm_dist.data.shards import token_dtype
from exlm_dist.data.tar_members import DamagedShard
from exlm_dist.prepare.record_index import shard_stream
from exlm_dist.prepare.summary import Summary
from exlm_dist.tokenizers import load_tokenizer
from exlm_dist.utils.errors import DataError
from exlm_dist.utils.files import sha256_file
from exlm_dist.utils.progress import Progress

#: Damaged records that are named of one shard.
NAMED = 10


@dataclass(frozen=True)
class Where:
    """One sequence, and where it is stored."""

    split: str
    sample: int
    shard: str
    offset: int  # bytes
    size: int
    expected: int  # crc32
    got: int
    length: int  # tokens, BOS and EOS not counted
    text: str

    def __str__(self) -> str:
        state = "whole" if self.expected == self.got else f"DAMAGED, got crc32 {self.got:08x}"
        return (
            f"{self.split} {self.sample}: {self.shard}, bytes {self.offset} to {self.offset + self.size - 1}, crc32 "
            f"{self.expected:08x} ({state}), {self.length} tokens\n  {self.text}"
        )


def verify_data(place: Path | str) -> Iterator[str]:
    """Every problem of the files of a folder, each read whole: the tokenizer, the index, and the shards, of which
    damaged records are named (shard, record, offset, expected, got). DataError for a manifest that cannot be used."""
    folder = data_folder(place)
    manifest = read_manifest(folder)
    for name, digest in small_files(manifest).items():
        if problem := file_problem(folder / name, digest):
            yield problem
    root, shards = shard_root(folder), all_shards(manifest)
    with Progress("verify", "shards", len(shards)) as progress:
        for shard in shards:
            if problem := shard_problem(joined(root, shard["name"]), shard):
                yield problem
                yield from _damaged_records(folder, manifest, shard)
            progress.update(1)


def small_files(manifest: dict[str, Any]) -> dict[str, str]:
    """Name and SHA-256 of each file of the tokenizer and the index. DataError for a name that leads elsewhere."""
    return {name: digest for name, digest in named_files(manifest).items() if digest}


def all_shards(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The entry of each shard, once."""
    return list({shard["name"]: shard for split in SPLITS for shard in manifest["splits"][split]["shards"]}.values())


def file_problem(path: Path, digest: str) -> str:
    """What is wrong with a file that should have this SHA-256; empty if nothing."""
    if not path.is_file():
        return f"{path}: missing"
    return "" if (got := sha256_file(path)) == digest else f"{path}: sha256 {got}, expected {digest}"


def shard_problem(place: str, shard: dict[str, Any]) -> str:
    """What is wrong with a shard, a path or address, that should be as the manifest says; empty if nothing."""
    stream = shard_stream(place, shard["size"])
    try:
        size = stream.skip(1 << 62)
    except (DamagedShard, NotGiven) as error:
        return str(error)
    if size != shard["size"]:
        return f"{place}: {size} bytes, expected {shard['size']}"
    return "" if stream.sha256 == shard["sha256"] else f"{place}: sha256 {stream.sha256}, expected {shard['sha256']}"


def look_up(place: Path | str, split: str, samples: np.ndarray) -> list[Where]:
    """Where the samples int64 [m] of a split are stored, whether they are whole, and their text. DataError for one
    that is not there."""
    dataset = open_dataset(place, split, max_bad_records=1.0)
    tokenizer = load_tokenizer(dataset.tokenizer_path)
    if len(samples) and not 0 <= samples.min() <= samples.max() < len(dataset):
        raise DataError(f"{place}: its {split} split has samples 0 to {len(dataset) - 1}.")
    try:
        return [_where(dataset, tokenizer, int(sample)) for sample in samples]
    finally:
        dataset.close()


def draw(place: Path | str, split: str, count: int, seed: int) -> np.ndarray:
    """Ids int64 of `count` different samples of a split, in order, drawn with `seed`."""
    total = read_manifest(Path(place))["splits"][split]["sequences"]
    return np.sort(np.random.default_rng(seed).choice(total, min(count, total), replace=False))


def describe_data(place: Path | str) -> str:
    """The counts of a folder, and how long the sequences of each split are, in tokens with BOS and EOS."""
    folder = data_folder(place)
    manifest = read_manifest(folder)
    lines = [str(Summary(folder, manifest, 0.0))]
    for split in SPLITS:
        below = np.cumsum(manifest["splits"][split]["length_histogram"])
        found = [int(np.searchsorted(below, fraction * below[-1])) for fraction in (0.01, 0.25, 0.5, 0.75, 0.99, 1.0)]
        lines.append(f"{split}: 1 %, 25 %, 50 %, 75 %, 99 %, longest: {', '.join(map(str, found))} tokens")
    return "\n".join(lines)


def _damaged_records(folder: Path, manifest: dict[str, Any], shard: dict[str, Any]) -> Iterator[str]:
    """The records of a damaged shard whose checksums are wrong."""
    for split in SPLITS:
        shards = manifest["splits"][split]["shards"]
        for number, own in enumerate(shards):
            if own["name"] != shard["name"] or not (folder / own["index"]).is_file():
                continue
            records = np.load(folder / own["index"], allow_pickle=False)
            files = open_shards(shard_root(folder), shards)
            first = sum(other["sequences"] for other in shards[:number])
            wrong = 0
            for row, record in enumerate(records):
                size = _record_size(record, manifest)
                try:
                    content = files.reader(number)(size, int(record["offset"]))
                except DataError:
                    break  # the shard cannot be read at all, which was said
                if len(content) != size or zlib.crc32(content) != record["crc"]:
                    wrong += 1
                    if wrong <= NAMED:
                        got = f"crc32 {zlib.crc32(content):08x}" if len(content) == size else "bytes missing"
                        yield (
                            f"  {split} record {first + row} at byte {record['offset']}: expected crc32 "
                            f"{record['crc']:08x}, got {got}"
                        )
            files.close()
            if wrong > NAMED:
                yield f"  {split}: {wrong:,} damaged records in all"


def _record_size(record: Any, manifest: dict[str, Any]) -> int:
    if "size" in (record.dtype.names or ()):
        return int(record["size"])
    return int(record["length"]) * token_dtype(manifest["vocab_size"]).itemsize


def _where(dataset: Any, tokenizer: Any, sample: int) -> Where:
    shard, record = dataset.record(sample)
    size = _record_size(record, dataset.manifest)
    content, expected, got = dataset.raw(sample)
    text = tokenizer.decode(np.frombuffer(content, token_dtype(dataset.vocab_size)).tolist()) if got == expected else ""
    return Where(
        dataset.split, sample, dataset.place(shard), int(record["offset"]), size, expected, got,
        int(record["length"]), text,
    )  # fmt: skip
