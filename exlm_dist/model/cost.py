"""What a model costs: parameters, floating-point operations, expanded length. No torch here.

Letters: S tokens of a sequence (BOS and EOS counted), M masked, N targets, k states per target, n = S + (k-1) N
expanded length, L = k N states, D width, F feed-forward width, H heads, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from exlm_dist.config.schema import ModelConfig

#: Floating-point operations per multiply-add, over forward (1), gradient of the input (1) and of the weight (1).
_TRAIN = 2 * 3


@dataclass(frozen=True)
class Sizes:
    """Expected sizes of one sequence after masking and expansion; `masked` may be an expectation, hence floats."""

    length: int
    targets: float
    expanded: float
    states: float

    @staticmethod
    def of(model: ModelConfig, length: int, masked: float) -> Sizes:
        """Sizes of a sequence of `length` tokens of which `masked` are masked."""
        targets = masked + (2 if model.anchors else 0)
        return Sizes(length, targets, length + (model.states - 1) * targets, model.states * targets)


def expected_masked(length: int, ratio: float) -> float:
    """Expected masked tokens of a sequence of `length` tokens: BOS and EOS are never masked, and at least one is."""
    return max(1.0, ratio * (length - 2))


def learns_transitions(model: ModelConfig) -> bool:
    """Whether the model has a transition head."""
    return model.objective == "exlm" and model.transitions != "uniform"


@dataclass(frozen=True)
class PartSize:
    """Parameter elements of one part of the model: `sharded` over the tensor-parallel ranks, `replicated` on each of
    them, and `per_row` of the vocabulary, whose rows are sharded too."""

    sharded: int = 0
    replicated: int = 0
    per_row: int = 0

    def numel(self, tensor: int, rows: int) -> int:
        """Elements on one of `tensor` tensor-parallel ranks, which has `rows` rows of the vocabulary."""
        return self.sharded // tensor + self.replicated + self.per_row * rows


def part_sizes(model: ModelConfig) -> dict[str, PartSize]:
    """Size of each part of the model: `embedding`, `blocks` (a single one), `norm`, `token head` and, if there is one,
    `transition head`; a tied matrix counts in the embedding only."""
    width = model.width
    sizes = {
        "embedding": PartSize(per_row=width),
        "blocks": PartSize(sharded=width * (4 * width + 2 * model.ffn) + 3 * width + model.ffn, replicated=6 * width),
        "norm": PartSize(replicated=2 * width),
        "token head": PartSize(replicated=width * width + 3 * width, per_row=1 if model.tie_head else 1 + width),
    }
    if learns_transitions(model):
        inputs = width * (2 if model.transition_positions else 1)
        positions = model.max_positions * width if model.transition_positions else 0
        sizes["transition head"] = PartSize((2 * width + model.heads) * (inputs + 1), positions)
    return sizes


def count_parameters(model: ModelConfig, vocab_size: int) -> dict[str, int]:
    """Number of parameters of each part; tied weights count once."""
    counts = {part: size.numel(1, vocab_size) for part, size in part_sizes(model).items()}
    return counts | {"blocks": model.layers * counts["blocks"]}


def flops_per_sequence(model: ModelConfig, vocab_size: int, sizes: Sizes) -> dict[str, float]:
    """Floating-point operations of forward and backward for one sequence, by part; recomputation is not counted.

    The ideal count: the token head on the states only, transition scores on the pairs v < u only. Norms, softmax and
    the dynamic programme (under 0.2 %) are left out.
    """
    width, states = model.width, sizes.states
    linear = width * (4 * width + 2 * model.ffn)
    parts = {
        "linear": _TRAIN * model.layers * linear * sizes.expanded,
        "attention": _TRAIN * model.layers * 2 * width * sizes.expanded**2,
        "token head": _TRAIN * (width * width + width * vocab_size) * states,
    }
    if learns_transitions(model):
        inputs = width * (2 if model.transition_positions else 1)
        pairs = states**2 / 2 if model.transitions == "dense" else states * model.states
        parts["transitions"] = _TRAIN * ((2 * width + model.heads) * inputs * states + width * pairs)
    return parts
