"""Several prepared folders as one data set: the samples of each follow those of the one before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from exlm_dist.data.shard_index import Lengths, grouped
from exlm_dist.data.shards import ShardDataset
from exlm_dist.utils.errors import DataError
from exlm_dist.utils.files import fingerprint_of


class MixedDataset:
    """One split of several folders with one tokenizer, to what reads it like a `ShardDataset`.

    Sample ids are those of the source plus the number of samples of the sources before it, so that none changes when
    a source is added at the end, whatever the weights.
    """

    def __init__(self, sources: Mapping[str, ShardDataset], block: int) -> None:
        """`block`: samples of a block, as the sources were opened with. DataError where tokenizers differ."""
        self.sources = dict(sources)
        parts = list(self.sources.values())
        check_alike({name: (part.path, part.manifest) for name, part in self.sources.items()})
        self.vocab_size, self.tokenizer_path = parts[0].vocab_size, parts[0].tokenizer_path
        self.lengths = Lengths([part.index for part in parts])
        self.sizes = [part.epoch_size for part in parts]  # samples of an epoch
        self.starts = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        self._blocks = np.cumsum([0, *(part.num_blocks for part in parts)], dtype=np.int64) if block else None

    @property
    def fingerprint(self) -> str:
        """Of the content of all sources, in order; of a single one its own."""
        found = [source.fingerprint for source in self.sources.values()]
        return found[0] if len(found) == 1 else fingerprint_of({"sources": found})

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `ShardDataset.read`."""
        ids = np.asarray(ids, np.int64)
        payloads: list[bytes | memoryview] = [b""] * len(ids)
        lengths = np.empty(len(ids), np.int64)
        parts = list(self.sources.values())
        for source, rows in grouped(ids, self.starts):
            found, lengths[rows] = parts[source].payloads(ids[rows] - self.starts[source])
            for row, payload in zip(rows.tolist(), found):
                payloads[row] = payload
        return np.frombuffer(b"".join(payloads), dtype=parts[0].dtype).astype(np.int32), lengths

    def preload(self, blocks: list[int]) -> None:
        """See `ShardDataset.preload`; blocks are numbered as the samples are."""
        assert self._blocks is not None, "only an order in windows reads blocks ahead"
        parts = list(self.sources.values())
        for source, rows in grouped(np.array(blocks, np.int64), self._blocks):
            parts[source].preload([blocks[row] - int(self._blocks[source]) for row in rows.tolist()])

    def named(self, sample: int) -> str:
        """A sample by its source and its number there: `zinc 17`."""
        source = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return f"{list(self.sources)[source]} {sample - int(self.starts[source])}"

    def close(self) -> None:
        """Close all sources."""
        for source in self.sources.values():
            source.close()


def check_alike(manifests: Mapping[str, tuple[Path, dict[str, Any]]]) -> None:
    """DataError if a source, by name its folder and manifest, holds something else than the first one, or was made
    with another tokenizer."""
    (first, (path, one)), *others = manifests.items()
    for name, (place, other) in others:
        both = f"data.sources: {first} ({path}) and {name} ({place}) cannot be mixed"
        if one["domain"] != other["domain"]:
            raise DataError(f"{both}: {first} is {one['domain']}, {name} is {other['domain']}. Leave out one of them.")
        mine, theirs = (manifest["tokenizer"]["fingerprint"] for manifest in (one, other))
        if mine != theirs:
            raise DataError(
                f"{both}: their tokenizers differ ({mine[:12]} and {theirs[:12]}). Prepare {name} again with the "
                f"tokenizer of {first}: the option --tokenizer {path}."
            )
