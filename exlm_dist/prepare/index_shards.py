"""`index_shards`: WebDataset shards that others wrote, as a folder that training reads; the shards stay where they are.

The index of each shard is put aside when it is done, so that a run that was interrupted goes on from there.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from exlm_dist.data.manifest import MEMBERS, QUARANTINE, SPLITS, ShardEntry, epoch_size, split_entry
from exlm_dist.data.mirror import SHARDS_AT
from exlm_dist.data.places import common_root
from exlm_dist.data.random_smiles import RandomSmiles
from exlm_dist.data.record_tokens import forms_in
from exlm_dist.data.sample_text import ENDINGS, FORBIDDEN, ending_of
from exlm_dist.data.shard_patterns import expand_places
from exlm_dist.prepare.folder import (
    VALID_FRACTION,
    check_fraction,
    check_max_length,
    check_out,
    choose_valid,
    prepare_folder,
    save_tokenizer,
)
from exlm_dist.prepare.record_index import IndexTask, ShardPart, endings_in, index_shard, task_size
from exlm_dist.prepare.shard_writer import npy_bytes
from exlm_dist.prepare.summary import Summary
from exlm_dist.prepare.tally import EXAMPLES, KINDS, MAX_REJECTED, check_max_rejected, reasons
from exlm_dist.tables.failed_rows import HEADER, failed_line
from exlm_dist.tokenizers import Tokenizer, load_tokenizer
from exlm_dist.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from exlm_dist.utils.cores import available_cores
from exlm_dist.utils.errors import ConfigError, DataError
from exlm_dist.utils.files import sha256_bytes, write_atomic
from exlm_dist.utils.logs import get_logger
from exlm_dist.utils.outputs import user_path
from exlm_dist.utils.progress import Progress
from exlm_dist.utils.workers import ordered_map

_log = get_logger(__name__)
#: Damaged shards that an error lists.
DAMAGED_SHOWN = 20
#: Bytes of a record from which reading all of it for a sequence is slow.
LONG = 1 << 18


def index_shards(
    patterns: Sequence[str],
    out: Path | str,
    *,
    tokenizer: Path | str,
    endings: Sequence[str] = (),
    field: str | None = None,
    max_length: int = 512,
    valid_patterns: Sequence[str] = (),
    valid_fraction: float = VALID_FRACTION,
    max_rejected: float = MAX_REJECTED,
    random_smiles: int = 0,
    random_seed: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
) -> Summary:
    """Index the tars that `patterns` name (paths or addresses, with braces and wildcards) as the folder `out`.

    tokenizer: folder with one, or a sentencepiece `.model`. endings: of the members to read ('txt', 'json.gz'), needed
    if there are several that could be. field: of JSON objects; default 'text', of molecules 'smiles'. max_length: of a
    sequence in tokens with BOS and EOS; longer text is cut at words, longer molecules are set aside. valid_patterns:
    held-out shards; default `valid_fraction` of the samples. random_smiles, random_seed: as of `prepare_smiles`.
    DataError if a shard is damaged (all of them are named) or more than `max_rejected` of the samples are set aside.
    """
    check_fraction(valid_fraction)
    check_max_length(max_length)
    check_max_rejected(max_rejected)
    random = RandomSmiles(random_smiles, random_seed)
    out = user_path(out)
    check_out(out, overwrite)
    loaded = _tokenizer(user_path(tokenizer))
    places = [expand_places(patterns), expand_places(valid_patterns)]
    if twice := sorted(set(places[0]) & set(places[1])):
        raise ConfigError(f"{twice[0]}: is among the shards to train on and among the held-out ones.")
    sizes = {place: task_size(place) for place in (*places[0], *places[1])}
    wanted = _endings(endings, places[0][0], sizes[places[0][0]][0])
    field = field or ("smiles" if loaded.domain == "smiles" else "text")
    root = common_root([*places[0], *places[1]])
    _check_random(random, loaded, tokenizer, wanted)
    job = IndexJob(
        out, places[0], places[1], root, sizes, loaded, wanted, field, max_length, valid_fraction, max_rejected,
        workers or available_cores(), random,
    )  # fmt: skip
    summary = prepare_folder(out, job.request, overwrite, job.run)
    shutil.rmtree(job.parts, ignore_errors=True)
    return summary


@dataclass(frozen=True)
class IndexJob:
    """The indexing of one folder: `run` fills the staged folder and returns the manifest's content."""

    out: Path
    train: list[str]
    valid: list[str]
    root: str
    sizes: dict[str, tuple[int, int]]
    tokenizer: Tokenizer
    endings: tuple[str, ...]
    field: str
    max_length: int
    valid_fraction: float
    max_rejected: float
    workers: int
    random: RandomSmiles

    @property
    def request(self) -> dict[str, Any]:
        """All that the result depends on."""
        return {
            "domain": self.tokenizer.domain,
            "inputs": [[_relative(place, self.root), self.sizes[place][0]] for place in self.train],
            "valid_inputs": [[_relative(place, self.root), self.sizes[place][0]] for place in self.valid],
            "tokenizer": self.tokenizer.fingerprint,
            "endings": list(self.endings),
            "field": self.field,
            "max_length": self.max_length,
            "valid_fraction": None if self.valid else self.valid_fraction,
            **self.random.settings(),
        }

    @property
    def parts(self) -> Path:
        """The folder of what is done so far, beside the output; it stays if the run is interrupted."""
        out = Path(os.path.realpath(self.out))
        return out.with_name(f".{out.name}.parts")

    def run(self, folder: Path) -> dict[str, Any]:
        described = save_tokenizer(self.tokenizer, folder)
        parts = self._parts(str(folder / "tokenizer"))
        statistics = _statistics(parts, self.root) | (self._of_random(parts) if self.random.count else {})
        self._check_limit(parts, statistics)
        hashes = np.concatenate([parts[place].hashes for place in (*self.train, *self.valid)])
        samples = np.unique(hashes)
        statistics["repeated"] = statistics["kept"] - len(samples)
        if self.valid:
            held_out = np.empty(0, np.uint64)
        else:
            held_out = samples[choose_valid(samples, self.valid_fraction)]
        splits = {
            split: _write_split(folder, split, places, self.root, parts, self.sizes, held_out, self.max_length, forms)
            for split, places, forms in (
                ("train", self.train, 1 + self.random.count), ("valid", self.valid or self.train, 1),
            )
        }  # fmt: skip
        _check_sum(splits, parts)
        _warn_of_long(parts)
        _list_set_aside(folder / QUARANTINE, parts, self.root)
        write_atomic(folder / SHARDS_AT, self.root + "\n")
        return {
            "form": MEMBERS,
            "field": self.field,
            "domain": self.tokenizer.domain,
            "vocab_size": self.tokenizer.vocab_size,
            "max_length": self.max_length,
            "policy": getattr(self.tokenizer, "policy", {"whitespace": "runs become one space"}),
            "tokenizer": described,
            "splits": splits,
            "statistics": statistics,
            **({"random_smiles": asdict(self.random)} if self.random.count else {}),
        }

    def _of_random(self, parts: dict[str, ShardPart]) -> dict[str, Any]:
        """What became of the random SMILES, for the manifest."""
        counts = sum((part.random for part in parts.values()), Counter())
        again = sum((part.drawn_again for part in parts.values()), Counter())
        found = {name: counts[name] for name in ("molecules", "distinct", "canonical_instead")}
        return {"random_smiles": {**asdict(self.random), **found, "drawn_again": dict(again)}}

    def _parts(self, tokenizer: str) -> dict[str, ShardPart]:
        """The index of every shard. DataError that names the damaged ones."""
        self.parts.mkdir(parents=True, exist_ok=True)
        tasks = [
            IndexTask(
                place, *self.sizes[place], tokenizer, self.tokenizer.fingerprint, self.field, self.max_length - 2,
                self.endings, random,
            )
            for places, random in ((self.train, self.random), (self.valid, RandomSmiles()))
            for place in places
        ]  # fmt: skip
        if done := sum(task.part(self.parts).exists() for task in tasks):
            _log.info("%d of %d shards were indexed before", done, len(tasks))
        damaged = []
        with Progress("index", "shards", len(tasks)) as progress:
            for problem in ordered_map(functools.partial(index_shard, str(self.parts)), tasks, self.workers):
                damaged += [problem] if problem else []
                progress.update(1)
        if damaged:
            more = f"\n  and {len(damaged) - DAMAGED_SHOWN} more" if len(damaged) > DAMAGED_SHOWN else ""
            raise DataError(
                f"{len(damaged)} of {len(tasks)} shards cannot be indexed:\n  "
                + "\n  ".join(damaged[:DAMAGED_SHOWN]) + more
                + "\nThe others are done: the same command goes on from there."
            )  # fmt: skip
        return {task.place: ShardPart.load(task.part(self.parts)) for task in tasks}

    def _check_limit(self, parts: dict[str, ShardPart], statistics: dict[str, Any]) -> None:
        aside, rows = Counter(statistics["quarantined"]), statistics["rows"]
        if not statistics["kept"]:
            raise DataError(f"no sample can be used: {reasons(aside) or 'the shards have none'}. {self._hint(parts)}")
        if aside.total() > self.max_rejected * rows:
            examples = [
                f"\n  {place}, {member}, record {line}: {why}: {text[:80]!r}"
                for kind, _ in aside.most_common(KINDS)
                for place, member, line, why, text in _examples(parts, kind)
            ]
            fraction = aside.total() / rows
            raise DataError(
                f"{aside.total():,} of {rows:,} samples ({fraction:.1%}) cannot be used ({reasons(aside)}), more than "
                f"--max-rejected {self.max_rejected:g} allows.{''.join(examples)}\n{self._hint(parts)} Or go on "
                f"without these samples: --max-rejected {np.ceil(1000 * fraction) / 1000:g}."
            )

    def _hint(self, parts: dict[str, ShardPart]) -> str:
        aside = sum((part.members_aside for part in parts.values()), Counter())
        seen = f" Members set aside: {reasons(aside)}." if aside else ""
        read = f"Read were members .{', .'.join(self.endings)}, of JSON the field {self.field!r}."
        return f"{read}{seen} Change that by --ending and --field."


