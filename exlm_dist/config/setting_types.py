"""What the settings of `schema.py` are made of: sections, and types that pydantic lacks."""

from __future__ import annotations

import os
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, PlainValidator
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """A group of settings: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FromAuto:
    """Validator of auto, or a whole number from `least`."""

    def __init__(self, least: int) -> None:
        self.least = least

    def __call__(self, value: object) -> object:
        if value == "auto" or (type(value) is int and value >= self.least):
            return value
        raise PydanticCustomError("auto_count", f"Input should be auto or a whole number from {self.least}")


def renamed_backend(value: object) -> object:
    """Runs that were begun before the backend had its present name call it `reference`."""
    return "torch" if value == "reference" else value


def is_run_name(name: str) -> str:
    """`name`, if a folder on any system can be called so (100 characters leave room for what is added)."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        return name
    raise PydanticCustomError(
        "run_name", "Input should be up to 100 letters, digits, '.', '_' and '-', the first a letter or a digit"
    )


#: A path of the file system, a leading `~` expanded.
UserPath = Annotated[str, AfterValidator(os.path.expanduser)]
RunName = Annotated[str, AfterValidator(is_run_name)]
AutoCount = Annotated[Literal["auto"] | int, PlainValidator(FromAuto(1))]
AutoSteps = Annotated[Literal["auto"] | int, PlainValidator(FromAuto(0))]
