"""Random SMILES of a molecule: the same molecule, its atoms written in another order.

As an augmentation: SMILES enumeration (Bjerrum, arXiv 1703.07076). Atoms are renumbered at random and written by RDKit
without its canonical ranks, the "restricted" randomised SMILES of Arús-Pous et al. (J. Cheminform. 2019, 11, 71).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from exlm_dist.data.counter_rng import PURPOSE_SMILES, hash_of, words_at
from exlm_dist.tokenizers.smiles_tokenizer import split_smiles
from exlm_dist.utils.errors import ConfigError
from exlm_dist.utils.files import content_hash

if TYPE_CHECKING:
    from exlm_dist.tokenizers.molecules import AtomOrders

#: Draws of a random SMILES before the canonical one is taken.
ATTEMPTS = 8


@dataclass(frozen=True)
class RandomSmiles:
    """How many random SMILES each training molecule has beside the canonical one, and the seed that decides which.
    ConfigError for numbers that cannot be."""

    count: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ConfigError(
                f"random_smiles = {self.count}: must be 1 or more, or 0, the default, for canonical SMILES alone."
            )
        if not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"random_seed = {self.seed}: must be from 0 to 2^63 - 1.")

    def settings(self) -> dict[str, int]:
        """What decides the result, by name; nothing where no random SMILES are asked for."""
        return {"random_smiles": self.count, "random_seed": self.seed} if self.count else {}


def random_forms(
    smiles: str, policy: Mapping[str, Any], most: int, asked: RandomSmiles
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Forms 1 to `asked.count` of a molecule, given by its canonical SMILES under `policy`; with each, why the draws
    before it were not used.

    A form is a random SMILES of at most `most` tokens that is read as the same molecule; the canonical one if
    `ATTEMPTS` draws gave none. It is a pure function of seed, molecule and number: the same whatever the count.
    """
    atoms = _atoms_of(smiles)
    for form in range(1, asked.count + 1):
        again: list[str] = []
        text = drawn_form(smiles, atoms, seed=asked.seed, form=form, attempt=0)
        while len(again) < ATTEMPTS and (problem := _problem(text, smiles, policy, most)):
            again.append(problem)
            text = drawn_form(smiles, atoms, seed=asked.seed, form=form, attempt=len(again))
        yield text, tuple(again)


def drawn_form(smiles: str, atoms: AtomOrders | None = None, *, seed: int, form: int, attempt: int) -> str:
    """A random SMILES of the molecule `smiles` (`atoms`: its own, where they are known), whatever its length; after
    `ATTEMPTS` attempts `smiles`."""
    if attempt == ATTEMPTS:
        return smiles
    atoms = atoms or _atoms_of(smiles)
    return atoms.smiles(atom_order(smiles, atoms.num_atoms, seed=seed, form=form, attempt=attempt).tolist())


def atom_order(smiles: str, num_atoms: int, *, seed: int, form: int, attempt: int = 0) -> np.ndarray:
    """A permutation of the atoms, int64 [num_atoms]: a pure function of the seed, the molecule (by its canonical
    SMILES, so that its place in the input means nothing), the number of the form, and the attempt."""
    key = hash_of(PURPOSE_SMILES, seed, content_hash(smiles.encode()), form, attempt)
    return np.argsort(words_at(key, np.arange(num_atoms)), kind="stable")


def _atoms_of(smiles: str) -> AtomOrders:
    from exlm_dist.tokenizers.molecules import AtomOrders

    return AtomOrders(smiles)


def _problem(text: str, smiles: str, policy: Mapping[str, Any], most: int) -> str:
    """Why `text` cannot stand for the canonical `smiles`; empty if it can."""
    from exlm_dist.tokenizers.molecules import is_canonical_of

    tokens = split_smiles(text)
    if tokens is None:
        return "not tokenisable"
    if len(tokens) > most:
        return "too long"
    return "" if is_canonical_of(smiles, text, policy) else "another molecule"
