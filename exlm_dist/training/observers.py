"""Watches the steps: numbers for the log and `events.jsonl`, sequences without a finite likelihood, and when to give
up.

Everything is read from the device, and exchanged between ranks, once per logged step.
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from exlm_dist.config.schema import RunConfig
from exlm_dist.parallel.process import Process
from exlm_dist.tracking import EventLog
from exlm_dist.training.damage_log import DamageLog
from exlm_dist.training.sources import Sources
from exlm_dist.training.step import StepResult
from exlm_dist.utils.errors import Diverged
from exlm_dist.utils.logs import get_logger

#: Sample ids of a rank that a report names.
NAMED = 16
logger = get_logger(__name__)


@dataclass
class Progress:
    """Work done so far, over all restarts; part of every checkpoint."""

    seconds: float = 0.0  # in training steps: without start, evaluation and saving
    sequences: int = 0
    tokens: int = 0  # unexpanded
    source_tokens: list[int] = field(default_factory=list)  # of each source, where there are several


@dataclass
class _Window:
    """What has gathered since the last report."""

    seconds: float = 0.0
    steps: list[StepResult] = field(default_factory=list)


class Meter:
    """Collects step results and reports them every `tracking.every` steps. `events`: on rank 0 only; `damage`: on one
    rank of each replica."""

    def __init__(
        self,
        config: RunConfig,
        process: Process,
        events: EventLog | None,
        progress: Progress,
        damage: DamageLog | None = None,
        sources: Sources | None = None,
    ) -> None:
        self.config, self.process, self.events, self.progress = config, process, events, progress
        self._damage, self._sources = damage, sources
        known = progress.source_tokens or [progress.tokens]  # of a run that had no sources: of what is now the first
        progress.source_tokens = known + [0] * (len(sources.data.sizes) - len(known)) if sources else []
        self._window = _Window()
        self._unjudged: list[StepResult] = []
        self._mark = time.perf_counter()

    def is_logged(self, step: int) -> bool:
        """Whether the result of step `step` (0-based) is reported: every `tracking.every` steps and at the end."""
        return (step + 1) % self.config.tracking.every == 0 or step + 1 == self.config.schedule.steps

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent inside does not count as training."""
        self._count_time()
        yield
        self._mark = time.perf_counter()

    def _count_time(self) -> None:
        elapsed, self._mark = time.perf_counter() - self._mark, time.perf_counter()
        self._window.seconds += elapsed
        self.progress.seconds += elapsed

    def after_step(self, result: StepResult) -> None:
        """Note one step and, where it is due, report. Diverged on every rank when too many sequences were left
        out."""
        self._window.steps.append(result)
        self._unjudged.append(result)
        self.progress.sequences += result.sizes.num_sequences
        self.progress.tokens += result.sizes.num_original_tokens
        if self._sources is not None:
            read = zip(self.progress.source_tokens, result.sizes.source_tokens, strict=True)
            self.progress.source_tokens = [before + more for before, more in read]
        if self.is_logged(result.step):
            self._report()

    def judge(self) -> None:
        """Look at the steps that no report has looked at yet, as before a save. A collective; Diverged as in
        `after_step`."""
        if self._unjudged:
            self._judge(self.process.all_gather(self._left_out()).sum(0))

    def _report(self) -> None:
        """Exchange and log what has gathered since the last report, and judge it."""
        every = self.process.all_gather([*self._numbers(self._window), *self._left_out()])
        self._count_time()  # the numbers were waited for, so the device has done the work by now
        window, self._window = self._window, _Window()
        invalid = every[:, _NUMBERS:].sum(0)
        self._log(window, every[:, :_NUMBERS], int(invalid[-1]))
        self._judge(invalid)

    def _left_out(self) -> list[float]:
        """Sequences of this rank that each step not yet judged has left out."""
        return torch.stack([torch.cat(step.result.invalid).sum() for step in self._unjudged]).tolist()

    def _numbers(self, window: _Window) -> list[float]:
        last = window.steps[-1]
        scores = [0.0, 0.0, 0.0] if last.result.scores is None else last.result.scores.tolist()
        wait = sum(step.sizes.wait_seconds for step in window.steps)
        return [
            float(last.result.loss),
            *scores,
            wait,
            sum(step.padding_fraction for step in window.steps),
            peak_memory(self.process.device),
            *(self._damage.counts() if self._damage else (0.0, 0.0)),
        ]

    def _log(self, window: _Window, every: torch.Tensor, invalid: int) -> None:
        """Metrics of the last step of the window, rates of all of it. (Names and units: `exlm_dist.tracking`.)"""
        if self.events is None:
            return
        last, steps, seconds = window.steps[-1], len(window.steps), max(window.seconds, 1e-9)
        loss, nll, correct, count = every[:, :4].sum(0).tolist()
        values = {
            "train/loss": loss,
            "train/lr": last.rate,
            "train/grad_norm": float(last.result.grad_norm),
            "train/invalid_sequences": invalid,
            "perf/tokens_per_second": sum(step.sizes.num_original_tokens for step in window.steps) / seconds,
            "perf/expanded_tokens_per_second": sum(step.sizes.num_tokens for step in window.steps) / seconds,
            "perf/step_seconds": seconds / steps,
            "perf/wait_seconds": float(every[:, 4].max()) / steps,
            "perf/padding_fraction": float(every[:, 5].mean()) / steps,
            "perf/memory_megabytes": float(every[:, 6].max()),
            "data/bad_records": float(every[:, 7].sum()),
            "data/retries": float(every[:, 8].sum()),
            "progress/seconds": self.progress.seconds,
            "progress/sequences": self.progress.sequences,
            "progress/tokens": self.progress.tokens,
        }
        if count:
            values |= {"train/nll": nll / count, "train/accuracy": correct / count}
        if self._sources is not None:
            values |= self._sources.metrics(last.step + 1, self.progress.source_tokens)
        self.events.metrics(last.step + 1, values)
        shown = f"  nll {values['train/nll']:.4f}  accuracy {values['train/accuracy']:.3f}" if count else ""
        logger.info(
            "step %d/%d  loss %.4f%s  lr %.2e  norm %.3f  %.0f tokens/s  %.3f s/step  wait %.0f%%",
            last.step + 1,
            self.config.schedule.steps,
            loss,
            shown,
            last.rate,
            values["train/grad_norm"],
            values["perf/tokens_per_second"],
            values["perf/step_seconds"],
            100 * values["perf/wait_seconds"] / values["perf/step_seconds"],
        )

    def _judge(self, invalid: torch.Tensor) -> None:
        """Name the sequences that were left out, `invalid` of each step; Diverged where a step has too many of
        them."""
        steps, self._unjudged = self._unjudged, []
        limit = self.config.loss.max_invalid
        for step, count in zip(steps, invalid.tolist()):
            if not count:
                continue
            masks = (mask.cpu().numpy() for mask in step.result.invalid)
            mine = [int(sample) for ids, mask in zip(step.sample_ids, masks) for sample in ids[mask]][:NAMED]
            every = self.process.all_gather([*mine, *[-1] * (NAMED - len(mine))]).flatten().long()
            name = str if self._sources is None else self._sources.data.named
            named = ", ".join(name(sample) for sample in every[every >= 0].tolist()[:NAMED])
            fraction = count / step.sizes.num_sequences
            of_all = f"{int(count)} of {step.sizes.num_sequences} sequences"
            text = f"step {step.step + 1}: {of_all} have no finite likelihood: samples {named}"
            if self.events is not None:
                logger.warning("%s. They were left out.", text)
                self.events.tags({f"invalid_step_{step.step + 1}": f"samples {named}"})
            if fraction > limit:
                raise Diverged(
                    f"{text}. That is a fraction of {fraction:.3g}, more than loss.max_invalid {limit:g}. "
                    "Lower optimizer.lr, set optimizer.clip, or look at these samples."
                )


#: Numbers of `Meter._numbers`.
_NUMBERS = 9


def peak_memory(device: torch.device) -> float:
    """Largest memory used so far, in megabytes: of the device, on a CPU of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
