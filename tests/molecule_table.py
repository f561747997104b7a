"""A table of molecules with labels of each kind, and the command that fine-tunes on it, for tests."""

from __future__ import annotations

import csv
from pathlib import Path

CORES = ["c1ccccc1", "C1CCNCC1", "c1ccc(O)cc1", "CC(=O)O", "N(C)C", "c1ccccc1CCN"]


def molecules(count: int = 60) -> list[str]:
    """Distinct molecules: chains of growing length on each of the cores."""
    return ["C" * (1 + number // len(CORES)) + CORES[number % len(CORES)] for number in range(count)]


def molecule_rows(count: int = 60) -> list[dict[str, str]]:
    """Rows with labels that follow from the molecule; every fourth `partly` is missing."""
    return [
        {
            "id": f"m{number}",
            "smiles": smiles,
            "active": str(int("N" in smiles)),
            "length": f"{len(smiles) + 0.25 * (number % 3):.2f}",
            "kind": "abc"[number % 3],
            "partly": "" if number % 4 == 0 else str(int("O" in smiles)),
            "part": ("train", "train", "train", "valid", "test")[number % 5],
        }
        for number, smiles in enumerate(molecules(count))
    ]


def write_table(path: Path, table: list[dict[str, str]]) -> Path:
    """Write rows as csv."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    return path


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a csv."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def finetune_arguments(checkpoint: Path, table: Path, out: Path, **options: object) -> list[str]:
    """Command line of a short fine-tuning of `active`, split by the column `part`."""
    given: dict[str, object] = {
        "target": ["active"],
        "checkpoint": checkpoint,
        "out": out,
        "split": ["column", "part"],
        "epochs": 2,
        "batch": 16,
        "lr": 0.01,
        "device": "cpu",
        **options,
    }
    arguments = ["finetune", str(table)]
    for name, value in given.items():
        values = value if isinstance(value, list) else [value]
        flag = f"--{name.replace('_', '-')}"
        arguments += [flag] if value is True else [flag, *map(str, values)] if value is not None else []
    return arguments
