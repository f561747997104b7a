"""What a suite is: a list of tasks, each of which says its data, its labels, its metric and how it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from exlm_dist.finetuning.finetune_settings import TrainingSettings
from exlm_dist.utils.errors import ConfigError


@dataclass(frozen=True)
class Task:
    """A data set and how it is judged.

    Args:
        files: names that its file is known under, in lower case and without endings.
        inputs: names that its column of texts or molecules is known under.
        targets: its columns of labels; empty: all that are neither inputs nor `others`.
        others: columns that are no labels, where `targets` does not name the labels.
        kind: 'classification' or 'regression'.
        metric: decides which epoch is the best, and is shown first.
        protocols: how it is trained, by the name of the protocol.
    """

    name: str
    files: tuple[str, ...]
    inputs: tuple[str, ...]
    targets: tuple[str, ...]
    others: tuple[str, ...]
    kind: str
    metric: str
    protocols: Mapping[str, TrainingSettings]


@dataclass(frozen=True)
class Suite:
    """Tasks that are evaluated on the same terms.

    Args:
        domain: of the checkpoints that it can judge: 'smiles' or 'text'.
        splits: how its rows can be divided up. default_splits: those that are, where the user says nothing.
        protocols: their names, the first one being that where the user says nothing. probe: what differs from them
        where the encoder is frozen and the head alone is trained. embed_once: whether linear probes on embeddings can
        do its tasks.
    """

    name: str
    domain: str
    tasks: tuple[Task, ...]
    splits: tuple[str, ...]
    default_splits: tuple[str, ...]
    protocols: tuple[str, ...]
    probe: Mapping[str, float | int | bool]
    embed_once: bool = False

    def task(self, name: str) -> Task:
        """The task of that name. ConfigError, which lists them, if there is none."""
        found = next((task for task in self.tasks if task.name == name.lower()), None)
        if found is None:
            known = ", ".join(task.name for task in self.tasks)
            raise ConfigError(f"{self.name} has no task {name!r}; it has {known}.")
        return found
