"""Our ExLM training step beside the same model written the obvious way (straightforward.py), on a CPU.

    python benchmarks/train_cpu.py                     # 4 layers, width 256, 128 tokens, k 4, vocabulary 8192

Both sides start from the same weights; their losses and gradients must agree in fp64 without dropout before anything is
timed. Steps (forward, backward, AdamW) are interleaved in one process; the peak memory of each side is measured in a
process of its own, less what that process used before the model was built. On a busy machine, pass `--threads 1` and
read the processor time. Writes a CSV with hardware, versions and commit to results/.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from straightforward import PaddedBatch, StraightforwardExLM  # noqa: E402

from exlm_dist.config.schema import ModelConfig  # noqa: E402
from exlm_dist.data.batch import PackedBatch  # noqa: E402
from exlm_dist.data.expansion import expand, wrap  # noqa: E402
from exlm_dist.data.masking import mask_batch, sample_keys  # noqa: E402
from exlm_dist.data.packing import pack  # noqa: E402
from exlm_dist.model.build import build_model  # noqa: E402
from exlm_dist.model.objective import loss_sum  # noqa: E402
from exlm_dist.model.stream import Stream  # noqa: E402
from exlm_dist.tokenizers.tokenizer import NUM_SPECIAL  # noqa: E402

SIDES = ("ours", "straightforward")
SETTINGS = ("layers", "width", "heads", "length", "shortest", "states", "vocabulary", "sequences", "dropout", "rounds")
TOLERANCE = 1e-8


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence, BOS and EOS counted")
    parser.add_argument("--shortest", type=int, help="draw lengths evenly from here to --length (default: all equal)")
    parser.add_argument("--states", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--sequences", type=int, default=32, help="sequences of a step")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the CSV")
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def model_config(args: argparse.Namespace, dropout: float) -> ModelConfig:
    return ModelConfig(
        layers=args.layers,
        width=args.width,
        heads=args.heads,
        ffn=4 * args.width,
        states=args.states,
        dropout=dropout,
        attention_dropout=dropout,
        max_positions=4 * args.length,
    )


def make_batch(args: argparse.Namespace, seed: int) -> PackedBatch:
    """Random tokens, masked, expanded and packed."""
    random = np.random.default_rng(seed)
    lengths = random.integers((args.shortest or args.length) - 2, args.length - 2, args.sequences, endpoint=True)
    tokens = random.integers(NUM_SPECIAL, args.vocabulary, lengths.sum())
    return packed(model_config(args, args.dropout), tokens, lengths, args.vocabulary, seed)


def packed(config: ModelConfig, tokens: np.ndarray, lengths: np.ndarray, vocabulary: int, seed: int) -> PackedBatch:
    """Sequences (without BOS and EOS) through the package's own masking, expansion and packing."""
    samples, epochs = np.arange(len(lengths)), np.zeros(len(lengths), np.int64)
    masks = mask_batch(tokens, lengths, sample_keys(seed, epochs, samples), ratio=0.15, vocab_size=vocabulary)
    expanded = expand(wrap(tokens, lengths, masks, anchors=config.anchors), config.states)
    identity = {"sample_ids": samples, "epochs": epochs, "step": 0, "index": 0}
    return pack(expanded, 0, len(lengths), states=config.states, bucket=1, **identity)


def build_ours(args: argparse.Namespace, dropout: float) -> torch.nn.Module:
    return build_model(model_config(args, dropout), args.vocabulary, seed=0)


def build_straightforward(args: argparse.Namespace, dropout: float) -> torch.nn.Module:
    model = StraightforwardExLM.of(model_config(args, dropout), args.vocabulary, dropout)
    model.load_state_dict(build_ours(args, dropout).state_dict())
    return model


def ours_loss(model: torch.nn.Module, batch, step: int = 0) -> torch.Tensor:
    total, invalid = loss_sum(model(Stream.from_batch(batch, dropout_seed=step)), "sequence")
    assert not invalid.any()
    return total / batch.num_sequences


def straightforward_loss(model: torch.nn.Module, batch, step: int = 0) -> torch.Tensor:
    torch.manual_seed(step)
    return model(PaddedBatch.from_packed(batch))


