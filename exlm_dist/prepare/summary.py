"""What a preparation did, from the manifest, printed as a short table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exlm_dist.data.manifest import MANIFEST, QUARANTINE, SPLITS, epoch_size, forms_of
from exlm_dist.prepare.tally import reasons

#: Files that are listed one by one: those with the most rows set aside.
FILES_SHOWN = 10
#: Fraction of tokens for single bytes from which a tokenizer does not suit the text.
MANY_BYTES = 0.05


@dataclass(frozen=True)
class Summary:
    """Result of `prepare_smiles` and `prepare_text`."""

    path: Path
    manifest: dict[str, Any]
    seconds: float
    reused: bool = False

    @property
    def sequences(self) -> dict[str, int]:
        """Sequences per split."""
        return {split: self.manifest["splits"][split]["sequences"] for split in SPLITS}

    @property
    def quarantined(self) -> dict[str, int]:
        """Number of rows that were set aside, by kind of reason."""
        return dict(self.manifest["statistics"]["quarantined"])

    @property
    def unknown_rate(self) -> float:
        """Fraction of unknown tokens in the held-out split."""
        return self.manifest["splits"]["valid"]["unknown_rate"]

    def lines(self) -> list[tuple[str, str]]:
        """Label and value of each line of the table."""
        splits = self.manifest["splits"]
        reused = "  (prepared before from the same input and settings)" if self.reused else ""
        lines = [
            ("folder", f"{self.path}{reused}"),
            (
                "domain",
                f"{self.manifest['domain']}, vocabulary {self.manifest['vocab_size']:,}{self._asked()}, "
                f"max length {self.manifest['max_length']}",
            ),
            *self._rows(),
        ]
        for split in SPLITS:
            part = splits[split]
            forms = f" ({forms_of(part)} of each of {epoch_size(part):,} molecules)" if forms_of(part) > 1 else ""
            lines.append(
                (
                    split,
                    f"{part['sequences']:,} sequences{forms}, {part['tokens']:,} tokens, mean length "
                    f"{part['mean_length']:.1f}, unknown {part['unknown_rate']:.4%}, {len(part['shards'])} shard(s)",
                )
            )
        lines.append(("fingerprint", self.manifest["fingerprint"][:16]))
        if self.seconds and not self.reused:
            lines.append(("time", f"{self.seconds:.1f} s"))
        return lines

    def _asked(self) -> str:
        """The vocabulary that was asked for, where the text was too small for it."""
        asked = self.manifest["statistics"].get("vocab_size_asked") or 0
        return f" (of {asked:,}: the text has no more pieces)" if asked > self.manifest["vocab_size"] else ""

    def _rows(self) -> Iterator[tuple[str, str]]:
        """What became of the rows, and of those of each file if there are several."""
        statistics = self.manifest["statistics"]
        files = statistics.get("files", [])  # data prepared by earlier versions has no counts of files
        of_files = f" of {len(files):,} files" if len(files) > 1 else ""
        if "members" in statistics:
            aside = statistics["members_set_aside"]
            others = f", set aside: {reasons(aside)}" if aside else ""
            yield "members", f"{statistics['members']:,}, of which {statistics['members_used']:,} were read{others}"
        yield "read", f"{statistics['rows']:,} {statistics['unit']}{of_files}"
        if "kept" in statistics:
            documents = f", in {statistics['documents']:,} documents" if "documents" in statistics else ""
            yield "kept", f"{statistics['kept']:,}{documents}"
        if statistics["duplicates"]:
            yield "duplicates", f"{statistics['duplicates']:,} left out"
        if repeated := statistics.get("repeated", 0):
            yield "repeated", f"{repeated:,} of those kept are equal to an earlier one, and stay"
        aside = sum(self.quarantined.values())
        yield "set aside", f"{aside:,}" + (f" ({reasons(self.quarantined)}), see {QUARANTINE}" if aside else "")
        if len(files) > 1:
            told = files if len(files) <= FILES_SHOWN else [f for f in files if f["quarantined"] or f["duplicates"]]
            worst = sorted(told, key=lambda file: -sum(file["quarantined"].values()))[:FILES_SHOWN]
            for file in sorted(worst, key=files.index):
                yield "", _of_file(file)
            if len(told) > FILES_SHOWN:
                yield "", f"{len(told) - FILES_SHOWN:,} more files, with fewer rows set aside: see {MANIFEST}"
        if in_bytes := statistics.get("byte_tokens", 0):
            fraction = in_bytes / sum(part["tokens"] for part in self.manifest["splits"].values())
            advice = (
                "; a larger --vocab-size, or another --tokenizer, has more of them" if fraction > MANY_BYTES else ""
            )
            yield "bytes", f"{fraction:.2%} of the tokens are bytes of characters without a token{advice}"
        if random := statistics.get("random_smiles"):
            yield "random", _of_random(random)

    def table(self) -> str:
        """The lines with their values aligned."""
        lines = self.lines()
        width = max(len(label) for label, _ in lines)
        return "\n".join(f"{label:<{width}}  {value}" for label, value in lines)

    __str__ = table


def _of_random(counts: dict[str, Any]) -> str:
    """What became of the random SMILES."""
    texts = (1 + counts["count"]) * counts["molecules"]
    again = f", drawn again: {reasons(counts['drawn_again'])}" if counts["drawn_again"] else ""
    instead = counts["canonical_instead"]
    return (
        f"{counts['count']} SMILES of each training molecule beside the canonical one, seed {counts['seed']}: "
        f"{counts['distinct'] / texts:.1%} of all distinct within their molecule{again}"
        + (f", {instead:,} times the canonical one instead" if instead else "")
    )


def _of_file(counts: dict[str, Any]) -> str:
    parts = [f"{counts['kept']:,} kept"]
    parts += [f"{counts['duplicates']:,} duplicates"] if counts["duplicates"] else []
    parts += [reasons(counts["quarantined"])] if counts["quarantined"] else []
    return f"{counts['name']}: {counts['rows']:,} rows: {', '.join(parts)}"
