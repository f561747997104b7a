"""A pretrained model as an object in a notebook; what `exlm_dist.load` returns for a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from exlm_dist.inference.embed import embed_texts
from exlm_dist.inference.fill import BEAM, Filled, FillSettings, fill_text
from exlm_dist.inference.loading import LoadedCheckpoint, load_checkpoint
from exlm_dist.utils.logs import get_logger

logger = get_logger(__name__)


class PretrainedModel:
    """A checkpoint that can be asked.

    model = exlm_dist.load("runs/demo_smiles_exlm")
    vectors = model.embed(["CCO", "c1ccccc1"])
    model.fill("CC(=O)<mask>c1ccccc1").completions[0].text
    """

    def __init__(self, loaded: LoadedCheckpoint):
        self.loaded = loaded

    @classmethod
    def load(cls, path: Path | str, *, device: str = "auto") -> PretrainedModel:
        """Load a checkpoint folder, or the newest whole checkpoint of a run folder; see `load_checkpoint`."""
        return cls(load_checkpoint(path, device=device))

    def embed(
        self,
        texts: Sequence[str | None],
        *,
        pooling: str = "mean",
        layer: int | None = None,
        truncate: bool = False,
    ) -> np.ndarray:
        """Embeddings of `texts` in their order, fp32 [n, width]; NaN for a text that cannot be used (a warning counts
        them and says why). See `inference.embed.embed_texts`."""
        result = embed_texts(self.loaded, texts, pooling=pooling, layer=layer, truncate=truncate)
        if result.failures:
            row, reason = min(result.failures.items())
            logger.warning("%d of %d texts cannot be used; the first is number %d: %s", len(result.failures),
                           len(texts), row, reason)  # fmt: skip
        return result.vectors

    def fill(
        self,
        text: str,
        *,
        top: int = 5,
        beam: int = BEAM,
        sample: int = 0,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> Filled:
        """The most probable completions of all masks (`<mask>` or `[MASK]`) at once, or `sample` draws. See
        `inference.fill.fill_text`."""
        return fill_text(self.loaded, text, FillSettings(top, beam, sample, temperature, seed))

    def __repr__(self) -> str:
        model, folder = self.loaded.config.model, self.loaded.folder
        kind = f"ExLM, k = {model.states}" if model.objective == "exlm" else "plain masked language model"
        size = sum(parameter.numel() for parameter in self.loaded.model.parameters())
        return f"<{kind}, {self.loaded.tokenizer.domain}, {size / 1e6:.1f} M parameters, {folder}>"