def make_side(side: str, args: argparse.Namespace) -> Callable[[object, int], float]:
    """A function that does one training step on a batch and returns the loss."""
    ours = side == "ours"
    model = (build_ours if ours else build_straightforward)(args, args.dropout)
    loss_of = ours_loss if ours else straightforward_loss
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.98), eps=1e-6, fused=True)

    def step(batch, number: int) -> float:
        loss = loss_of(model, batch, number)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def check_equal(args: argparse.Namespace) -> tuple[float, float]:
    """Relative differences of the loss and of the worst parameter's gradient, in fp64 and without dropout."""
    batch = make_batch(args, 0)
    models = build_ours(args, 0.0).double(), build_straightforward(args, 0.0).double()
    losses = ours_loss(models[0], batch), straightforward_loss(models[1], batch)
    for loss in losses:
        loss.backward()
    difference = abs(losses[0].item() - losses[1].item()) / abs(losses[1].item())
    gradients = [dict(model.named_parameters()) for model in models]
    worst = max(relative(p.grad, gradients[1][name].grad) for name, p in gradients[0].items() if "key.bias" not in name)
    if difference > TOLERANCE or worst > 100 * TOLERANCE:
        raise SystemExit(f"the two sides differ: loss by {difference:.1e}, a gradient by {worst:.1e} (relative)")
    return difference, worst


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def time_sides(args: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """(elapsed, processor) seconds of every timed step, the sides taking turns on the same batches."""
    steps = {side: make_side(side, args) for side in SIDES}
    seconds: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for number in range(args.rounds + 1):
        batch = make_batch(args, number)
        for side in SIDES if number % 2 else SIDES[::-1]:
            start, used = time.perf_counter(), time.process_time()
            steps[side](batch, number)
            if number:  # the first step warms up
                seconds[side].append((time.perf_counter() - start, time.process_time() - used))
    return seconds


def peak_mib() -> float:
    """Largest resident size of this process so far (Linux; getrusage would report the parent's after a fork)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def print_memory(side: str, args: argparse.Namespace) -> None:
    """Two numbers: MiB before the model was built, and the peak after three steps."""
    before = peak_mib()
    step = make_side(side, args)
    for number in range(3):
        step(make_batch(args, number), number)
    print(before, peak_mib())


def measure_memory(side: str, args: argparse.Namespace) -> tuple[float, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", side]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout.split()
    return float(printed[0]), float(printed[1])


def provenance(threads: int) -> dict[str, str]:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "date": date.today().isoformat(),
        "commit": commit.strip(),
        "cpu": f"{cpu} x{os.cpu_count()}",
        "threads": str(threads),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    args = options()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print_memory(args.memory_of, args)
        return
    loss, gradient = check_equal(args)
    print(f"equal in fp64 without dropout: loss to {loss:.1e}, gradients to {gradient:.1e} (relative)")
    seconds = time_sides(args)
    rows = []
    for side in SIDES:
        before, peak = measure_memory(side, args)
        elapsed, used = zip(*seconds[side])
        low, median, high = statistics.quantiles(elapsed, n=4)
        rows.append(
            {
                "side": side,
                "ms": median * 1e3,
                "ms_q1": low * 1e3,
                "ms_q3": high * 1e3,
                "cpu_ms": statistics.median(used) * 1e3,
                "mib": peak - before,
                "mib_process": peak,
            }
        )
    report(args, rows)


def report(args: argparse.Namespace, rows: list[dict]) -> None:
    print(f"{'':16} {'ms/step':>9} {'(quartiles)':>17} {'cpu ms':>9} {'peak MiB':>9} {'whole process':>14}")
    for row in rows:
        spread = f"({row['ms_q1']:.0f}..{row['ms_q3']:.0f})"
        sizes = f"{row['cpu_ms']:9.0f} {row['mib']:9.0f} {row['mib_process']:14.0f}"
        print(f"{row['side']:16} {row['ms']:9.0f} {spread:>17} {sizes}")
    ours, other = rows
    speed, work, memory = other["ms"] / ours["ms"], other["cpu_ms"] / ours["cpu_ms"], ours["mib"] / other["mib"]
    print(f"ours: {speed:.2f} times faster ({work:.2f} in processor time), {memory:.2f} of its peak memory")
    setting = {name: getattr(args, name) for name in SETTINGS}
    shared = {**provenance(args.threads), **setting}
    numbers = [{name: f"{v:.1f}" if isinstance(v, float) else v for name, v in row.items()} for row in rows]
    print(append_rows(args.out, "train_cpu", [{**row, **shared} for row in numbers]))


def append_rows(folder: Path, stem: str, rows: list[dict]) -> Path:
    """Write rows to the end of the day's CSV in `folder`, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}_{date.today().isoformat()}.csv"
    fresh = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if fresh:
            writer.writeheader()
        writer.writerows(rows)
    return path


if __name__ == "__main__":
    main()
