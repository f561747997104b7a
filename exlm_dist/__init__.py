"""Distributed pretraining of ExLM masked language models for text and molecules."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from exlm_dist.inference.api import PretrainedModel

__version__ = "0.1.0"


def load(path: Path | str, *, device: str = "auto") -> PretrainedModel:
    """The model in a checkpoint folder, or in the newest whole checkpoint of a run folder, ready to be asked.

    device: 'auto' (a GPU if there is one), 'cpu' or 'cuda'. CheckpointError if there is no whole checkpoint.
    """
    from exlm_dist.inference.api import PretrainedModel  # not above: the command line starts faster without torch

    return PretrainedModel.load(path, device=device)
