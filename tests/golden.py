"""Reads the golden values. Everything is found through `index.json`, so any set of the same form can be dropped in.

for name in golden_cases("rope2d.npz"):            # names; empty where the set is absent
    case = Golden("rope2d.npz").case(name)
    case.settings["D"]; case["in/q"]; case.tensor("out/q_rot", torch.float64); case.group("grad/")
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from locations import shared_path


@functools.lru_cache(maxsize=4)
def _index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "index.json").read_text())["files"]


@functools.lru_cache(maxsize=4)
def _arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def golden_folder() -> Path:
    """Folder of the golden set."""
    return shared_path() / "golden"


def golden_files(prefix: str = "") -> list[str]:
    """Names of the files of the set that start with `prefix`, sorted; empty where the set is absent."""
    folder = golden_folder()
    if not (folder / "index.json").is_file():
        return []
    return sorted(name for name in _index(folder) if name.startswith(prefix))


def golden_cases(file: str) -> list[str]:
    """Names of the cases of one file, for `pytest.mark.parametrize` (an empty list makes the test skip)."""
    return list(_index(golden_folder())[file]["cases"]) if file in golden_files() else []


class Golden:
    """One file of the set: its `cases` (name -> settings) and its arrays by full name."""

    def __init__(self, file: str) -> None:
        self.file = file
        self._entry = _index(golden_folder())[file]
        self.cases: dict[str, dict[str, Any]] = self._entry["cases"]

    def __getitem__(self, name: str) -> np.ndarray:
        return _arrays(golden_folder() / self.file)[name]

    def __contains__(self, name: str) -> bool:
        return name in self._entry["arrays"]

    def names(self, prefix: str = "") -> list[str]:
        """Full names of the arrays that start with `prefix`."""
        return [name for name in self._entry["arrays"] if name.startswith(prefix)]

    def float32_error(self, name: str) -> float:
        """Largest |float32 run - float64 run| of an output array, as recorded by the authors' code."""
        return float(self._entry["arrays"][name][2])

    def magnitude(self, name: str) -> float:
        """Largest |value| of an output array (infinities excluded)."""
        return float(self._entry["arrays"][name][3])

    def case(self, name: str) -> Case:
        """The arrays and settings of one case."""
        return Case(self, name, self.cases[name])

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays whose full name starts with `prefix`, by the rest of the name."""
        return {name[len(prefix) :]: self[name] for name in self.names(prefix)}


class Case:
    """One case: arrays by the name without the case ("in/q", "out/links_m1", "grad/q")."""

    def __init__(self, golden: Golden, name: str, settings: dict[str, Any]) -> None:
        self.golden, self.name, self.settings = golden, name, settings

    def __getitem__(self, name: str) -> np.ndarray:
        return self.golden[f"{self.name}/{name}"]

    def __contains__(self, name: str) -> bool:
        return f"{self.name}/{name}" in self.golden

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The array as a torch tensor; integers become int64 unless `dtype` says otherwise."""
        value = torch.from_numpy(np.array(self[name]))
        if dtype is None and not value.dtype.is_floating_point and value.dtype != torch.bool:
            dtype = torch.int64
        return value if dtype is None else value.to(dtype)

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays of this case whose name starts with `prefix` ("grad/"), by the rest of the name."""
        return self.golden.group(f"{self.name}/{prefix}")

    def float32_error(self, name: str) -> float:
        """See `Golden.float32_error`."""
        return self.golden.float32_error(f"{self.name}/{name}")

    def magnitude(self, name: str) -> float:
        """See `Golden.magnitude`."""
        return self.golden.magnitude(f"{self.name}/{name}")
