"""What a model costs: parameters, floating-point operations, expanded length, memory per rank. No torch here.

Letters: S tokens of a sequence (BOS and EOS counted), M masked, N targets, k states per target, n = S + (k-1) N
expanded length, L = k N states, D width, F feed-forward width, H heads, V vocabulary, R ranks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from exlm_dist.config.schema import ModelConfig, RunConfig

#: Floating-point operations per multiply-add, over forward (1), gradient of the input (1) and of the weight (1).
_TRAIN = 2 * 3
_FP32 = 4
_LENGTH_UNKNOWN = 128
_VOCABULARY_UNKNOWN = 32_000


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


def activation_bytes(model: ModelConfig, vocab_size: int, sizes: Sizes, config: RunConfig, element: int) -> float:
    """Bytes kept between forward and backward for one micro-batch, `element` bytes per number of the hidden states.

    Per token and block: inputs of the two norms and of the linear maps, q, k and v, the feed-forward before its gelu,
    and a byte per element under dropout; behind its attention the last block has the states only. With recomputation
    each block's input, and one block in full.
    """
    tokens, states = sizes.expanded * config.batch.micro, sizes.states * config.batch.micro
    dropped = 2 * model.width if model.dropout else 0
    attention = tokens * (element * 6 * model.width + _FP32 * model.heads)
    after = element * (2 * model.width + model.ffn) + dropped
    block = attention + tokens * after
    blocks = (model.layers - 1) * block + attention + states * after
    if config.parallel.activation_checkpointing:
        blocks = model.layers * tokens * element * model.width + block
    head = states * element * 4 * model.width
    graph = config.batch.micro * _FP32 * (3 * sizes.targets * sizes.states)
    if model.objective == "exlm":
        graph += config.batch.micro * _FP32 * 2 * sizes.states**2
        head += states * element * (2 * model.width if learns_transitions(model) else 0)
    return blocks + head + graph


def memory_per_rank(config: RunConfig, vocab_size: int, sizes: Sizes, world: int) -> dict[str, float]:
    """Estimated bytes on one of `world` data-parallel ranks, by kind.

    ZeRO divides the optimizer states (stage 1), also the gradients (2), also the weights (3) by the number of ranks.
    Scratch space of single operations, the framework and fragmentation are not in it.
    """
    count = sum(count_parameters(config.model, vocab_size).values())
    element = _FP32 if config.precision.dtype == "fp32" else 2
    master = 0 if element == _FP32 and config.parallel.zero == 0 else _FP32
    zero = config.parallel.zero
    optimizer = count * (master + 2 * _FP32) / (world if zero >= 1 else 1)
    parts = {
        "weights": count * element / (world if zero >= 3 else 1),
        "gradients": count * element / (world if zero >= 2 else 1),
        "optimizer (host)" if config.parallel.offload else "optimizer": optimizer,
        "activations": activation_bytes(config.model, vocab_size, sizes, config, element),
    }
    return parts


def prepared_sizes(path: Path) -> tuple[int | None, int | None]:
    """(longest sequence, vocabulary size) of the prepared data in `path`; None for what its manifest does not tell."""
    manifest = path / "manifest.json"
    if not manifest.is_file():
        return None, None
    content = json.loads(manifest.read_text(encoding="utf-8"))
    return content.get("max_length"), content.get("vocab_size")


def cost_table(config: RunConfig, vocab_size: int, length: int, world: int) -> list[tuple[str, str]]:
    """Rows (what, value) for `exlm config check`, for sequences of `length` tokens on `world` ranks."""
    model = config.model
    sizes = Sizes.of(model, length, expected_masked(length, config.masking.ratio))
    parameters = count_parameters(model, vocab_size)
    flops = flops_per_sequence(model, vocab_size, sizes)
    memory = memory_per_rank(config, vocab_size, sizes, world)
    on_device = sum(size for name, size in memory.items() if "host" not in name)
    total = sum(flops.values())
    accumulation = config.batch.sequences / (world * config.batch.micro)
    return [
        ("sequence length, vocabulary", f"{length}, {vocab_size}"),
        ("parameters", f"{sum(parameters.values()):,} ({_parts(parameters, 1e6, 'M')})"),
        (
            "expanded length (expected)",
            f"{sizes.expanded:.1f} tokens, {sizes.states:.1f} states, {sizes.targets:.1f} targets",
        ),
        ("FLOPs per sequence", f"{total / 1e9:.4g} GF ({_parts(flops, 1e9, 'GF')})"),
        ("FLOPs per step", f"{total * config.batch.sequences / 1e12:.4g} TF for {config.batch.sequences} sequences"),
        ("micro-batches per rank and step", f"{accumulation:g} on {world} ranks of {config.batch.micro} sequences"),
        ("memory per rank (estimate)", f"{on_device / 2**20:,.0f} MiB ({_parts(memory, 2**20, 'MiB')})"),
    ]


def describe(config: RunConfig, *, world: int = 1, length: int | None = None, vocab_size: int | None = None) -> str:
    """The cost table as text; `length` and `vocab_size` default to those of the prepared data, else 128 and 32000."""
    known_length, known_vocabulary = prepared_sizes(Path(config.data.path))
    length = length or known_length or _LENGTH_UNKNOWN
    vocab_size = vocab_size or known_vocabulary or _VOCABULARY_UNKNOWN
    rows = cost_table(config, vocab_size, length, world)
    left = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{left}}  {value}" for name, value in rows)


def _parts(parts: dict[str, float], unit: float, symbol: str) -> str:
    return ", ".join(f"{name} {value / unit:.4g}" for name, value in parts.items()) + f" {symbol}"
