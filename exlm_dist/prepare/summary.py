"""What a preparation did, from the manifest, printed as a short table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exlm_dist.data.manifest import QUARANTINE, SPLITS


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
        statistics, splits = self.manifest["statistics"], self.manifest["splits"]
        aside = sum(self.quarantined.values())
        reused = "  (prepared before from the same input and settings)" if self.reused else ""
        lines = [
            ("folder", f"{self.path}{reused}"),
            (
                "domain",
                f"{self.manifest['domain']}, vocabulary {self.manifest['vocab_size']:,}, "
                f"max length {self.manifest['max_length']}",
            ),
            (
                "read",
                f"{statistics['rows']:,} {statistics['unit']}"
                + (f", {statistics['duplicates']:,} duplicates left out" if statistics["duplicates"] else ""),
            ),
            ("set aside", f"{aside:,}" + (f" ({_reasons(self.quarantined)}), see {QUARANTINE}" if aside else "")),
        ]
        for split in SPLITS:
            part = splits[split]
            lines.append(
                (
                    split,
                    f"{part['sequences']:,} sequences, {part['tokens']:,} tokens, mean length "
                    f"{part['mean_length']:.1f}, unknown {part['unknown_rate']:.4%}, {len(part['shards'])} shard(s)",
                )
            )
        lines.append(("fingerprint", self.manifest["fingerprint"][:16]))
        if not self.reused:
            lines.append(("time", f"{self.seconds:.1f} s"))
        return lines

    def table(self) -> str:
        """The lines with their values aligned."""
        lines = self.lines()
        width = max(len(label) for label, _ in lines)
        return "\n".join(f"{label:<{width}}  {value}" for label, value in lines)

    __str__ = table


def _reasons(counts: dict[str, int]) -> str:
    return ", ".join(
        f"{count:,} {kind}" for kind, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    )
