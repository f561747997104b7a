"""Completions of all masks jointly beside the most probable token of each mask by itself.

    python benchmarks/fill.py --runs runs/zinc_exlm runs/zinc_mlm --data data/zinc [--sequences 500]

For held-out molecules, the first of the split: the same tokens are masked for every run, as in `exlm evaluate`. Of the
best joint completion (beam search) and of the independent argmax it says how many RDKit can read, how many have every
masked token right, and how many are the molecule that was masked in whatever spelling; besides, how
often the two differ, and the probability of the truth by the joint distribution and by the marginals. Writes a CSV.
"""

from __future__ import annotations

import argparse
import csv
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import numpy as np

from exlm_dist.data.masking import mask_batch, sample_keys
from exlm_dist.data.shards import ShardDataset
from exlm_dist.inference.completions import Scored
from exlm_dist.inference.fill import canonical_form, state_chains
from exlm_dist.inference.loading import LoadedCheckpoint, load_checkpoint
from exlm_dist.tokenizers.tokenizer import MASK


@dataclass
class Result:
    """Fractions of the molecules, for one run, ratio and way to choose."""

    run: str
    objective: str
    budget: str
    step: int
    sequences: int
    mask_ratio: float
    chosen: str
    readable: float
    exact: float
    same_molecule: float
    tokens_right: float
    mean_log_probability: float  # of what was chosen, nats
    truth_log_probability: float  # of what was masked, jointly
    truth_by_marginals: float  # the same with each mask by itself: the sum of the logarithms
    joint_differs: float  # fraction of the molecules for which the joint choice is not the independent one
    transitions: str
    seconds: float


def masked_rows(dataset: ShardDataset, count: int, ratio: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids with MASK, the ids that were there) of the first `count` sequences."""
    samples = np.arange(count)
    tokens, lengths = dataset.read(samples)
    keys = sample_keys(0, np.zeros_like(samples), samples)
    masks = mask_batch(tokens, lengths, keys, ratio=ratio, vocab_size=dataset.vocab_size)
    hidden = tokens.astype(np.int64)
    hidden[masks.indices] = MASK
    ends = np.cumsum(lengths)[:-1]
    return list(zip(np.split(hidden, ends), np.split(tokens.astype(np.int64), ends)))


def compare(loaded: LoadedCheckpoint, dataset: ShardDataset, count: int, ratio: float, beam: int) -> list[Result]:
    rows = masked_rows(dataset, count, ratio)
    start = time.perf_counter()
    picked: dict[str, list[Scored]] = {"joint": [], "independent": []}
    truths: list[tuple[float, float]] = []
    for (hidden, whole), chain in zip(rows, state_chains(loaded, [hidden for hidden, _ in rows])):
        picked["joint"] += chain.best(1, beam)
        marginals, truth = chain.marginals(), whole[hidden == MASK]
        single = tuple(marginals.argmax(1).tolist())
        picked["independent"].append(Scored(single, chain.log_probability(single)))
        by_marginals = np.log(marginals[np.arange(len(truth)), truth]).sum()
        truths.append((chain.log_probability(tuple(truth.tolist())), float(by_marginals)))
    seconds = time.perf_counter() - start
    differs = np.mean([a.tokens != b.tokens for a, b in zip(*picked.values())])
    common = [*np.mean(truths, axis=0), differs]
    return [_judged(loaded, rows, chosen, found, common, ratio, seconds) for chosen, found in picked.items()]


def _judged(loaded, rows, chosen, found, common, ratio, seconds) -> Result:
    tokenizer = loaded.tokenizer
    readable, exact, same, right = [], [], [], []
    for (hidden, whole), one in zip(rows, found):
        filled = hidden.copy()
        filled[hidden == MASK] = one.tokens
        form = canonical_form(tokenizer, tokenizer.decode(filled.tolist()))
        readable.append(form is not None)
        exact.append(bool((filled == whole).all()))
        same.append(form is not None and form == canonical_form(tokenizer, tokenizer.decode(whole.tolist())))
        right.append((filled == whole)[hidden == MASK])
    return Result(
        loaded.config.name,
        loaded.config.model.objective,
        loaded.config.budget,
        int(loaded.folder.name.removeprefix("step-")),
        len(rows),
        ratio,
        chosen,
        *(round(float(np.mean(values)), 4) for values in (readable, exact, same, np.concatenate(right))),
        round(float(np.mean([one.log_probability for one in found])), 3),
        *(round(float(value), 4) for value in common),
        loaded.config.model.transitions,
        round(seconds, 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=500)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.15, 0.3, 0.5])
    parser.add_argument("--beam", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/fill_{date.today()}.csv"))
    options = parser.parse_args()
    dataset = ShardDataset.open(options.data, "valid")
    results = []
    for run in options.runs:
        loaded = load_checkpoint(run, device="cpu")
        for ratio in options.ratios:
            results += compare(loaded, dataset, options.sequences, ratio, options.beam)
    with open(options.out, "w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(results[0])))
        writer.writeheader()
        writer.writerows(map(asdict, results))
    for one in results:
        figures = {
            "readable": one.readable,
            "exact": one.exact,
            "same molecule": one.same_molecule,
            "tokens": one.tokens_right,
            "log P": one.mean_log_probability,
            "truth": one.truth_log_probability,
            "by marginals": one.truth_by_marginals,
            "differ": one.joint_differs,
            "s": one.seconds,
        }
        print(f"{one.run:12} {one.mask_ratio:.0%} {one.chosen:12}", *(f"{name} {x:.3f}" for name, x in figures.items()))


if __name__ == "__main__":
    main()
