"""The fine-tuned model that points at an answer: the encoder, and two scores for each token."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from exlm_dist.config.schema import ModelConfig
from exlm_dist.finetuning.property_model import HEAD, PropertyModel
from exlm_dist.inference.sequences import hidden_states
from exlm_dist.model.build import LanguageModel
from exlm_dist.model.dropout import block_site, dropout
from exlm_dist.model.initialisation import initial_value
from exlm_dist.model.stream import Stream
from exlm_dist.tokenizers.tokenizer import EOS


class SpanHead(nn.Module):
    """Dropout and one linear layer, as BERT has it for SQuAD (Devlin et al. 2019)."""

    def __init__(self, config: ModelConfig, probability: float) -> None:
        super().__init__()
        self.out = nn.Linear(config.width, 2)
        self.probability = probability
        self.site = block_site(config.layers, "weights")  # after all blocks

    def forward(self, hidden: Tensor, seed: Tensor) -> Tensor:
        """Hidden states [T, D] -> scores of each token as the first and as the last one of the answer, [T, 2]."""
        return self.out(dropout(hidden, self.probability if self.training else 0.0, seed, self.site))


class SpanModel(PropertyModel):
    """The encoder and a head that points at the tokens of an answer, in sequences `BOS question EOS context EOS`."""

    def forward(self, stream: Stream) -> Tensor:
        """Scores of the first and of the last token, [B, 2, L] for the longest sequence of L tokens; -inf where no
        answer can be: BOS stands for no answer, and only it and the tokens of the context have a score."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            hidden = hidden_states(self.body, stream)
        scores = self.head(hidden, stream.dropout_seed)
        lengths = stream.cu_tokens.diff()
        place = torch.arange(int(lengths.max()), device=scores.device)
        inside = place < lengths[:, None]
        token = (stream.cu_tokens[:-1, None] + place).clamp(max=len(scores) - 1)
        end = (stream.input_ids[token] == EOS) & inside
        allowed = inside & ((end.cumsum(1) > 0) & ~end | (place == 0))
        return scores[token].transpose(1, 2).masked_fill(~allowed[:, None], -torch.inf)


def build_span_model(
    body: LanguageModel, config: ModelConfig, *, seed: int, dropout: float, frozen: bool
) -> PropertyModel:
    """A copy of `body` under a new head, whose initial weights depend on `seed` and their names alone."""
    head = SpanHead(config, dropout)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.copy_(initial_value(HEAD + name, tuple(parameter.shape), seed=seed, std=config.init_std))
    device = next(body.parameters()).device
    return SpanModel(copy.deepcopy(body), head.to(device), "mean", frozen=frozen)
