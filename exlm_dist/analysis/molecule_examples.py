"""What a model of molecules makes of masks, drawn: the molecule that is there, and the most probable completions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rdkit import Chem
from rdkit.Chem.Draw import rdMolDraw2D

from exlm_dist.analysis.inspection import Inspection
from exlm_dist.inference.fill import FillSettings, fill_text
from exlm_dist.inference.loading import LoadedCheckpoint
from exlm_dist.utils.files import write_atomic

NAME = "molecules"
COMPLETIONS = 2
#: Pixels of a molecule with its legend.
WIDTH, HEIGHT = 420, 290
_MASK = "\u25a1"
_ATOM = re.compile(r"\[[^\]]*\]|Br|Cl|[BCNOSPFIbcnops]")


def plot_molecules(loaded: LoadedCheckpoint, inspections: Sequence[Inspection], folder: Path) -> Path:
    """A row for each sequence: the molecule, then its masks filled, best first, with the joint probability of all
    masked tokens. Atoms whose tokens were masked are marked; a completion that RDKit cannot read says so."""
    cells: list[tuple[str, list[int], str]] = []
    anchors = loaded.config.model.anchors
    for number, one in enumerate(inspections, 1):
        tokens = one.targets[1:-1] if anchors else one.targets
        cells.append((*_filled(one.text, tokens), f"{number}: the molecule, {len(tokens)} tokens masked"))
        truth = _canonical(cells[-1][0])
        found = fill_text(loaded, one.text.replace(_MASK, "<mask>"), FillSettings(top=COMPLETIONS)).completions
        for rank, completion in enumerate(found, 1):
            right = ", right" if truth and _canonical(completion.text) == truth else ""
            said = f"{number}: completion {rank}, probability {completion.probability:.2g}{right}"
            cells.append((*_filled(one.text, completion.tokens), said))
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / f"{NAME}.png", _drawn(cells))
    return folder / f"{NAME}.png"


def _filled(text: str, tokens: Sequence[str]) -> tuple[str, list[int]]:
    """(the text with its masks filled, numbers of the atoms that were masked)."""
    pieces, made, marked = text.split(_MASK), "", []
    for number, piece in enumerate(pieces):
        made += piece
        if number < len(tokens):
            if _ATOM.fullmatch(tokens[number]):
                marked.append(len(_ATOM.findall(made)))
            made += tokens[number]
    return made, marked


def _canonical(text: str) -> str | None:
    molecule = Chem.MolFromSmiles(text)
    return None if molecule is None else Chem.MolToSmiles(molecule)


def _drawn(cells: Sequence[tuple[str, list[int], str]]) -> bytes:
    across = COMPLETIONS + 1
    drawer = rdMolDraw2D.MolDraw2DCairo(across * WIDTH, len(cells) // across * HEIGHT, WIDTH, HEIGHT)
    drawer.drawOptions().legendFontSize = 18
    molecules, legends, marks = [], [], []
    for smiles, marked, said in cells:
        molecule = Chem.MolFromSmiles(smiles)
        if molecule is None:
            molecule = Chem.MolFromSmiles("*")  # a legend is drawn below atoms alone
            molecule.GetAtomWithIdx(0).SetProp("atomLabel", "not a molecule")
            marked = []
        molecules.append(molecule)
        legends.append(said)
        marks.append(marked if max(marked, default=-1) < molecule.GetNumAtoms() else [])
    drawer.DrawMolecules(molecules, legends=legends, highlightAtoms=marks)
    drawer.FinishDrawing()
    return drawer.GetDrawingText()
