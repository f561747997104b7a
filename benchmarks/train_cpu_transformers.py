"""Our training step, plain and ExLM, beside BERT and ModernBERT of the transformers library, on a CPU.

    python benchmarks/train_cpu_transformers.py text --threads 1      # 32 sequences of 128, vocabulary 8192
    python benchmarks/train_cpu_transformers.py smiles --threads 2    # 96 molecules as long as ZINC's, vocabulary 66

All have 4 layers of width 256 with 4 heads and start from random weights; the gated feed-forward of ModernBERT is two
thirds as wide, so that parameters and operations are those of the others. The steps (forward, backward, fused AdamW,
fp32) take turns in one process on the same tokens and masks. Those of transformers are batches padded to their longest
sequence, with its fused attention (sdpa), and ModernBERT makes logits of the masked positions only (sparse_prediction);
BERT makes them all, which is all it offers. `--dropout` acts in all models, on hidden states and attention weights.
`--grouped` takes sequences of like length into a batch, as its Trainer does with `group_by_length`. `--data` reads
tokens, and so lengths, from a folder of `exlm prepare`.

Operations are counted twice. Ideal, as in exlm_dist/model/cost.py: no padding, logits at masked positions (ExLM: at the
states). Needed: less what our last block skips, which after its attention continues with the states only. Appends to a
CSV in results/. Needs transformers (launchers/install.sh hf), and a machine without other work.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from train_cpu import ROOT, append_rows, ours_loss, packed, provenance

from exlm_dist.config.schema import ModelConfig
from exlm_dist.data.batch import PackedBatch
from exlm_dist.data.shards import ShardDataset
from exlm_dist.model.build import build_model
from exlm_dist.model.cost import Sizes, flops_per_sequence
from exlm_dist.tokenizers.tokenizer import BOS, EOS, NUM_SPECIAL, PAD

OURS, THEIRS = ("plain", "exlm"), ("bert", "modernbert")
SIDES = OURS + THEIRS
SETTINGS = ("domain", "layers", "width", "heads", "sequences", "dropout", "grouped", "rounds")
IGNORED = -100  # label of a token without a loss
GROUPED = 50  # batches whose sequences are sorted by length, as in transformers

Step = Callable[[dict[str, PackedBatch], int], float]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("domain", choices=("text", "smiles"))
    parser.add_argument("--data", type=Path, help="prepared folder (default: random tokens)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--sequences", type=int, help="sequences of a step (default: 32 of text, 96 molecules)")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--grouped", action="store_true", help="batches of sequences of like length")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the CSV")
    args = parser.parse_args()
    args.sequences = args.sequences or {"text": 32, "smiles": 96}[args.domain]
    return args


class Source:
    """Tokens without BOS and EOS: of a prepared folder, or random ones of likely lengths."""

    def __init__(self, domain: str, folder: Path | None) -> None:
        self.dataset = folder and ShardDataset.open(folder, "train")
        self.domain = domain
        self.vocabulary = self.dataset.vocab_size if self.dataset else {"text": 8192, "smiles": 66}[domain]

    def draw(self, random: np.random.Generator, count: int) -> list[np.ndarray]:
        """`count` sequences."""
        if self.dataset:
            tokens, lengths = self.dataset.read(random.integers(len(self.dataset), size=count))
        elif self.domain == "text":
            lengths = np.full(count, 126)
        else:  # mean, deviation, shortest and longest of ZINC's molecules
            lengths = random.normal(40.3, 8.5, count).round().clip(11, 74).astype(np.int64)
        if not self.dataset:
            tokens = random.integers(NUM_SPECIAL, self.vocabulary, lengths.sum())
        return np.split(tokens, np.cumsum(lengths)[:-1])


def batches(args: argparse.Namespace, source: Source) -> Iterator[dict[str, PackedBatch]]:
    """The same sequences and masks as a batch of each of our models."""
    random = np.random.default_rng(0)
    sequences: list[list[np.ndarray]] = []
    for step in range(args.rounds + 1):
        if not sequences:
            drawn = source.draw(random, args.sequences * (GROUPED if args.grouped else 1))
            if args.grouped:
                drawn.sort(key=len)
            parts = [drawn[i : i + args.sequences] for i in range(0, len(drawn), args.sequences)]
            sequences = [parts[i] for i in random.permutation(len(parts))]
        chosen = sequences.pop()
        tokens, lengths = np.concatenate(chosen).astype(np.int64), np.array([len(one) for one in chosen])
        yield {side: packed(config(args, side), tokens, lengths, source.vocabulary, seed=step) for side in OURS}


def config(args: argparse.Namespace, side: str) -> ModelConfig:
    """Of one of our models."""
    kind = {"plain": {"objective": "mlm", "states": 1, "anchors": False, "rotary": "1d", "transitions": "uniform"}}
    return ModelConfig(
        layers=args.layers,
        width=args.width,
        heads=args.heads,
        ffn=4 * args.width,
        dropout=args.dropout,
        attention_dropout=args.dropout,
        max_positions=512,
        **kind.get(side, {"states": 4}),
    )


def transformers_model(args: argparse.Namespace, side: str, vocabulary: int) -> torch.nn.Module:
    """BertForMaskedLM or ModernBertForMaskedLM of the size of our models, with random weights."""
    # transformers looks for a package `kernels`, and would take the file of that name beside this one for it.
    here = Path(__file__).resolve().parent
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != here]
    try:
        import transformers as hf
    except ImportError as error:
        raise SystemExit(f"{error}: install it with `launchers/install.sh hf`") from error
    torch.manual_seed(0)
    size = {
        "vocab_size": vocabulary,
        "hidden_size": args.width,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "max_position_embeddings": 512,
        "attn_implementation": "sdpa",
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "attention_dropout": args.dropout,
    }
    if side == "bert":
        probabilities = {"hidden_dropout_prob": args.dropout, "attention_probs_dropout_prob": args.dropout}
        return hf.BertForMaskedLM(hf.BertConfig(**size, **probabilities, intermediate_size=4 * args.width))
    special = {"cls_token_id": BOS, "sep_token_id": EOS, "sparse_prediction": True, "reference_compile": False}
    probabilities = {"mlp_dropout": args.dropout, "embedding_dropout": args.dropout}
    inner = round(8 * args.width / 3 / 16) * 16  # two thirds; a multiple of 16 is fast
    return hf.ModernBertForMaskedLM(hf.ModernBertConfig(**size, **special, **probabilities, intermediate_size=inner))


def padded(batch: PackedBatch) -> dict[str, torch.Tensor]:
    """A batch of the plain model as transformers takes it: input_ids, attention_mask, labels [B, longest]."""
    labels = np.full_like(batch.input_ids, IGNORED)
    labels[batch.state_index] = batch.target_ids
    spans = list(zip(batch.cu_tokens[:-1], batch.cu_tokens[1:]))

    def rows(values: np.ndarray, fill: int) -> torch.Tensor:
        parts = [torch.from_numpy(values[a:b]) for a, b in spans]
        return pad_sequence(parts, batch_first=True, padding_value=fill)

    ids = rows(batch.input_ids, PAD)
    return {
        "input_ids": ids,
        "attention_mask": rows(np.ones_like(labels), 0),
        "labels": rows(labels, IGNORED),
    }


def make_side(args: argparse.Namespace, side: str, vocabulary: int) -> tuple[torch.nn.Module, Step]:
    """The model, and a function that does one training step on a batch and returns the loss."""
    ours = side in OURS
    model = (
        build_model(config(args, side), vocabulary, seed=0) if ours else transformers_model(args, side, vocabulary)
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.98), eps=1e-6, fused=True)

    def step(batch: dict[str, PackedBatch], number: int) -> float:
        loss = ours_loss(model, batch[side], number) if ours else model(**padded(batch["plain"])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return model, step


def gflop(args: argparse.Namespace, side: str, batch: dict[str, PackedBatch], vocabulary: int) -> tuple[float, float]:
    """Operations of a step, forward and backward: ideal, and needed."""
    settings, chosen = config(args, side), batch["exlm" if side == "exlm" else "plain"]
    anchors, k = 2 * settings.anchors, settings.states
    ideal = 0.0
    for tokens, targets in zip(np.diff(chosen.cu_tokens), np.diff(chosen.cu_targets)):
        sizes = Sizes.of(settings, int(tokens - (k - 1) * targets), int(targets - anchors))
        ideal += sum(flops_per_sequence(settings, vocabulary, sizes).values())
    skipped = chosen.num_tokens - chosen.num_states if side in OURS else 0
    return ideal / 1e9, (ideal - 6 * skipped * settings.width * (settings.width + 2 * settings.ffn)) / 1e9


def main() -> None:
    args = options()
    torch.set_num_threads(args.threads)
    source = Source(args.domain, args.data)
    sides = {side: make_side(args, side, source.vocabulary) for side in args.sides}
    seconds: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    work: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    losses: dict[str, list[float]] = {side: [] for side in sides}
    order = list(sides)
    for number, batch in enumerate(batches(args, source)):
        order.append(order.pop(0))  # each side is first, and after each other side, equally often
        for side in order if number % 2 else order[::-1]:
            start, used = time.perf_counter(), time.process_time()
            losses[side].append(sides[side][1](batch, number))
            if number:  # the first step warms up
                seconds[side].append((time.perf_counter() - start, time.process_time() - used))
                work[side].append(gflop(args, side, batch, source.vocabulary))
    rows = [row(side, sides[side][0], seconds[side], work[side], losses[side]) for side in sides]
    report(args, rows, source)


def row(side: str, model: torch.nn.Module, seconds: list, work: list, losses: list[float]) -> dict:
    """What is written of a side."""
    (elapsed, used), (ideal, needed) = zip(*seconds), zip(*work)
    low, median, high = statistics.quantiles(elapsed, n=4)
    return {
        "side": side,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "gflop_ideal": round(statistics.mean(ideal), 2),
        "gflop_needed": round(statistics.mean(needed), 2),
        "ms": round(median * 1e3, 1),
        "ms_q1": round(low * 1e3, 1),
        "ms_q3": round(high * 1e3, 1),
        "cpu_ms": round(statistics.median(used) * 1e3, 1),
        "first_loss": round(losses[0], 3),
        "last_loss": round(losses[-1], 3),
    }


def report(args: argparse.Namespace, rows: list[dict], source: Source) -> None:
    print(f"{'':12} {'parameters':>11} {'GFLOP':>7} {'ms/step':>9} {'(quartiles)':>17} {'cpu ms':>9} {'loss':>14}")
    for one in rows:
        spread = f"({one['ms_q1']:.0f}..{one['ms_q3']:.0f})"
        sizes = f"{one['parameters']:11,} {one['gflop_needed']:7.1f} {one['ms']:9.1f} {spread:>17} {one['cpu_ms']:9.1f}"
        print(f"{one['side']:12} {sizes} {one['first_loss']:7.3f} {one['last_loss']:6.3f}")
    by_side = {one["side"]: one for one in rows}
    for other in THEIRS:
        if {"plain", other} <= set(by_side):
            print(f"plain is {by_side[other]['ms'] / by_side['plain']['ms']:.2f} times as fast as {other}")
    if set(OURS) <= set(by_side):
        time_ratio, ideal, needed = (
            by_side["exlm"][key] / by_side["plain"][key] for key in ("ms", "gflop_ideal", "gflop_needed")
        )
        print(
            f"exlm / plain: time {time_ratio:.2f}, {time_ratio / ideal:.3f} of the ideal operations ({ideal:.2f}), "
            f"{time_ratio / needed:.3f} of those needed ({needed:.2f})"
        )
    setting = {name: getattr(args, name) for name in SETTINGS}
    data = str(args.data.name) if args.data else "random"
    versions = {"transformers": getattr(sys.modules.get("transformers"), "__version__", "")}
    shared = {**provenance(args.threads), **versions, "vocabulary": source.vocabulary, "data": data, **setting}
    print(append_rows(args.out, "train_cpu_transformers", [{**one, **shared} for one in rows]))


if __name__ == "__main__":
    main()
