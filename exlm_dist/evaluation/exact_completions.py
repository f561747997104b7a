"""How often the most probable completion of all masks of a sequence at once is right (docs/metric.md)."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from exlm_dist.data.batch import PackedBatch
from exlm_dist.inference.fill import batch_chains
from exlm_dist.model.build import LanguageModel

#: Prefixes that the search keeps.
BEAM = 16


def exact_completions(model: LanguageModel, batches: Iterable[PackedBatch], device: torch.device) -> int:
    """Sequences of `batches` whose most probable completion has every masked token right.

    That of ExLM is found by a beam search over prefixes, each scored by its probability summed over all paths
    (`inference/completions.py`); that of the plain masked language model is the most probable token of each position.
    """
    assert model.output is not None  # a loaded model has all its layers
    beam = BEAM if model.output.objective == "exlm" else 1
    right = 0
    for batch in batches:
        for row, chain in enumerate(batch_chains(model, batch, device, first=0)):
            targets = slice(*batch.cu_targets[row : row + 2])
            wanted = batch.target_ids[targets][batch.is_masked[targets]]
            (best,) = chain.best(1, beam)
            right += best.tokens == tuple(wanted.tolist())
    return right