def _tokenizer(path: Path) -> Tokenizer:
    if path.is_file():
        return SentencePieceTokenizer.from_model_file(path)
    return load_tokenizer(path)


def _endings(asked: Sequence[str], place: str, size: int) -> tuple[str, ...]:
    """The endings of members that are read: those asked for, else the only one in the first shard that can be."""
    for ending in (name.lstrip(".").lower() for name in asked):
        known = ending_of(f"x.{ending}")
        if set(ending.split(".")) & set(FORBIDDEN):
            raise ConfigError(f"--ending {ending}: may be code or a pickle, which is never read.")
        if not known.form:
            raise ConfigError(
                f"--ending {ending}: must end in one of {', '.join(sorted(ENDINGS))}, each also with .gz."
            )
    if asked:
        return tuple(name.lstrip(".").lower() for name in asked)
    found = endings_in(place, size)
    usable = [name for name in found if ending_of(f"x.{name}").form and not set(name.split(".")) & set(FORBIDDEN)]
    counts = ", ".join(f"{count} .{name}" for name, count in found.most_common(8))
    if not usable:
        raise DataError(
            f"{place}: none of its first members can be read as samples ({counts or 'it has none'}); those that can be "
            f"end in one of {', '.join(sorted(ENDINGS))}, each also with .gz."
        )
    if len(usable) > 1:
        raise ConfigError(
            f"{place}: several kinds of members could be the samples ({counts}). Say which: --ending {usable[0]}"
        )
    return (usable[0],)


