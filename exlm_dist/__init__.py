"""Distributed pretraining of ExLM masked language models for text and molecules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import exlm_dist.utils.search_path  # noqa: F401  before all else
from exlm_dist.utils.version import VERSION

if TYPE_CHECKING:
    from pathlib import Path

    from exlm_dist.finetuning.prediction import FinetunedModel
    from exlm_dist.inference.api import PretrainedModel

__version__ = VERSION


def load(path: Path | str, *, device: str = "auto") -> PretrainedModel | FinetunedModel:
    """A trained model, ready to be asked: that of a checkpoint folder or of the newest whole checkpoint of a run folder
    (`embed`, `fill`), or one that `exlm finetune` wrote (`predict`, `predict_proba`).

    device: 'auto' (a GPU if there is one), 'cpu' or 'cuda'. CheckpointError if there is neither.
    """
    # Not above: the command line starts faster without torch.
    from exlm_dist.finetuning.model_folder import is_model_folder
    from exlm_dist.finetuning.prediction import load_finetuned
    from exlm_dist.inference.api import PretrainedModel

    return load_finetuned(path, device) if is_model_folder(path) else PretrainedModel.load(path, device=device)


def __getattr__(name: str) -> type:
    """`ExLMClassifier` and `ExLMRegressor`, imported when they are asked for."""
    if name in ("ExLMClassifier", "ExLMRegressor"):
        from exlm_dist.finetuning import estimators

        return getattr(estimators, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
