"""Tasks of questions about texts, in the files of SQuAD."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exlm_dist.suites.data_files import files_below, names_of_tables, only_one
from exlm_dist.suites.suite import Task

if TYPE_CHECKING:
    from exlm_dist.suites.squad_data import SquadData

#: Folders below that of the data in which the files are looked for.
DEEPEST = 3
#: The file of each part, before its version.
PARTS = {"train": "train", "valid": "dev"}


@dataclass(frozen=True, kw_only=True)
class SquadTask(Task):
    """See `Task`. version: in the names of its files."""

    version: str

    def find(self, folder: Path) -> dict[str, Path | None]:
        """See `Task.find`."""
        below = files_below(folder, DEEPEST)
        found: dict[str, Path | None] = {}
        for stem in (f"{part}-{self.version}" for part in PARTS.values()):
            names = names_of_tables([stem], [".json"])
            own = [path for path in below if path.name.lower() in names]
            found[f"{stem}.json"] = only_one(f"{self.name} {stem}", own, folder)
        return found

    def read(self, files: tuple[Path, ...]) -> SquadData:
        """See `read_squad`."""
        from exlm_dist.suites.squad_data import read_squad

        return read_squad(dict(zip(PARTS, files)))