def _check_random(random: RandomSmiles, tokenizer: Tokenizer, given: Path | str, endings: Sequence[str]) -> None:
    """ConfigError if random SMILES are asked for of what are no SMILES."""
    if random.count and tokenizer.domain != "smiles":
        raise ConfigError(
            f"--random-smiles {random.count}: {given} is a {tokenizer.domain} tokenizer. Leave the option out, or give "
            "--tokenizer a folder that `exlm prepare smiles` wrote."
        )
    ids = [name for name in endings if ending_of(f"x.{name}").form == "ids"]
    if random.count and ids:
        raise ConfigError(
            f"--random-smiles {random.count}: members .{ids[0]} hold token ids, not SMILES. Leave the option out, or "
            "read other members: --ending."
        )


def _relative(place: str, root: str) -> str:
    return place[len(root) :].lstrip("/") if root else place


def _statistics(parts: dict[str, ShardPart], root: str) -> dict[str, Any]:
    """The counts for the manifest, of all shards and of each."""
    return {
        "unit": "samples",
        "members": sum(part.members for part in parts.values()),
        "members_used": sum(part.used for part in parts.values()),
        "members_set_aside": dict(sum((part.members_aside for part in parts.values()), Counter())),
        "rows": sum(part.samples for part in parts.values()),
        "kept": sum(part.kept for part in parts.values()),
        "duplicates": 0,
        "quarantined": dict(sum((part.aside for part in parts.values()), Counter())),
        "files": [
            {
                "name": _relative(place, root),
                "rows": part.samples,
                "kept": part.kept,
                "duplicates": 0,
                "quarantined": dict(part.aside),
            }
            for place, part in parts.items()
        ],
    }


