"""Random SMILES of a molecule: the same molecule, its atoms written in another order.

As an augmentation: SMILES enumeration (Bjerrum, arXiv 1703.07076). Atoms are renumbered at random and written by RDKit
without its canonical ranks, the "restricted" randomised SMILES of Arús-Pous et al. (J. Cheminform. 2019, 11, 71).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from exlm_dist.data.counter_rng import PURPOSE_SMILES, hash_of, words_at
from exlm_dist.prepare.folder import chunked, content_hash
from exlm_dist.tokenizers.molecules import AtomOrders, is_canonical_of
from exlm_dist.tokenizers.smiles_tokenizer import split_smiles
from exlm_dist.utils.errors import DataError
from exlm_dist.utils.progress import Progress
from exlm_dist.utils.workers import ordered_map

DRAWN_PER_TASK = 512
#: Draws of a random SMILES before the canonical one is taken.
ATTEMPTS = 8


class RandomSmiles(NamedTuple):
    """How many random SMILES each training molecule has beside the canonical one, and the seed that decides which."""

    count: int = 0
    seed: int = 0

    def check(self) -> None:
        """DataError for numbers that cannot be."""
        if self.count < 0:
            raise DataError(
                f"random_smiles = {self.count}: must be 1 or more, or 0, the default, for canonical SMILES alone."
            )
        if not 0 <= self.seed < 1 << 63:
            raise DataError(f"random_seed = {self.seed}: must be from 0 to 2^63 - 1.")

    def settings(self) -> dict[str, int]:
        """What decides the result, by name; nothing where no random SMILES are asked for."""
        return {"random_smiles": self.count, "random_seed": self.seed} if self.count else {}


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

    def draw(self, molecules: Iterable[str], policy: Mapping[str, Any], most: int, workers: int) -> None:
        """Draw the forms of the canonical SMILES `molecules`, of at most `most` tokens each."""
        if not self._asked.count:
            return
        task = partial(draw_forms, dict(policy), most, self._asked)
        with open(self._path, "wb") as file, Progress("random SMILES", "molecules") as progress:
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
                **self._asked._asdict(),
                "molecules": self.molecules,
                "distinct": self._distinct,
                "drawn_again": dict(self._again),
                "canonical_instead": self._canonical,
            }
        }


def draw_forms(policy: Mapping[str, Any], most: int, asked: RandomSmiles, molecules: list[str]) -> Drawn:
    """Forms 1 to `asked.count` of canonical SMILES; see `random_form`."""
    again: Counter[str] = Counter()
    distinct = canonical = 0
    rows = []
    for smiles in molecules:
        atoms = AtomOrders(smiles)
        row = []
        for number in range(1, asked.count + 1):
            text, problems = random_form(smiles, atoms, policy, most, seed=asked.seed, form=number)
            again.update(problems)
            canonical += len(problems) == ATTEMPTS
            row.append(text)
        distinct += len({smiles, *row})
        rows.append(row)
    return Drawn([list(texts) for texts in zip(*rows)], distinct, again, canonical)


def random_form(
    smiles: str, atoms: AtomOrders, policy: Mapping[str, Any], most: int, *, seed: int, form: int
) -> tuple[str, list[str]]:
    """Form number `form` of a molecule, given by its canonical SMILES under `policy` and its atoms; and why others were
    drawn before.

    A random SMILES of at most `most` tokens that is read as the same molecule; the canonical one if `ATTEMPTS` draws
    gave none. A pure function of seed, molecule and form.
    """
    problems: list[str] = []
    while len(problems) < ATTEMPTS:
        order = atom_order(smiles, atoms.num_atoms, seed=seed, form=form, attempt=len(problems))
        text = atoms.smiles(order.tolist())
        if not (problem := _problem(text, smiles, policy, most)):
            return text, problems
        problems.append(problem)
    return smiles, problems


def atom_order(smiles: str, num_atoms: int, *, seed: int, form: int, attempt: int = 0) -> np.ndarray:
    """A permutation of the atoms, int64 [num_atoms]: a pure function of the seed, the molecule (by its canonical
    SMILES, so that its place in the input means nothing), the number of the form, and the attempt."""
    key = hash_of(PURPOSE_SMILES, seed, content_hash(smiles.encode()), form, attempt)
    return np.argsort(words_at(key, np.arange(num_atoms)), kind="stable")


def _problem(text: str, smiles: str, policy: Mapping[str, Any], most: int) -> str:
    """Why `text` cannot stand for the canonical `smiles`; empty if it can."""
    tokens = split_smiles(text)
    if tokens is None:
        return "not tokenisable"
    if len(tokens) > most:
        return "too long"
    return "" if is_canonical_of(smiles, text, policy) else "another molecule"
