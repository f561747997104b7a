"""The module that DeepSpeed trains: a language model and its loss, in a form whose tensors DeepSpeed can see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from exlm_dist.model.block import Block
from exlm_dist.model.build import LanguageModel
from exlm_dist.model.objective import loss_sum, masked_scores
from exlm_dist.model.stream import Stream

#: (stream that has passed all layers, masked targets [N] bool) -> sums [n].
Scoring = Callable[[Stream, Tensor], Tensor]


class Objective(nn.Module):
    """Summed loss of a micro-batch; see `forward`. `partitioned` (ZeRO 3): layers run through `TensorLayer`."""

    def __init__(
        self, model: LanguageModel, reduction: Literal["sequence", "token"], *, partitioned: bool = False
    ) -> None:
        super().__init__()
        self.reduction = reduction
        self.recompute = model.activation_checkpointing
        self.model = None if partitioned else model
        self.layers = nn.ModuleList(TensorLayer(layer) for layer in model.layers if partitioned)

    def forward(
        self, stream: Stream, is_masked: Tensor | None = None, scoring: Scoring = masked_scores
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(loss sum, invalid [B] bool, scores or None); see `model.objective.loss_sum`.

        With `is_masked` [N] the scores are those of `scoring` over the masked tokens: by default [nll sum, correct,
        count]. Dropout acts on them as on the loss, if the module is in training mode.
        """
        result = self.run(stream.replace(predict=is_masked is not None))
        scores = None if is_masked is None else scoring(result, is_masked)
        return *loss_sum(result, self.reduction), scores

    def run(self, stream: Stream) -> Stream:
        """All layers."""
        if self.model is not None:
            return self.model(stream)
        for layer in self.layers:
            if self.recompute and self.training and isinstance(layer.inner, Block):
                changes = checkpoint(layer, stream.hidden, stream, use_reentrant=False, preserve_rng_state=False)
            else:
                changes = layer(stream.hidden, stream)
            stream = stream.replace(**changes)
        return stream


class TensorLayer(nn.Module):
    """A `Stream -> Stream` layer that takes its input, and gives what it changed, as plain tensors.

    ZeRO 3 gathers and frees the parameters of a module by hooks on its input and output tensors, and does not look into
    a dataclass. So the hooks of the layer itself are bypassed (`inner.forward`), and the parameters that it owns
    directly are registered here too; those of its children, which work on tensors, are gathered by the hooks of the
    children.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        for name, parameter in inner.named_parameters(recurse=False):
            self.register_parameter(name, parameter)

    def forward(self, hidden: Tensor | None, stream: Stream) -> dict[str, Tensor | int]:
        """Fields of the stream that the layer has changed."""
        before = stream.replace(hidden=hidden)
        after = self.inner.forward(before)
        return {name: value for name, value in vars(after).items() if value is not getattr(before, name)}