def _examples(parts: dict[str, ShardPart], kind: str) -> list[tuple[str, str, int, str, str]]:
    found = ((place, *row) for place, part in parts.items() for row in part.listed if row[2].split(":")[0] == kind)
    return [row for _, row in zip(range(EXAMPLES), found)]


def _write_split(
    folder: Path, split: str, places: list[str], root: str, parts: dict[str, ShardPart],
    sizes: dict[str, tuple[int, int]], held_out: np.ndarray, max_length: int, forms: int,
) -> dict[str, Any]:  # fmt: skip
    """Write the indices of a split, each form of the molecules by itself; its part of the manifest. `held_out`: hashes
    of the held-out samples, sorted."""
    (folder / split).mkdir()
    entries, unknown = [], 0
    histogram = np.zeros(max_length + 1, np.int64)
    for form, place in product(range(forms), places):
        part = parts[place]
        chosen = forms_in(part.records) == form
        if len(held_out):
            chosen &= np.isin(part.hashes, held_out) == (split == "valid")
        records = part.records[chosen]
        if not len(records):
            continue
        content = npy_bytes(records)
        name = f"{split}/shard-{len(entries):06d}.idx.npy"
        write_atomic(folder / name, content)
        tokens = int(records["length"].sum(dtype=np.int64))
        entries.append(
            ShardEntry(
                _relative(place, root), sizes[place][0], part.sha256, name, len(content), sha256_bytes(content),
                len(records), tokens,
            )
        )  # fmt: skip
        unknown += int(part.unknown[chosen].sum(dtype=np.int64))
        histogram += np.bincount(records["length"] + 2, minlength=max_length + 1)
    entry = split_entry(split, entries, unknown, histogram.tolist())
    return {**entry, "forms": forms} if forms > 1 else entry


def _warn_of_long(parts: dict[str, ShardPart]) -> None:
    """Say that training will be slow where a sequence needs a record of more than `LONG` bytes to be read."""
    count = sum(int(np.count_nonzero(part.records["size"] > LONG)) for part in parts.values())
    if count:
        _log.warning(
            "%d sequences are parts of records of more than %d bytes, each read as a whole for every part of it. "
            "Training reads them faster from members .txt, of which a part is read alone, or from shorter records",
            count,
            LONG,
        )


def _check_sum(splits: dict[str, Any], parts: dict[str, ShardPart]) -> None:
    """RuntimeError if not every sequence of every shard is in one split."""
    written = sum(epoch_size(splits[split]) for split in SPLITS)
    found = sum(int(np.count_nonzero(forms_in(part.records) == 0)) for part in parts.values())
    if written != found:
        raise RuntimeError(f"{found} sequences were found, {written} are in the splits")


def _list_set_aside(path: Path, parts: dict[str, ShardPart], root: str) -> None:
    with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.write(HEADER)
        for place, part in parts.items():
            for member, line, reason, text in part.listed:
                file.write(failed_line(f"{_relative(place, root)}/{member}", line, reason, text))
