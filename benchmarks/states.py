"""Do the k states of a mask come to carry meaning where masked tokens depend on each other?

    python benchmarks/states.py                                             # a minute on a core
    python benchmarks/states.py --arms group group-clones lanes-clones --seeds 0 1 2 --tasks topics
    python benchmarks/states.py --batch 0                                   # exact gradients: no noise of sampling
    python benchmarks/states.py --saddle                                    # gradient and curvature at the start

Toys that have nothing else to learn: the best joint distribution of the masked tokens and the best independent one are
known. The model is the project's own, one layer of width 32; what an arm adds to it stands in `Arm`. `left` is the
first step at which coupling is a tenth of what it can be. `--saddle` asks without a network: tokens of each state and
transitions between them are free logits, for a letter that stands twice. Findings: docs/alignment.md.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

from exlm_dist.config.schema import ModelConfig  # noqa: E402
from exlm_dist.data.expansion import expand, wrap  # noqa: E402
from exlm_dist.data.masking import Masks  # noqa: E402
from exlm_dist.data.packing import pack  # noqa: E402
from exlm_dist.kernels.dag import dag_best_path, dag_log_likelihood, naive  # noqa: E402
from exlm_dist.model.build import build_model  # noqa: E402
from exlm_dist.model.objective import joint_log_probs, single_log_probs  # noqa: E402
from exlm_dist.model.stream import Stream  # noqa: E402
from exlm_dist.tokenizers.tokenizer import MASK, NUM_SPECIAL  # noqa: E402

VOCABULARY = NUM_SPECIAL + 8
#: Match score of a state that no path may visit.
CLOSED = -1e4


@dataclass(frozen=True)
class Task:
    """Sequences of letters, all of one length and equally probable, and which positions are masked."""

    draw: Callable[[np.random.Generator, int], np.ndarray]  # -> [count, length] letters from 0 to 7
    masked: tuple[int, ...]
    independent: float  # entropy of the masked tokens of a sequence one by one, nats
    joint: float  # of all at once


def _pairs(number: int) -> Callable[[np.random.Generator, int], np.ndarray]:
    """`number` letters of four, each standing twice."""
    return lambda rng, count: np.repeat(rng.integers(0, 4, (count, number)), 2, 1)


def _topics(rng: np.random.Generator, count: int) -> np.ndarray:
    """Three letters, all of one of four topics of two letters each."""
    return 2 * rng.integers(0, 4, (count, 1)) + rng.integers(0, 2, (count, 3))


def _context(rng: np.random.Generator, count: int) -> np.ndarray:
    """A visible letter of two, which says of which half of the alphabet the letter is that follows three times."""
    half = rng.integers(0, 2, (count, 1))
    return np.concatenate([4 * half, np.repeat(4 * half + rng.integers(0, 4, (count, 1)), 3, 1)], 1)


LOG_2, LOG_4, LOG_8 = math.log(2), math.log(4), math.log(8)
TASKS = {
    "twice": Task(_pairs(1), (0, 1), 2 * LOG_4, LOG_4),
    "pairs": Task(_pairs(3), (0, 1, 2, 3, 4, 5), 6 * LOG_4, 3 * LOG_4),
    "topics": Task(_topics, (0, 1, 2), 3 * LOG_8, LOG_4 + 3 * LOG_2),
    "context": Task(_context, (1, 2, 3), 3 * LOG_4, LOG_4),
}


@dataclass(frozen=True)
class Arm:
    """What differs from dense transitions with the prior `group`, k = 4, anchors."""

    model: dict[str, object] = field(default_factory=dict)
    clones: float = 0.0  # standard deviation of an embedding per clone, added to the token's; 0: there is none
    hard: float = 0.0  # fraction of the steps in which the best path alone is trained
    closed: float = 0.0  # fraction of the states that no path of a step may visit
    power: float = 1.0  # of the probabilities of paths in the loss: large for the best paths only
    information: float = 0.0  # weight of the mutual information of a mask's state and the sequence


#: Paths keep to one index of the clone, and choose it freely: without anchors they start and end at any of the k.
LANES: dict[str, object] = {"jump_prior": "gaussian", "jump_width": 0.2, "jump_floor": 12.0, "anchors": False}
ARMS = {
    "group": Arm(),
    "group-clones": Arm(clones=0.5),
    "group-rough": Arm({"init_std": 0.2}),
    "group-clones-free": Arm({"anchors": False}, clones=0.5),
    "group-clones-hard": Arm(clones=0.5, hard=0.5),
    "group-clones-closed": Arm(clones=0.5, closed=0.5),
    "group-clones-power": Arm(clones=0.5, power=4.0),
    "group-clones-information": Arm(clones=0.5, information=1.0),
    "lanes": Arm(LANES),
    "lanes-clones": Arm(LANES, clones=0.5),
    "lanes-clones-anchors": Arm({**LANES, "anchors": True}, clones=0.5),
    "lanes-clones-wide": Arm({**LANES, "jump_width": 0.4}, clones=0.5),
    "lanes-clones-hard": Arm(LANES, clones=0.5, hard=0.25),
    "lanes-hard": Arm(LANES, hard=0.25),
}


class Toy(nn.Module):
    """The project's model of one layer, with an embedding per clone where the arm has one."""

    def __init__(self, arm: Arm, seed: int, states: int) -> None:
        super().__init__()
        settings = {"layers": 1, "width": 32, "heads": 2, "ffn": 64, "states": states, "max_positions": 128,
                    "dropout": 0.0, "attention_dropout": 0.0, **arm.model}  # fmt: skip
        self.config = ModelConfig(**settings)
        self.model = build_model(self.config, VOCABULARY, seed=seed)
        table = arm.clones * torch.randn(states + 1, 32, generator=torch.Generator().manual_seed(seed + 1000))
        self.clones = nn.Parameter(table.index_fill(0, torch.tensor([0]), 0.0)) if arm.clones else None

    def forward(self, stream: Stream) -> Stream:
        for layer in self.model.layers:
            stream = layer(stream)
            if layer is self.model.embedding and self.clones is not None:
                stream = stream.replace(hidden=stream.hidden + self.clones[stream.clone])
        return stream


