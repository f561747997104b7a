"""One cell of the suite `masked`: a checkpoint asked for the masked tokens of the same sequences at one ratio."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from pathlib import Path

from exlm_dist.checkpoint.reader import TOKENIZER_FOLDER
from exlm_dist.data.recipe import Dataset
from exlm_dist.evaluation.masked_measures import MaskedSettings, measure_masked
from exlm_dist.finetuning.model_folder import without_nan
from exlm_dist.inference.loading import LoadedCheckpoint, load_checkpoint
from exlm_dist.suites.cells import Cell, claimed, publish_result
from exlm_dist.suites.masked_data import MaskedSource, choose_samples
from exlm_dist.tokenizers import load_tokenizer
from exlm_dist.utils.version import VERSION, git_commit

MASKED = "masked"


@dataclass(frozen=True)
class MaskedOrder:
    """A cell to be computed. Its grid says the ratio, and for repeated tokens the copies.

    Args:
        sequences, longest: the first so many of at most so many tokens. complete: of how many completions are searched.
    """

    out: Path
    source: MaskedSource
    sequences: int
    longest: int
    complete: int
    cell: Cell

    @property
    def settings(self) -> MaskedSettings:
        """What is masked."""
        grid = dict(self.cell.grid)
        copies = int(grid["copies"]) if "copies" in grid else None
        return MaskedSettings(float(grid["ratio"]), self.cell.seed, copies, self.complete)

    def compute(self, device: str, threads: int) -> bool:
        """Measure and publish; False if the result was there already. Busy if another process is at it; errors of the
        data and of the checkpoint as they come. Threads are those that its process has."""
        path = self.cell.path(self.out)
        with claimed(path) as partial:
            if partial is None:
                return False
            started = time.monotonic()
            assert self.cell.method.checkpoint is not None
            loaded = _loaded(self.cell.method.checkpoint, device)
            dataset = _opened(self.source, loaded.folder)
            samples, _ = choose_samples(dataset, self.longest, self.sequences)
            measured = measure_masked(loaded, dataset, samples, self.settings)
            result = {
                "suite": MASKED,
                **self.cell.described(),
                "metric": "nll",
                "scores": {self.source.part: measured["scores"]},
                "tables": measured["tables"],
                "positions": measured["positions"],
                "data_sha256": self.source.fingerprint,
                "seconds": round(time.monotonic() - started, 2),
                "device": loaded.device.type,
                "versions": {"exlm_dist": VERSION, "git": git_commit()},
            }
            publish_result(path, without_nan(result))
            return True


# The cells of a checkpoint come one after another: it stays in memory, and so does the data.
@functools.lru_cache(maxsize=1)
def _loaded(checkpoint: Path, device: str) -> LoadedCheckpoint:
    return load_checkpoint(checkpoint, device=device)


@functools.lru_cache(maxsize=1)
def _opened(source: MaskedSource, checkpoint: Path) -> Dataset:
    return source.open(load_tokenizer(checkpoint / TOKENIZER_FOLDER))
