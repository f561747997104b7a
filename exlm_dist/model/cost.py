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
        """Sizes of a sequence of `length` tokens of which `masked` are hidden."""
        targets = masked + (2 if model.anchors else 0)
        return Sizes(length, targets, length + (model.states - 1) * targets, model.states * targets)


def expected_masked(length: int, ratio: float) -> float:
    """Expected masked tokens of a sequence of `length` tokens: BOS and EOS are never masked, and at least one is."""
    return max(1.0, ratio * (length - 2))


def learns_transitions(model: ModelConfig) -> bool:
    """Whether the model has a transition head."""
    return model.objective == "exlm" and model.transitions != "uniform"


def count_parameters(model: ModelConfig, vocab_size: int) -> dict[str, int]:
    """Number of parameters of each part; tied weights count once."""
    width = model.width
    linear = width * (4 * width + 2 * model.ffn) + 4 * width + model.ffn + width
    parts = {
        "embedding": vocab_size * width,
        "blocks": model.layers * (linear + 4 * width),
        "norm": 2 * width,
        "token head": width * width + 3 * width + vocab_size + (0 if model.tie_head else vocab_size * width),
    }
    if learns_transitions(model):
        inputs = width * (2 if model.transition_positions else 1)
        positions = model.max_positions * width if model.transition_positions else 0
        parts["transition head"] = positions + (2 * width + model.heads) * (inputs + 1)
    return parts


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