def stream_of(task: Task, letters: np.ndarray, config: ModelConfig) -> tuple[Stream, Tensor]:
    """Model input of the sequences, and which targets are masked tokens, [N]."""
    count, length = letters.shape
    masked = (np.arange(count)[:, None] * length + np.array(task.masked)).ravel()
    masks = Masks(masked, np.full(count, len(task.masked)), np.full(len(masked), MASK))
    tokens = (letters + NUM_SPECIAL).astype(np.int64).ravel()
    expanded = expand(wrap(tokens, np.full(count, length), masks, config.anchors), config.states)
    ids = np.arange(count)
    batch = pack(expanded, 0, count, states=config.states, bucket=1, sample_ids=ids, epochs=ids * 0, step=0, index=0)
    return Stream.from_batch(batch), torch.from_numpy(batch.is_masked)


def loss_of(result: Stream, arm: Arm, generator: torch.Generator, progress: float) -> Tensor:
    """Loss of a step, nats a sequence; `progress` is the fraction of the steps that are done."""
    match, transitions = result.match, result.transitions
    sizes, ends = (result.num_targets, result.num_states), result.ends
    if arm.closed:
        closed = closed_states(result, arm.closed, generator)[:, None]
        free = torch.zeros_like(match).masked_fill(closed, CLOSED)
        weight = dag_log_likelihood(free, transitions, *sizes, ends=ends)
        return (weight - dag_log_likelihood(match.masked_fill(closed, CLOSED), transitions, *sizes, ends=ends)).mean()
    if progress < arm.hard:
        path, _ = dag_best_path(match, transitions, *sizes, ends=ends)
        elsewhere = path[:, None] != torch.arange(match.shape[1])[:, None]
        match = match.masked_fill(elsewhere, -math.inf)
    log_likelihood = dag_log_likelihood(arm.power * match, arm.power * transitions, *sizes, ends=ends)
    loss = -log_likelihood.mean() / arm.power
    return loss - arm.information * information(result) if arm.information else loss


