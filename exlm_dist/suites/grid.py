"""`--grid lr=1e-4,5e-4 epochs=20`: settings of the training that replace those of the protocol, each with each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import fields

from exlm_dist.finetuning.finetune_settings import TrainingSettings
from exlm_dist.suites.cells import Setting
from exlm_dist.tables.columns import suggestion
from exlm_dist.utils.errors import ConfigError

#: Settings that an evaluation itself decides.
_OWN = ("seeds", "seed", "metric", "frozen")
GRID_SETTINGS = tuple(one.name for one in fields(TrainingSettings) if one.name not in _OWN)

Point = tuple[tuple[str, Setting], ...]


def read_grid(texts: Sequence[str]) -> list[Point]:
    """All points of the grid, each a setting of every name, in the order of names; one empty point of an empty grid.
    ConfigError for unknown names and for values that are out of range."""
    axes: dict[str, list[Setting]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.replace("-", "_")
        if name not in GRID_SETTINGS:
            near = suggestion(name, GRID_SETTINGS)
            raise ConfigError(
                f"--grid {text}: there is no setting {name!r}{near}. There are {', '.join(GRID_SETTINGS)}."
            )
        if not equals or not all(values.split(",")):
            raise ConfigError(f"--grid {text}: must be NAME=VALUE or NAME=VALUE,VALUE, as in lr=1e-4,5e-4.")
        if name in axes:
            raise ConfigError(f"--grid gives {name} twice: write {name}=VALUE,VALUE.")
        axes[name] = list(dict.fromkeys(_value(text, name, value) for value in values.split(",")))
    points = [tuple(zip(sorted(axes), values)) for values in itertools.product(*(axes[name] for name in sorted(axes)))]
    for point in points:
        TrainingSettings(**dict(point))  # type: ignore[arg-type]  # refuses values out of range
    return points


def _value(text: str, name: str, value: str) -> Setting:
    kind = type(getattr(TrainingSettings(), name))
    if kind is bool:
        if value not in ("true", "false"):
            raise ConfigError(f"--grid {text}: {value!r} must be true or false.")
        return value == "true"
    try:
        return kind(value)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise ConfigError(f"--grid {text}: {value!r} is not {what}.") from None
