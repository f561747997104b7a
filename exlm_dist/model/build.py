"""Puts the layers together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from exlm_dist.config.schema import ModelConfig
from exlm_dist.model.block import Block, FinalNorm
from exlm_dist.model.embedding import Embedding
from exlm_dist.model.heads import Output
from exlm_dist.model.initialisation import initialise
from exlm_dist.model.stream import Stream
from exlm_dist.parallel.held import held_by


class LanguageModel(nn.Module):
    """ExLM or the plain masked language model: an ordered list of layers and the loop that runs it."""

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        *,
        kernel_backend: str = "auto",
        activation_checkpointing: bool = False,
        token_dropout: int | None = None,
    ) -> None:
        super().__init__()
        self.embedding = Embedding(
            vocab_size, config.width, config.dropout, token_dropout, backend=kernel_backend
        )
        self.blocks = nn.ModuleList(
            Block(config, layer, kernel_backend, last=layer == config.layers - 1) for layer in range(config.layers)
        )
        self.norm = FinalNorm(config.width)
        weight = self.embedding.weight if config.tie_head else nn.Parameter(torch.empty(vocab_size, config.width))
        self.output = Output(config, weight, kernel_backend)
        self.activation_checkpointing = activation_checkpointing

    @property
    def layers(self) -> list[nn.Module]:
        """The layers in order, each `Stream -> Stream`."""
        return [self.embedding, *self.blocks, self.norm, self.output]

    def forward(self, stream: Stream) -> Stream:
        """Run all layers; the result carries `match`, `transitions`, `log_likelihood`, and `predictions` on demand."""
        for layer in self.layers:
            recompute = self.activation_checkpointing and self.training and isinstance(layer, Block)
            # Dropout is keyed by the stream, so there is no random state to keep.
            stream = (
                checkpoint(layer, stream, use_reentrant=False, preserve_rng_state=False) if recompute else layer(stream)
            )
        return stream


def build_model(
    config: ModelConfig,
    vocab_size: int,
    *,
    seed: int,
    kernel_backend: str = "auto",
    activation_checkpointing: bool = False,
    token_dropout: int | None = None,
    split: Callable[[nn.Module], None] | None = None,
) -> LanguageModel:
    """Model on the CPU in fp32 with its initial weights; they depend on `seed` and each parameter's name alone.

    `split` (`parallel.tensor.split` with its group) cuts the model down to what this rank holds of it; the full model
    never has any memory.
    """
    with torch.device("cpu" if split is None else "meta"):
        model = LanguageModel(
            config,
            vocab_size,
            kernel_backend=kernel_backend,
            activation_checkpointing=activation_checkpointing,
            token_dropout=token_dropout,
        )
    if split is not None:
        split(model)
    initialise(held_by(model), seed=seed, std=config.init_std)
    return model
