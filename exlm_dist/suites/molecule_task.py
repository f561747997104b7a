"""Tasks whose data is one table of molecules."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exlm_dist.suites.data_files import files_below, names_of_tables, only_one
from exlm_dist.suites.suite import Task

if TYPE_CHECKING:
    from exlm_dist.suites.molecule_data import MoleculeData

#: Folders below that of the data in which files are looked for: `tox21/raw/tox21.csv` is one form of download.
DEEPEST = 3


@dataclass(frozen=True, kw_only=True)
class MoleculeTask(Task):
    """See `Task`.

    Args:
        files: names that its file is known under, in lower case and without endings.
        inputs: names that its column of molecules is known under.
        targets: its columns of labels; empty: all that are neither inputs nor `others`.
        others: columns that are no labels, where `targets` does not name the labels.
    """

    files: tuple[str, ...]
    inputs: tuple[str, ...]
    targets: tuple[str, ...]
    others: tuple[str, ...]

    def find(self, folder: Path) -> dict[str, Path | None]:
        """See `Task.find`."""
        names = names_of_tables(self.files)
        found = [path for path in files_below(folder, DEEPEST) if path.name.lower() in names]
        return {" or ".join(f"{name}.csv" for name in self.files): only_one(self.name, found, folder)}

    def read(self, files: tuple[Path, ...]) -> MoleculeData:
        """See `read_molecules`."""
        from exlm_dist.suites.molecule_data import read_molecules

        return read_molecules(self, files)
