"""What a run reads: one folder of data or several that are mixed, and how that changes from phase to phase."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from exlm_dist.config.setting_types import Section, UserPath


class Amount(Section):
    """How much of what is read comes from a source: one of the two, or neither for nothing."""

    weight: float = Field(
        0.0, ge=0, description="Its fraction of the sequences, relative to the weights of the other sources."
    )
    epochs: float = Field(
        0.0,
        ge=0,
        description="Passes over it within the phase (without phases, within the run); sources with a weight take the rest.",
    )


def as_amount(given: Any) -> Any:
    """A bare number is a weight."""
    if isinstance(given, (dict, Amount)):
        return given
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        return {"weight": given}
    raise PydanticCustomError("amount", "Input should be a weight (a number) or {epochs: NUMBER}")


class SourceConfig(Amount):
    """A folder of data among several."""

    path: UserPath = Field(min_length=1, description="Folder of the source, as `data.path` is one.")


class PhaseMasking(Section):
    """Masking in a phase."""

    ratio: float = Field(0.0, ge=0, lt=1, description="The ratio in this phase; 0: `masking.ratio`.")


class PhaseConfig(Section):
    """Parts of a run with data or a masking ratio of their own, a list; none: the run is one (docs/mixtures.md)."""

    steps: int = Field(0, ge=0, description="Optimizer steps; left out in the last phase, which lasts until the end.")
    sources: dict[str, Annotated[Amount, BeforeValidator(as_amount)]] = Field(
        {},
        description="Sources that are read, each with its weight (a bare number) or `{epochs: ...}`; empty: all, as `data.sources` says.",
    )
    masking: PhaseMasking = PhaseMasking()


class DataConfig(Section):
    """Where the prepared shards are and how they are read."""

    path: UserPath = Field(
        "",
        description="Folder written by `exlm prepare` or `exlm data index`: manifest, tokenizer, index, shards; or its address (http, s3, gs, hf). Empty where `sources` are given.",
    )
    sources: dict[str, SourceConfig] = Field(
        {},
        description="Instead of `path`: several such folders, by names of your choice, that are mixed (docs/mixtures.md).",
    )
    bucket: int = Field(
        1,
        ge=1,
        description="Packed sizes T, S and N are rounded up to a multiple of this (1: exact sizes); repeating shapes let a GPU replay one graph.",
    )
    prefetch: int = Field(
        2, ge=0, le=64, description="Global steps packed ahead by a background thread; 0 packs in the training thread."
    )
    workers: int = Field(
        2,
        ge=0,
        le=64,
        description="Processes of each rank that read and tokenize shards of `exlm data index`; 0 does it in the background thread. Prepared shards need none.",
    )
    shuffle: Literal["full", "windows"] = Field(
        "full",
        description="Order of the samples of an epoch. full: one permutation of all; windows: blocks of consecutive samples are permuted, and the samples within each window of them, so that data of any size is read in blocks (docs/data-order.md).",
    )
    block: int = Field(512, ge=1, description="Consecutive samples that are read as one block (shuffle windows).")
    window: int = Field(1024, ge=1, description="Blocks whose samples are permuted as one window (shuffle windows).")
    max_bad_records: float = Field(
        1e-4,
        ge=0,
        le=1,
        description="Fraction of damaged records (checksum mismatch) above which the run stops; below it each is reported and replaced by another, always the same one.",
    )

    @property
    def paths(self) -> tuple[str, ...]:
        """The folders of all sources, in order."""
        return tuple(source.path for source in self.sources.values()) or (self.path,)

    @property
    def described(self) -> str:
        """The folders in words: `data/zinc`, or `zinc: data/zinc, chembl: data/chembl`."""
        return ", ".join(f"{name}: {source.path}" for name, source in self.sources.items()) or self.path