def closed_states(result: Stream, fraction: float, generator: torch.Generator) -> Tensor:
    """[B, L] bool: states drawn at random, but at least one of each group stays, and all of an anchor's."""
    count, _, states = result.match.shape
    drawn = torch.rand((count, states // result.states, result.states), generator=generator)
    closed = (drawn < fraction) & (drawn < drawn.amax(2, keepdim=True))
    if result.ends == 1:
        closed[:, 0] = closed[:, -1] = False
    return closed.flatten(1)


def information(result: Stream) -> Tensor:
    """Mutual information of a mask's own state, given the targets, and the sequence: nats, mean over the masks."""
    log_p = naive.dag_log_likelihood(
        result.match, result.transitions, result.num_targets, result.num_states, ends=result.ends
    )
    (posterior,) = torch.autograd.grad(log_p.sum(), result.match, create_graph=True)
    own = posterior.unflatten(2, (-1, result.states)).diagonal(dim1=1, dim2=2).mT + 1e-6  # [B, N, k]
    own = own / own.sum(2, keepdim=True)
    return (torch.special.entr(own.mean(0)).sum(1) - torch.special.entr(own).sum(2).mean(0)).mean()


@torch.no_grad()
def measure(toy: Toy, stream: Stream, is_masked: Tensor) -> tuple[float, float]:
    """(nll, joint nll) of docs/metric.md, but in nats a sequence."""
    result = toy(stream.replace(predict=True))
    chosen = result.by_target(is_masked, False)
    single = torch.where(chosen, single_log_probs(result), 0.0).sum(1)
    return -float(single.mean()), -float(joint_log_probs(result, chosen).mean())


@dataclass
class Row:
    """One run at its end."""

    task: str
    arm: str
    states: int
    seed: int
    batch: int
    steps: int
    nll: float  # nats a sequence
    joint_nll: float
    coupling: float
    left: int | None
    seconds: float  # of the processor


def train(task: str, arm: str, seed: int, options: argparse.Namespace) -> Row:
    """Train one run."""
    begun = time.process_time()
    sizes, toy = TASKS[task], Toy(ARMS[arm], seed, options.states)
    optimizer = torch.optim.Adam(toy.parameters(), lr=options.rate, betas=(0.9, 0.98))
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    everything = np.unique(sizes.draw(np.random.default_rng(0), 10000), axis=0)
    whole, is_masked = stream_of(sizes, everything, toy.config)
    left, every = None, max(1, options.steps // 20)
    for step in range(options.steps):
        stream = stream_of(sizes, sizes.draw(rng, options.batch), toy.config)[0] if options.batch else whole
        optimizer.zero_grad()
        loss_of(toy(stream), ARMS[arm], generator, step / options.steps).backward()
        nn.utils.clip_grad_norm_(toy.parameters(), 1.0)
        optimizer.step()
        if left is None and (step + 1) % every == 0:
            nll, joint = measure(toy, whole, is_masked)
            left = step + 1 if nll - joint > 0.1 * (sizes.independent - sizes.joint) else None
    nll, joint = measure(toy, whole, is_masked)
    values = [round(value, 4) for value in (nll, joint, nll - joint)]
    seconds = round(time.process_time() - begun, 1)
    return Row(task, arm, options.states, seed, options.batch, options.steps, *values, left, seconds)


class Saddle:
    """P(w, x) = sum over c, d of p_c(w) T(d | c) q_d(x) / k: a letter of k that stands twice, k states, free logits."""

    def __init__(self, lane: float, states: int = 4) -> None:
        """`lane`: nats more for going on to the state of the same index."""
        self.lane, self.states = lane, states
        self.size = 3 * states * states

    def loss(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(joint nll, coupling) of the logits of p, q and T, [3 k k]."""
        first, second, jump = logits.view(3, self.states, self.states)
        transitions = (jump + self.lane * torch.eye(self.states, dtype=torch.float64)).softmax(1)
        joint = first.softmax(1).T @ transitions @ second.softmax(1) / self.states
        nll = -joint.diagonal().log().mean()
        return nll, -(joint.sum(1) * joint.sum(0)).log().mean() - nll

    def start(self, deviation: float, seed: int = 0) -> Tensor:
        """Logits that differ from one another by `deviation`."""
        generator = torch.Generator().manual_seed(seed)
        return deviation * torch.randn(self.size, generator=generator, dtype=torch.float64)

    def curvature(self) -> float:
        """The lowest eigenvalue of the Hessian where all states are alike."""
        hessian = torch.autograd.functional.hessian(lambda logits: self.loss(logits)[0], self.start(0.0))
        return float(torch.linalg.eigvalsh(hessian)[0])

    def gradient(self, deviation: float) -> float:
        """Norm of the gradient in the directions in which the states' tokens come apart."""
        logits = self.start(deviation).requires_grad_()
        (found,) = torch.autograd.grad(self.loss(logits)[0], logits)
        tokens = found.view(3, self.states, self.states)[:2]
        return float((tokens - tokens.mean(1, keepdim=True)).norm())

    def steps(self, deviation: float, rate: float = 1.0, limit: int = 5000) -> int | None:
        """Steps of plain gradient descent until coupling is 0.139 of the 1.386 nats that there are."""
        logits = self.start(deviation).requires_grad_()
        for step in range(limit):
            nll, coupling = self.loss(logits)
            if coupling > 0.1 * math.log(self.states):
                return step
            (found,) = torch.autograd.grad(nll, logits)
            logits = (logits - rate * found).detach().requires_grad_()
        return None


def print_saddle() -> None:
    """Curvature, gradient and time at the start, by how much more probable the same clone is."""
    print("| lane, nats | lowest eigenvalue | gradient at .1, .01, .001 | steps to leave from .1, .01, .001 |")
    print("|---|---|---|---|")
    for lane in (0.0, 1.0, 2.0, 4.0):
        saddle, sizes = Saddle(lane), (0.1, 0.01, 0.001)
        gradients = " ".join(f"{saddle.gradient(size):.1e}" for size in sizes)
        print(
            f"| {lane} | {saddle.curvature():.4f} | {gradients} | {[saddle.steps(size) for size in sizes]} |",
            flush=True,
        )


def main(argv: list[str] | None = None) -> int:
    """Train and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["twice", "topics"])
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=["group-clones", "lanes", "lanes-clones", "lanes-clones-hard"]
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--states", type=int, default=4, help="k")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32, help="sequences a step; 0: each that there is, once")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--saddle", action="store_true", help="gradient and curvature at the start instead")
    parser.add_argument("--out", type=Path, help="CSV")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.saddle:
        print_saddle()
        return 0
    rows = []
    print(
        "| task (independent; joint) | arm | seed | nll | joint nll | coupling | left |\n|---|---|---|---|---|---|---|"
    )
    for task, arm, seed in [(t, a, s) for t in options.tasks for a in options.arms for s in options.seeds]:
        rows.append(row := train(task, arm, seed, options))
        best = f"{task} ({TASKS[task].independent:.3f}; {TASKS[task].joint:.3f})"
        print(
            f"| {best} | {arm} | {seed} | {row.nll:.3f} | {row.joint_nll:.3f} | {row.coupling:.3f} | {row.left} |",
            flush=True,
        )
    if options.out:
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(rows[0])))
            writer.writeheader()
            writer.writerows(map(asdict, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
