"""How much a run has computed, by the operations that its model needs; from its settings and its event log."""

from __future__ import annotations

import numpy as np

from exlm_dist.checkpoint.reader import TOKENIZER_FOLDER, newest_checkpoint
from exlm_dist.evaluation.history import History
from exlm_dist.model.cost import Sizes, expected_masked, flops_per_sequence
from exlm_dist.tokenizers import load_tokenizer
from exlm_dist.utils.errors import UserError


def computed(history: History, steps: np.ndarray) -> np.ndarray:
    """Floating-point operations of the training up to `steps`: those of a sequence of mean length (`model.cost`), times
    the sequences so far. NaN where they are not logged, or no checkpoint says the size of the vocabulary."""
    sequences = history.progress("sequences", steps)
    logged = history.series("progress/sequences").values, history.series("progress/tokens").values
    try:
        vocab_size = load_tokenizer(newest_checkpoint(history.folder) / TOKENIZER_FOLDER).vocab_size
    except UserError:
        return np.full(len(steps), np.nan)
    if not all(map(len, logged)):
        return np.full(len(steps), np.nan)
    length = round(logged[1][-1] / logged[0][-1])
    model = history.config.model
    sizes = Sizes.of(model, length, expected_masked(length, history.config.masking.ratio))
    return sequences * sum(flops_per_sequence(model, vocab_size, sizes).values())
