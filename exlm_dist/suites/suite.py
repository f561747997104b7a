"""What a suite is: tasks, each of which finds and reads its data, and says its metric and how it is trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exlm_dist.finetuning.finetune_settings import TrainingSettings
from exlm_dist.utils.errors import ConfigError

if TYPE_CHECKING:  # the command knows the suites before it needs torch
    from exlm_dist.suites.task_data import TaskData

#: Name of the split whose parts are those of the files.
OFFICIAL = "official"
#: (part, metric)
Figure = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A data set and how it is judged. Kinds of suites differ in how they find and read their data.

    Args:
        kind: 'classification', 'regression' or 'answers'. metric: decides which epoch is the best, and is shown first.
        protocols: how it is trained, by the name of the protocol. also: what else the table shows of it. averaged:
        whether it counts in the mean of the suite.
    """

    name: str
    kind: str
    metric: str
    protocols: Mapping[str, TrainingSettings]
    also: tuple[Figure, ...] = ()
    averaged: bool = True

    @abstractmethod
    def find(self, folder: Path) -> dict[str, Path | None]:
        """Its files in or below the folder, each by the name that the field knows it under; None for one that is not
        there. DataError if several could be it."""

    @abstractmethod
    def read(self, files: tuple[Path, ...]) -> TaskData:
        """Its rows, from the files in the order of `find`. DataError if they are not what the task has."""


@dataclass(frozen=True)
class Baseline:
    """What knows no pretraining. name: as `--checkpoint` has it. kinds: its methods. seeded: whether the seed decides
    anything."""

    name: str
    kinds: tuple[str, ...]
    seeded: bool = True

    def label(self, kind: str) -> str:
        """What the table calls one of its methods."""
        return self.name if self.kinds == (self.name,) else f"{self.name}, {kind}"

    @property
    def best(self) -> str:
        """What the best of its methods is called."""
        return self.name if len(self.kinds) == 1 else f"the better of the {self.name}"


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Tasks that are evaluated on the same terms.

    Args:
        domain: of the checkpoints that it can judge: 'smiles' or 'text'. part: whose figures are shown: 'test', or
        'valid' where the labels of the test part are hidden.
        splits: how its rows can be divided up. default_splits: those that are, where the user says nothing.
        protocols: their names, the first one being that where the user says nothing. probe: what differs from them
        where the encoder is frozen and the head alone is trained. embed_once: whether linear probes on embeddings can
        do its tasks.
    """

    name: str
    domain: str
    tasks: tuple[Task, ...]
    part: str
    splits: tuple[str, ...]
    default_splits: tuple[str, ...]
    protocols: tuple[str, ...]
    probe: Mapping[str, float | int | bool | str]
    embed_once: bool = False
    baselines: tuple[Baseline, ...] = ()

    def task(self, name: str) -> Task:
        """The task of that name. ConfigError, which lists them, if there is none."""
        found = next((task for task in self.tasks if task.name == name.lower()), None)
        if found is None:
            known = ", ".join(task.name for task in self.tasks)
            raise ConfigError(f"{self.name} has no task {name!r}; it has {known}.")
        return found
