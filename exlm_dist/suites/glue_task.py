"""Tasks of one or two sentences whose parts are files, as GLUE is downloaded: its zip archive, or a table for each part
as the Hugging Face hub has them (parquet or JSON lines)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exlm_dist.suites.data_files import files_below, names_of_tables, only_one
from exlm_dist.suites.suite import Task

if TYPE_CHECKING:
    from exlm_dist.suites.task_data import TaskData

#: Folders below that of the data in which the folders of tasks are looked for, and the files one level below.
DEEPEST = 3
#: What the hub puts behind the name of a part.
WHOLE = "-00000-of-00001"
#: How a part is called, by what the zip archive calls it.
PART_NAMES = {
    "train": ("train",),
    "dev": ("dev", "valid", "validation"),
    "dev_matched": ("dev_matched", "validation_matched"),
    "dev_mismatched": ("dev_mismatched", "validation_mismatched"),
}


@dataclass(frozen=True, kw_only=True)
class GlueTask(Task):
    """See `Task`.

    Args:
        folder: its folder in the zip archive. parts: the file of each part, in the words of the archive. inputs: names
        of its columns of sentences, in each form of download. label_names: likewise of its column of labels.
        labels: its classes in the order in which the hub numbers them. limits: of values, smallest and largest.
        headerless: where the columns are in the archive's files, if those have no header.
    """

    folder: str
    parts: tuple[tuple[str, str], ...] = (("train", "train"), ("valid", "dev"))
    inputs: tuple[tuple[str, ...], ...]
    label_names: tuple[str, ...] = ("label",)
    labels: tuple[str, ...] = ()
    limits: tuple[float, float] = (0.0, 0.0)
    headerless: tuple[tuple[str, str], ...] = ()

    def find(self, folder: Path) -> dict[str, Path | None]:
        """See `Task.find`."""
        below = files_below(folder, DEEPEST)
        inside = [path for path in below if _plain(path.parent.name) in (self.name, _plain(self.folder))]
        found: dict[str, Path | None] = {}
        for _, name in self.parts:
            names = names_of_tables(f"{stem}{end}" for stem in PART_NAMES[name] for end in ("", WHOLE))
            own = [path for path in inside if path.name.lower() in names]
            found[f"{self.folder}/{name}.tsv"] = only_one(f"{self.name} {name}", own, folder)
        return found

    def read(self, files: tuple[Path, ...]) -> TaskData:
        """See `read_sentences`."""
        from exlm_dist.suites.sentence_data import read_sentences

        return read_sentences(self, files)


def _plain(name: str) -> str:
    """The name of a folder without what people write differently: SST-2, sst2."""
    return "".join(character for character in name.lower() if character.isalnum())
