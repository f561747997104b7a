"""The demo corpus of molecules: fragments of well-known drugs, recombined at random from a seed.

The drugs are cut at BRICS bonds (Degen et al., ChemMedChem 2008) into pieces with one open bond (heads) or two (links),
which are joined head-head or head-link-head where BRICS allows the bond. They are joined as SMILES text, which is much
faster than a reaction; RDKit then parses and canonicalises the result, so only valid molecules come out.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from rdkit import Chem
from rdkit import __version__ as RDKIT_VERSION
from rdkit.Chem import BRICS

from exlm_dist.prepare.demo.drugs import DRUGS
from exlm_dist.prepare.folder import Source, chunked
from exlm_dist.prepare.smiles import prepare_smiles
from exlm_dist.prepare.summary import Summary
from exlm_dist.tables.records import Row
from exlm_dist.tokenizers.molecules import MoleculeError, canonical_smiles, make_policy
from exlm_dist.tokenizers.smiles_tokenizer import split_smiles
from exlm_dist.utils.cores import available_cores
from exlm_dist.utils.errors import DataError
from exlm_dist.utils.workers import ordered_map

DEMO_MOLECULES = 24_000
CANDIDATES_PER_TASK = 512
MIN_ATOMS, MAX_ATOMS = 8, 45
_OPEN = re.compile(r"\[(\d+)\*\]")


def prepare_demo_smiles(
    out: Path | str,
    *,
    count: int = DEMO_MOLECULES,
    seed: int = 0,
    max_length: int = 128,
    workers: int | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> Summary:
    """Prepare `count` demo molecules as the folder `out`. `settings`: as in `prepare_smiles`."""
    identity = [{"name": "demo molecules", "count": count, "seed": seed, "rdkit": RDKIT_VERSION}]

    def rows() -> Iterator[Row]:
        for number, smiles in enumerate(demo_molecules(count, seed, workers or available_cores()), 1):
            yield Row("demo", number, smiles)

    return prepare_smiles(
        Source(identity, rows, canonical_under=_POLICY),
        out,
        max_length=max_length,
        workers=workers,
        overwrite=overwrite,
        **settings,
    )


def demo_molecules(count: int = DEMO_MOLECULES, seed: int = 0, workers: int = 1) -> Iterator[str]:
    """`count` distinct canonical SMILES, a function of seed and RDKit version: the drugs first, then recombinations.

    Raises DataError if the fragments do not yield that many.
    """
    seen: set[str] = set()
    misses = 0
    for finished in ordered_map(
        finish_candidates, chunked(_candidates(random.Random(seed)), CANDIDATES_PER_TASK), workers
    ):
        for smiles in finished:
            if len(seen) == count:
                return
            if not smiles or smiles in seen:
                misses += 1
                continue
            seen.add(smiles)
            yield smiles
        if misses > 20 * count + 1000:
            raise DataError(f"the demo fragments yield only {len(seen):,} molecules; {count:,} were asked for.")


def _candidates(generator: random.Random) -> Iterator[str]:
    """Drugs, then an endless stream of joined pieces."""
    yield from DRUGS.values()
    heads, links = fragments()
    partners = _partners(heads)
    starts = [head for label in sorted(heads) if partners[label] for head in heads[label]]
    while True:
        if _draw(generator, 3) and links:
            first, middle, second = links[_draw(generator, len(links))]
            if partners[first] and partners[second]:
                one = partners[first][_draw(generator, len(partners[first]))]
                two = partners[second][_draw(generator, len(partners[second]))]
                yield _filled(middle, [one, two])
        else:
            label, text = starts[_draw(generator, len(starts))]
            other = partners[label][_draw(generator, len(partners[label]))]
            yield _filled(f"[{label}*]{text}", [other])


def fragments() -> tuple[dict[str, list[tuple[str, str]]], list[tuple[str, str, str]]]:
    """Pieces of the drugs: heads by BRICS label, (label, SMILES after the open bond); links, (label, label, SMILES)."""
    heads: dict[str, dict[str, None]] = defaultdict(dict)
    links: dict[tuple[str, str, str], None] = {}
    for drug in DRUGS.values():
        molecule = Chem.MolFromSmiles(drug)
        bonds = sorted(
            (tuple(sorted(pair)), labels)
            for pair, labels in BRICS.FindBRICSBonds(molecule)
            if "7" not in labels[0] + labels[1]  # label 7 is a double bond
        )
        for cut in [*([bond] for bond in bonds), *map(list, combinations(bonds, 2))]:
            for piece in Chem.GetMolFrags(BRICS.BreakBRICSBonds(molecule, cut), asMols=True):
                ends = [atom for atom in piece.GetAtoms() if atom.GetAtomicNum() == 0]
                text = Chem.MolToSmiles(piece, rootedAtAtom=ends[0].GetIdx())
                labels = [str(atom) for atom in _OPEN.findall(text)]
                if len(labels) == 1:
                    heads[labels[0]][text[text.index("]") + 1 :]] = None
                elif len(labels) == 2:
                    links[(labels[0], labels[1], text)] = None
    return {label: [(label, text) for text in texts] for label, texts in heads.items()}, list(links)


def _partners(heads: dict[str, list[tuple[str, str]]]) -> dict[str, list[str]]:
    """For each label, the heads that BRICS lets it bond to by a single bond."""
    allowed: dict[str, set[str]] = defaultdict(set)
    for group in BRICS.reactionDefs:
        for first, second, bond in group:
            if bond == "-":
                allowed[first].add(second)
                allowed[second].add(first)
    allowed = {
        re.sub(r"\D", "", label): {re.sub(r"\D", "", other) for other in others} for label, others in allowed.items()
    }
    return defaultdict(
        list,
        {
            label: [text for other in sorted(others) for _, text in heads.get(other, [])]
            for label, others in allowed.items()
        },
    )


def _filled(scaffold: str, pieces: list[str]) -> str:
    """`scaffold` with each open bond replaced by the next of `pieces`; a leading one becomes a chain in front."""
    for number, piece in enumerate(pieces):
        bond = _OPEN.search(scaffold)
        assert bond is not None, "as many open bonds as pieces"
        piece = _renumbered(piece, 40 + 20 * number)
        if bond.start() == 0:
            # The first atoms are joined by a ring-closure label, so that the piece need not be reversed.
            closing = f"%{90 + number}"
            tokens, own = _tokens(piece), _tokens(scaffold[bond.end() :])
            scaffold = f"{own[0]}{closing}{''.join(own[1:])}.{tokens[0]}{closing}{''.join(tokens[1:])}"
        else:
            scaffold = scaffold[: bond.start()] + piece + scaffold[bond.end() :]
    return scaffold


def _renumbered(smiles: str, base: int) -> str:
    """`smiles` with its ring-closure numbers raised by `base`, so that they differ from those of the scaffold."""
    return "".join(
        f"%{base + int(token.lstrip('%'))}" if token.lstrip("%").isdigit() else token for token in _tokens(smiles)
    )


def _tokens(smiles: str) -> list[str]:
    tokens = split_smiles(smiles)
    assert tokens is not None, f"RDKit wrote {smiles}"
    return tokens


def finish_candidates(candidates: list[str]) -> list[str]:
    """Canonical SMILES of each; empty if it is not a molecule, or not one of the size of a drug."""
    finished = []
    for candidate in candidates:
        try:
            smiles = canonical_smiles(candidate, _POLICY)
        except MoleculeError:
            smiles = ""
        atoms = sum(token[0].isalpha() or token[0] == "[" for token in _tokens(smiles))
        finished.append(smiles if MIN_ATOMS <= atoms <= MAX_ATOMS or candidate in _DRUGS else "")
    return finished


def _draw(generator: random.Random, size: int) -> int:
    """Integer in [0, size), from `random()` because its stream is the same in every version of Python."""
    return int(generator.random() * size)


_POLICY = make_policy()
_DRUGS = frozenset(DRUGS.values())
