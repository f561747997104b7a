"""The fine-tuned model: the encoder of a checkpoint, one vector for each sequence, and a head that predicts targets."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from exlm_dist.config.schema import ModelConfig
from exlm_dist.inference.embed import pool
from exlm_dist.inference.sequences import hidden_states
from exlm_dist.model.build import LanguageModel
from exlm_dist.model.dropout import block_site, dropout
from exlm_dist.model.initialisation import initial_value
from exlm_dist.model.stream import Stream

#: Parameters of the pretrained model that a fine-tuned one does not have.
UNUSED = "output."
HEAD = "head."


class Head(nn.Module):
    """Dropout, dense, tanh, dropout, outputs: the classification head of RoBERTa (Liu et al. 2019)."""

    def __init__(self, config: ModelConfig, outputs: int, probability: float) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.out = nn.Linear(config.width, outputs)
        self.probability = probability
        self.sites = tuple(block_site(config.layers, name) for name in ("weights", "attention"))  # after all blocks

    def forward(self, features: Tensor, seed: Tensor) -> Tensor:
        """Vectors [B, D] -> outputs [B, O]."""
        features = torch.tanh(self.dense(self._dropped(features, seed, self.sites[0])))
        return self.out(self._dropped(features, seed, self.sites[1]))

    def _dropped(self, features: Tensor, seed: Tensor, site: int) -> Tensor:
        return dropout(features, self.probability if self.training else 0.0, seed, site)


class PropertyModel(nn.Module):
    """The encoder, pooling and a head."""

    def __init__(self, body: LanguageModel, head: nn.Module, pooling: str, *, frozen: bool = False) -> None:
        super().__init__()
        self.body, self.head = body, head
        self.pooling, self.frozen = pooling, frozen

    def forward(self, stream: Stream) -> Tensor:
        """Outputs [B, O] for the sequences of a micro-batch."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = pool(hidden_states(self.body, stream), stream, self.pooling)
        return self.head(features, stream.dropout_seed)

    def train(self, mode: bool = True) -> PropertyModel:
        """Training or evaluation mode; a frozen body stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.body.eval()
        return self

    def weights(self) -> dict[str, nn.Parameter]:
        """All parameters: those of the body under their names in the checkpoint, and `head.*`."""
        body = {name: value for name, value in self.body.named_parameters() if not name.startswith(UNUSED)}
        return {**body, **{HEAD + name: value for name, value in self.head.named_parameters()}}

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained."""
        return {name: value for name, value in self.weights().items() if name.startswith(HEAD) or not self.frozen}


def build_property_model(
    body: LanguageModel, config: ModelConfig, outputs: int, *, seed: int, pooling: str, dropout: float, frozen: bool
) -> PropertyModel:
    """A copy of `body` under a new head, whose initial weights depend on `seed` and their names alone."""
    head = Head(config, outputs, dropout)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.copy_(initial_value(HEAD + name, tuple(parameter.shape), seed=seed, std=config.init_std))
    device = next(body.parameters()).device
    return PropertyModel(copy.deepcopy(body), head.to(device), pooling, frozen=frozen)
