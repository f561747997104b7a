"""Molecules through RDKit: parse, apply the canonicalisation policy, say why a text is not a molecule.

`canonical_smiles` is the one function that makes molecules ready for the tokenizer, in pretraining, evaluation and
fine-tuning; the policy that it follows is saved with the tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rdkit import Chem, rdBase
from rdkit import __version__ as RDKIT_VERSION

from exlm_dist.utils.errors import DataError

STEREO = ("keep", "drop")
SALTS = ("keep", "largest_fragment")
#: RDKit's writer calls itself for each atom of a chain: some 10,000 of them overflow the stack and end the process.
MOST_ATOMS, MOST_CHARACTERS = 5_000, 100_000
#: Passes within which RDKit's canonical form must come back to one it had before.
MOST_PASSES = 16

# RDKit writes one line per bad molecule to stderr; the reasons go to the quarantine file instead.
rdBase.DisableLog("rdApp.*")


class MoleculeError(DataError):
    """The text is not a molecule; the message is the reason alone."""


def make_policy(stereo: str = "keep", salts: str = "keep") -> dict[str, Any]:
    """The policy to save with a tokenizer.

    stereo: 'keep', or 'drop' to remove tetrahedral and double-bond stereo (isotopes stay). salts: 'keep', or
    'largest_fragment' to keep the fragment with the most heavy atoms. Raises DataError for other values.
    """
    for name, value, allowed in (("stereo", stereo, STEREO), ("salts", salts, SALTS)):
        if value not in allowed:
            raise DataError(f"{name} = {value!r}: must be one of {', '.join(allowed)}.")
    return {"canonical": True, "stereo": stereo, "salts": salts, "rdkit": RDKIT_VERSION}


def canonical_smiles(text: str, policy: Mapping[str, Any]) -> str:
    """Canonical SMILES of `text` under `policy` (see `make_policy`), which the same call leaves as it is.
    MoleculeError, with why, if `text` is not SMILES alone, cannot be parsed, or is too large for RDKit."""
    passes = [text]
    while len(passes) <= MOST_PASSES:
        passes.append(_one_pass(passes[-1], policy))
        if passes[-1] in passes[:-1]:  # nearly always the one before; else it goes round in a circle
            return min(passes[passes.index(passes[-1]) + 1 :])
    raise MoleculeError(f"no stable canonical form after {MOST_PASSES} passes")


def is_canonical_of(smiles: str, text: str, policy: Mapping[str, Any]) -> bool:
    """Whether `smiles`, canonical under `policy`, is that of `text`: whether both are one molecule. False if `text`
    cannot be read."""
    try:
        return _one_pass(text, policy) == smiles or canonical_smiles(text, policy) == smiles
    except MoleculeError:
        return False


class AtomOrders:
    """A molecule that can be written from its atoms in any order. MoleculeError if `text` cannot be parsed."""

    def __init__(self, text: str) -> None:
        self._molecule = _parsed(text)
        self.num_atoms: int = self._molecule.GetNumAtoms()

    def smiles(self, order: Sequence[int]) -> str:
        """SMILES with the atoms numbered as `order` says (order[i]: the present number of the i-th): begun at the
        first, at each branch on with the lower number, side chains before rings. RDKit's state is left alone."""
        return Chem.MolToSmiles(Chem.RenumberAtoms(self._molecule, list(order)), canonical=False)


def smiles_in(text: str) -> str:
    """The SMILES in a cell or line, without white space around it and without the extension of CXSMILES (` |...|`).
    MoleculeError if there is nothing or more."""
    words = text.split()
    if not words:
        raise MoleculeError("empty")
    if len(words) > 1 and not words[1].startswith("|"):
        raise MoleculeError("not SMILES")
    return words[0]


def _one_pass(text: str, policy: Mapping[str, Any]) -> str:
    """What RDKit writes of the molecule that it reads; not always what it writes of that again."""
    molecule = _parsed(text)
    if molecule.GetNumAtoms() == 0:
        raise MoleculeError("no atoms")
    if policy["salts"] == "largest_fragment" and "." in text:
        molecule = _largest_fragment(molecule)
    if policy["stereo"] == "drop":
        Chem.RemoveStereochemistry(molecule)
    return Chem.MolToSmiles(molecule)


def _parsed(text: str) -> Chem.Mol:
    """The molecule in `text`. RDKit's parser would drop all after white space, and at both ends of the text whatever is
    not printable ASCII."""
    if not (text.isascii() and text.isprintable()) or " " in text:
        raise MoleculeError("not SMILES")
    if len(text) > MOST_CHARACTERS:
        raise MoleculeError(f"too large: {len(text):,} characters, RDKit is given {MOST_CHARACTERS:,} at most")
    molecule = Chem.MolFromSmiles(text)
    if molecule is None:
        raise MoleculeError(_why(text))
    if molecule.GetNumAtoms() > MOST_ATOMS:  # type: ignore[unreachable]  # as below
        raise MoleculeError(f"too large: {molecule.GetNumAtoms():,} atoms, RDKit is given {MOST_ATOMS:,} at most")
    return molecule


def _largest_fragment(molecule: Chem.Mol) -> Chem.Mol:
    """Fragment with the most heavy atoms; ties by all atoms, then by SMILES, so the order in the text has no effect."""
    fragments = Chem.GetMolFrags(molecule, asMols=True)
    return max(fragments, key=lambda part: (part.GetNumHeavyAtoms(), part.GetNumAtoms(), Chem.MolToSmiles(part)))


def _why(text: str) -> str:
    """Why RDKit refused `text`, in a few words."""
    molecule = Chem.MolFromSmiles(text, sanitize=False)
    if molecule is None:
        return "not SMILES"  # type: ignore[unreachable]  # the stub leaves out that None is returned
    problems = Chem.DetectChemistryProblems(molecule)
    return "chemistry: " + (problems[0].Message() if problems else "RDKit cannot sanitise it")


def murcko_scaffold(text: str, *, chirality: bool = True) -> str:
    """Canonical SMILES of the Bemis-Murcko scaffold (J. Med. Chem. 1996, 39, 2887): the rings and what links them; ''
    for a molecule without rings. `chirality`: keep stereo centres. MoleculeError if `text` cannot be parsed."""
    from rdkit.Chem.Scaffolds import MurckoScaffold

    return MurckoScaffold.MurckoScaffoldSmiles(mol=_parsed(text), includeChirality=chirality)


def morgan_counts(text: str, *, radius: int, size: int) -> np.ndarray:
    """Extended-connectivity fingerprint (Rogers and Hahn, J. Chem. Inf. Model. 2010, 50, 742): how often each
    circular environment of up to `radius` bonds occurs, folded into `size` counts, uint8 [size]. MoleculeError if
    `text` cannot be parsed."""
    from rdkit.Chem import rdFingerprintGenerator

    molecule = _parsed(text)
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=radius, fpSize=size)
    return np.minimum(generator.GetCountFingerprintAsNumPy(molecule), 255).astype(np.uint8)
