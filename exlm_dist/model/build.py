"""The whole model: its layers, built and in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from exlm_dist.config.schema import ModelConfig
from exlm_dist.model.block import Block, FinalNorm
from exlm_dist.model.embedding import Embedding
from exlm_dist.model.heads import Output
from exlm_dist.model.initialisation import allocate, initialise
from exlm_dist.model.stream import Stream
from exlm_dist.parallel.sharded import ShardedParameter, sharded_parameters


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
        stage: range | None = None,
    ) -> None:
        """`stage`: indices of the layers of a pipeline stage, counted embedding, blocks, norm, output; the others are
        None."""
        super().__init__()
        indices = range(config.layers + 3)
        stage = indices if stage is None else stage
        self.tied = config.tie_head
        self.activation_checkpointing = activation_checkpointing
        self.embedding = None
        if 0 in stage:
            self.embedding = Embedding(vocab_size, config.width, config.dropout, token_dropout, backend=kernel_backend)
        self.blocks = nn.ModuleList(
            Block(config, layer, kernel_backend, last=layer == config.layers - 1) if layer + 1 in stage else None
            for layer in range(config.layers)
        )
        self.norm = FinalNorm(config.width) if indices[-2] in stage else None
        self.output = None
        if indices[-1] in stage:
            shared = self.tied and self.embedding is not None
            weight = self.embedding.weight if shared else nn.Parameter(torch.empty(vocab_size, config.width))
            self.output = Output(config, weight, kernel_backend)

    @property
    def layers(self) -> list[nn.Module]:
        """The layers on this rank, in order, each `Stream -> Stream`."""
        return [layer for layer in self.all_layers if layer is not None]

    @property
    def all_layers(self) -> list[nn.Module | None]:
        """The layers of the whole model in order, None for those of other stages."""
        return [self.embedding, *self.blocks, self.norm, self.output]

    def sharded_parameters(self) -> list[ShardedParameter]:
        """The parameters on this rank under their names in the whole model: a tied matrix is the embedding's, which
        also saves it."""
        found = sharded_parameters(self)
        if not self.tied or self.embedding is not None:
            return found
        first = {"name": "embedding.weight", "saved": False}
        return [replace(one, **first) if one.name == "output.weight" else one for one in found]

    def forward(self, stream: Stream) -> Stream:
        """Run all layers; the result carries `match`, `transitions`, `log_likelihood`, and `predictions` on demand."""
        return run_layers(self.layers, stream, recompute=self.activation_checkpointing and self.training)


def run_layers(layers: Iterable[nn.Module], stream: Stream, *, recompute: bool) -> Stream:
    """The loop over the layers; with `recompute` the blocks keep their input alone for the backward pass."""
    for layer in layers:
        if recompute and isinstance(layer, Block):
            # Dropout is keyed by the stream, so there is no random state to keep.
            stream = checkpoint(layer, stream, use_reentrant=False, preserve_rng_state=False)
        else:
            stream = layer(stream)
    return stream


def build_model(
    config: ModelConfig,
    vocab_size: int,
    *,
    seed: int | None,
    kernel_backend: str = "auto",
    activation_checkpointing: bool = False,
    token_dropout: int | None = None,
    stage: range | None = None,
    shard: Callable[[nn.Module], None] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LanguageModel:
    """Model with its initial weights; they depend on `seed` and each parameter's name alone. `seed` None: nothing is
    drawn, for a model that is to be filled from a checkpoint.

    `stage`: indices of the layers on this rank. `shard` (`parallel.tensor.apply_tensor_parallel` with its group)
    reduces the model to the tensor-parallel shard of this rank, on the CPU in fp32. Without it parameters are on
    `device` in `dtype`, rounded from fp32 one at a time: the full model is never allocated elsewhere.
    """
    with torch.device("meta"):
        model = LanguageModel(
            config,
            vocab_size,
            kernel_backend=kernel_backend,
            activation_checkpointing=activation_checkpointing,
            token_dropout=token_dropout,
            stage=stage,
        )
    if shard is not None:
        shard(model)
    allocate(model, device, dtype)
    initialise(model.sharded_parameters(), seed=seed, std=config.init_std)
    return model
