"""The seam to DeepSpeed's pipeline: a list of layers as the stages of a `PipelineModule`.

DeepSpeed provides the schedule (1F1B), the exchange of tensors between stages, the all-reduce of the tied weight's
gradient and the process groups; which layers a stage has, how they run and what the last stage does with their output
is decided here. Pitfalls: docs/parallelism.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from exlm_dist.parallel.process_groups import Grid

#: What a stage does: its layers, and the tensor that it received (on the first: what was loaded) -> the tensor for the
#: next stage, or the loss.
Work = Callable[[Sequence[nn.Module], Any], Tensor]
#: Shape and type of the next tensor that a stage receives.
Expected = Callable[[], tuple[Sequence[int], torch.dtype]]


class Stages(PipelineModule):
    """The stage of this rank. `layers[i]`: layer i, None if it is on another stage; `bounds`: layers of each stage.

    Where `tied` is set, the first and the last layer have one `weight` in common: each end has a copy, DeepSpeed sums
    the gradients of the two, and only that of the first stage counts in norms.
    """

    def __init__(
        self, layers: Sequence[nn.Module | None], bounds: Sequence[range], grid: Grid, work: Work, *, tied: bool
    ) -> None:
        self._bounds, self._work = bounds, work
        super().__init__(
            layers=[_spec(layer, tied and index in (0, len(layers) - 1)) for index, layer in enumerate(layers)],
            topology=PipeModelDataParallelTopology(grid.pipeline.size, grid.tensor.size, grid.data.size),
            dynamic_shape=True,
        )
        # DeepSpeed takes every parameter of a tied layer for a copy; here only the weight is one.
        copied = tied and grid.pipeline.is_last
        for layer in self.tied_modules.values():
            for name, parameter in layer.named_parameters():
                parameter.ds_pipe_replicated = copied and name == "weight"

    def _partition_layers(self, method: str = "") -> None:
        self.parts = [self._bounds[0].start, *(layers.stop for layers in self._bounds)]
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(self.parts[stage], self.parts[stage + 1])

    def _synchronize_tied_weights(self) -> None:
        # Recorded by autograd, the broadcast would stand between the weight and its gradient.
        with torch.no_grad():
            super()._synchronize_tied_weights()

    def forward(self, received: Any) -> Tensor:
        """Run this stage on what the previous one sent (the first stage: on what was loaded)."""
        return self._work(self.forward_funcs, received)


def send_no_descriptions(engine: Any, expected: Expected) -> None:
    """Have DeepSpeed's `engine` send tensors between stages alone. It would send a description before each, which the
    next stage reads from its device, where it would wait for all the work that it has queued."""
    engine._send_tensor_meta = lambda tensor, stage: None
    engine._recv_tensor_meta = lambda stage: engine._allocate_or_extend_buffers(0, *expected())


class _Made(nn.Module):
    """Stands in for the class from which DeepSpeed would build a layer: returns one that exists already."""

    def __new__(cls, layer: nn.Module) -> nn.Module:  # type: ignore[misc]
        return layer


def _spec(layer: nn.Module | None, tied: bool) -> Any:
    if tied:
        return TiedLayerSpec("tied", _Made, layer, tied_weight_attr="weight")
    return LayerSpec(nn.Identity) if layer is None else layer
