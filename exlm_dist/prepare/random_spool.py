"""Random SMILES of the molecules that are prepared, drawn in parallel and kept in a file until they are encoded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from exlm_dist.data.random_smiles import ATTEMPTS, RandomSmiles, random_forms
from exlm_dist.prepare.folder import chunked
from exlm_dist.utils.progress import Progress
from exlm_dist.utils.workers import ordered_map

DRAWN_PER_TASK = 512


class Drawn(NamedTuple):
    """Random SMILES of some molecules: `forms[i]` has form i + 1 of each. Counts: the different texts of each molecule,
    its canonical one among them; draws that were not used, by reason; forms for which the canonical SMILES stands."""

    forms: list[list[str]]
    distinct: int
    again: Counter[str]
    canonical: int


class RandomForms:
    """The random SMILES of the training molecules, in a file while they are counted and encoded: of a task at a time
    first the form 1 of each molecule, then the form 2 and so on."""

    def __init__(self, path: Path, asked: RandomSmiles) -> None:
        self._path, self._asked = path, asked
        self._starts: list[list[int]] = []  # of each task: where its forms begin, and end
        self.molecules = 0
        self._distinct = self._canonical = 0
        self._again: Counter[str] = Counter()

    def draw(self, molecules: Iterable[str], total: int, policy: Mapping[str, Any], most: int, workers: int) -> None:
        """Draw the forms of `total` canonical SMILES, of at most `most` tokens each."""
        if not self._asked.count:
            return
        task = partial(draw_forms, dict(policy), most, self._asked)
        with open(self._path, "wb") as file, Progress("random SMILES", "molecules", total) as progress:
            for drawn in ordered_map(task, chunked(molecules, DRAWN_PER_TASK), workers):
                starts = [file.tell()]
                for texts in drawn.forms:
                    file.write("".join(f"{text}\n" for text in texts).encode("ascii"))
                    starts.append(file.tell())
                self._starts.append(starts)
                self.molecules += len(drawn.forms[0])
                self._distinct += drawn.distinct
                self._canonical += drawn.canonical
                self._again.update(drawn.again)
                progress.update(len(drawn.forms[0]))

    def read(self) -> Iterator[str]:
        """Form 1 of all molecules in their order, then form 2, and so on."""
        if not self._starts:
            return
        with open(self._path, "rb") as file:
            for form in range(self._asked.count):
                for starts in self._starts:
                    file.seek(starts[form])
                    yield from file.read(starts[form + 1] - starts[form]).decode("ascii").split("\n")[:-1]

    def statistics(self) -> dict[str, Any]:
        """The counts for the manifest; empty if no random SMILES were asked for."""
        if not self._asked.count:
            return {}
        return {
            "random_smiles": {
                "count": self._asked.count,
                "seed": self._asked.seed,
                "molecules": self.molecules,
                "distinct": self._distinct,
                "drawn_again": dict(self._again),
                "canonical_instead": self._canonical,
            }
        }


def draw_forms(policy: Mapping[str, Any], most: int, asked: RandomSmiles, molecules: list[str]) -> Drawn:
    """Forms 1 to `asked.count` of canonical SMILES; see `random_forms`."""
    again: Counter[str] = Counter()
    distinct = canonical = 0
    rows = []
    for smiles in molecules:
        row = []
        for text, problems in random_forms(smiles, policy, most, asked):
            again.update(problems)
            canonical += len(problems) == ATTEMPTS
            row.append(text)
        distinct += len({smiles, *row})
        rows.append(row)
    return Drawn([list(texts) for texts in zip(*rows)], distinct, again, canonical)
