"""From the outputs of the model to losses of labels, and to what is predicted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from exlm_dist.finetuning.targets import Target, output_slices


def weighted_loss(outputs: Tensor, labels: Tensor, weights: Tensor, targets: Sequence[Target]) -> Tensor:
    """Sum over all labels of weight times loss, a scalar; divide by the sum of the weights of the batch.

    outputs fp32 [B, O]; labels [B, targets], NaN where missing; weights [B, targets], 0 there. The loss of a label is
    the cross-entropy of its class (binary: with the logistic function of one output), or the squared error of the
    scaled value.
    """
    total = outputs.new_zeros(())
    known = ~labels.isnan()
    for column, (target, where) in enumerate(zip(targets, output_slices(targets))):
        rows = known[:, column]
        own, label = outputs[rows][:, where], labels[rows, column]
        if target.kind == "binary":
            losses = F.binary_cross_entropy_with_logits(own[:, 0], label.to(own.dtype), reduction="none")
        elif target.kind == "multiclass":
            losses = F.cross_entropy(own, label.long(), reduction="none")
        else:
            assert target.mean is not None and target.std is not None
            losses = (own[:, 0] - ((label - target.mean) / target.std).to(own.dtype)).square()
        total = total + (losses * weights[rows, column].to(own.dtype)).sum()
    return total


def predicted_values(outputs: Tensor, targets: Sequence[Target]) -> Tensor:
    """Outputs [B, O] as what they mean, float64: probability of the second class (binary) or of each class, or the
    value in its own unit."""
    parts = []
    for target, where in zip(targets, output_slices(targets)):
        own = outputs[:, where].double()
        if target.kind == "binary":
            parts.append(own.sigmoid())
        elif target.kind == "multiclass":
            parts.append(own.softmax(1))
        else:
            assert target.mean is not None and target.std is not None
            parts.append(own * target.std + target.mean)
    return torch.cat(parts, 1)
