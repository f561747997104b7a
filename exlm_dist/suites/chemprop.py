"""What a network on graphs reaches without any pretraining: chemprop 2 (Heid et al., doi 10.1021/acs.jcim.3c01250).

It wants libraries of its own, so it is a program of another environment: it reads a table of molecules, labels and
parts, is trained as its defaults are, and its predictions are read from the table that it writes.
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from exlm_dist.finetuning.finetune_settings import TrainingSettings
from exlm_dist.finetuning.splits import Parts
from exlm_dist.suites.moleculenet import CHEMPROP
from exlm_dist.suites.task_data import TaskData
from exlm_dist.utils.errors import ConfigError, UserError
from exlm_dist.utils.signals import die_with_parent

#: What chemprop calls the parts.
PART_NAMES = {"train": "train", "valid": "val", "test": "test"}
SMILES, PART = "smiles", "part"
INSTALL = "python -m venv chemprop && chemprop/bin/pip install chemprop"
#: Last lines of what it has said that an error has.
SAID = 5


class ChempropError(UserError):
    """chemprop has not done what it was asked for."""


def find_chemprop(given: Path | None) -> Path:
    """The program: the one that is given, or `chemprop` on the PATH. ConfigError if there is none."""
    found = shutil.which(CHEMPROP if given is None else given)
    if found is None:
        where = "is not on the PATH" if given is None else f"{given} is no program that can be run"
        name = f"{CHEMPROP} " if given is None else "--chemprop: "
        raise ConfigError(
            f"{name}{where}. It wants libraries of its own; install it in an environment of its own, and say where it "
            f"is:\n  {INSTALL}\n  exlm evaluate moleculenet ... --chemprop chemprop/bin/chemprop"
        )
    return Path(found).absolute()


def predict_from_chemprop(
    program: Path,
    data: TaskData,
    parts: Parts,
    settings: TrainingSettings,
    folder: Path,
    *,
    device: str,
    threads: int,
) -> dict[str, np.ndarray]:
    """Train chemprop on the training part, and predict the others, float64 [rows, targets]: values, or the probability
    of the second class.

    A label that is missing has no loss. Epochs, patience and seed are those of `settings`, all else is chemprop's
    default, among it that the weights with the least loss of the validation part are kept. folder: where its files are
    meanwhile. ChempropError, with what it has said, if it fails.
    """
    names = [f"target_{number}" for number in range(len(data.targets))]
    part_of = {row: PART_NAMES[part] for part, rows in parts.items() for row in rows.tolist()}
    table, model, predicted = folder / "molecules.csv", folder / "model", folder / "predicted.csv"
    shutil.rmtree(model, ignore_errors=True)  # of a training that was killed
    with open(table, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([SMILES, PART, *names])
        for row, part in part_of.items():
            labels = ("" if np.isnan(value) else value for value in data.labels[row])
            writer.writerow([data.columns[SMILES][row], part, *labels])
    kind = "regression" if data.targets[0].kind == "regression" else "classification"
    patience = ["--patience", str(settings.patience)] if settings.patience else []
    train: list[str | Path] = [
        "train",
        "--data-path",
        table,
        "--splits-column",
        PART,
        "--target-columns",
        *names,
        "--task-type",
        kind,
    ]
    train += ["--output-dir", model, "--epochs", str(settings.epochs), "--pytorch-seed", str(settings.seed), *patience]
    predict = ["predict", "--test-path", table, "--model-paths", model / "model_0" / "best.pt"]
    for command in (train, [*predict, "--preds-path", predicted]):
        _run([program, *command, "--smiles-columns", SMILES], folder / "chemprop.log", device, threads)
    values = dict(zip(part_of, _read(predicted, names, len(part_of))))
    return {part: np.stack([values[row] for row in rows.tolist()]) for part, rows in parts.items() if part != "train"}


def _run(command: Sequence[str | Path], log: Path, device: str, threads: int) -> None:
    """Run it until it ends; what it says is added to `log`."""
    kind, _, number = device.partition(":")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment["OMP_NUM_THREADS"] = str(threads)
    if kind == "cuda":
        visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
        environment["CUDA_VISIBLE_DEVICES"] = visible[int(number or 0)] if visible != [""] else number or "0"
    accelerator = ["--accelerator", "cpu" if kind == "cpu" else "auto", "--devices", "1"]
    with open(log, "ab") as file:
        done = subprocess.run(
            [*command, *accelerator], stdout=file, stderr=file, env=environment, preexec_fn=die_with_parent, check=False
        )
    if done.returncode:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-SAID:]
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise ChempropError(f"{command[0]} {command[1]} ended with {how}; {log} ends with: {' / '.join(said)}")


def _read(path: Path, names: Sequence[str], rows: int) -> np.ndarray:
    """Predictions, float64 [rows, targets]. ChempropError if they are not those of the table that was given."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            values = np.array([[float(row[name]) for name in names] for row in csv.DictReader(file)])
    except (OSError, KeyError, ValueError) as error:
        raise ChempropError(f"{path}: is not what chemprop 2 writes ({type(error).__name__}: {error}).") from error
    if values.shape != (rows, len(names)) or not np.isfinite(values).all():
        raise ChempropError(f"{path}: has {len(values)} rows for {rows} molecules, or values that are no numbers.")
    return values
