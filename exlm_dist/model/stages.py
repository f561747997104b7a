"""How the list of layers is divided into pipeline stages, by what the layers cost. No torch here."""

from __future__ import annotations

from collections.abc import Sequence

from exlm_dist.config.schema import ModelConfig
from exlm_dist.model.cost import Sizes, expected_masked, flops_per_sequence


def layer_costs(model: ModelConfig, vocab_size: int, length: float, ratio: float) -> list[float]:
    """Floating-point operations of each layer for a sequence of `length` tokens: embedding, blocks, norm, output.

    The embedding and the norm count as 0. The output layer is the token and the transition head: at k=4 and 15 % masked
    it costs as much as about two blocks.
    """
    sizes = Sizes.of(model, round(length), expected_masked(round(length), ratio))
    parts = flops_per_sequence(model, vocab_size, sizes)
    inside = parts.pop("linear") + parts.pop("attention")
    return [0.0, *[inside / model.layers] * model.layers, 0.0, sum(parts.values())]


def described(cut: Sequence[range], costs: Sequence[float]) -> str:
    """`embedding to block 2 (48%); block 3 to output (52%)`: layers of each stage and their fraction of the cost."""
    names = ["embedding", *(f"block {number + 1}" for number in range(len(costs) - 3)), "norm", "output"]
    return "; ".join(
        f"{names[layers[0]]} to {names[layers[-1]]} ({sum(costs[layer] for layer in layers) / sum(costs):.0%})"
        for layers in cut
    )


def cut_layers(costs: Sequence[float], stages: int) -> list[range]:
    """Consecutive layers for each stage, at least one block each, such that the most expensive stage costs least.

    `costs` as from `layer_costs`. Among equally good cuts the most even one is taken.
    """
    blocks = len(costs) - 3
    if not 1 <= stages <= blocks:
        raise ValueError(f"{blocks} blocks cannot be cut into {stages} stages")
    # A stage ends after block e; the first takes the embedding, the last the norm and the output too.
    upto = [sum(costs[: end + 1]) for end in range(blocks + 1)]
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for stage in range(stages):
        last = stage == stages - 1
        ends = [blocks] if last else range(stage + 1, blocks - (stages - stage - 1) + 1)
        after: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for end in ends:
            tail = sum(costs[-2:]) if last else 0.0
            options = []
            for start, (largest, squares, cuts) in best.items():
                if start < end:
                    cost = upto[end] - (upto[start] if start else 0.0) + tail
                    options.append((max(largest, cost), squares + cost * cost, (*cuts, end)))
            after[end] = min(options)
        best = after
    ends = [*best[blocks][2][:-1], len(costs) - 1]
    starts = [0, *[end + 1 for end in ends[:-1]]]
    return [range(start, end + 1) for start, end in zip(starts, ends)]
