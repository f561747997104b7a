"""Settings that differ from those that the checkpoint of a run was trained with: which may, and what is said where they
may not.

Three kinds of difference. Schedules that give every step done so far the same rate, and phases that let it read the
same samples: the run is what it would be if it had had the new ones from its beginning, so it goes on. Settings that
decide how the next steps learn, not what was learned (`CHANGEABLE`): with `--allow-changes`, and recorded. All others:
never, as the state that is saved, or what it counts, would mean something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exlm_dist.config import RunConfig, config_difference
from exlm_dist.config.phases import masking_of
from exlm_dist.config.pinned import CHANGEABLE, is_among
from exlm_dist.config.ratios import ratio_at
from exlm_dist.data.mixture import Mixture
from exlm_dist.training.advice import ALLOW_CHANGES, new_run_command, same_command
from exlm_dist.training.schedule import learning_rate, rates_agree
from exlm_dist.training.warm_start import ARCHITECTURE
from exlm_dist.utils.errors import CheckpointError

#: Why a setting, or those of a section, cannot change.
REASONS = {
    "init": "the initial weights are made",
    "seed": "decides order, masks and dropout: samples would come twice in an epoch, or never",
    "data.sources": "decides what the steps done have read: keep the phases as they were so far, and add one",
    "phases": "decides what the steps done have read: keep the phases as they were so far, and add one",
    "data": "decides the order: samples would come twice in an epoch, or never",
    "batch.sequences": "decides which samples a step sees: step x batch.sequences is the position in the data",
    "model.init_std": "the initial weights are made",
    "model": "decides what the weights are",
}


#: Settings that may differ in what they say of the steps to come.
MIXING = ("data.sources", "phases")


@dataclass(frozen=True)
class Change:
    """A setting that differs. `refused`: why it cannot; empty if it may, with the flag if `needs_flag`."""

    key: str
    old: Any
    new: Any
    needs_flag: bool = False
    refused: str = ""

    def as_dict(self, step: int) -> dict[str, Any]:
        """As `state.json` lists it: made after `step` steps."""
        return {"step": step, "key": self.key, "old": self.old, "new": self.new}


def find_changes(step: int, old: RunConfig, new: RunConfig, sizes: Sequence[int] = ()) -> list[Change]:
    """What differs between the settings of the `step` steps done and those of the steps to come. `sizes`: samples of
    each of `new.data.sources`, of which the first are those of `old`."""
    same_rates = rates_agree(step, old.optimizer.lr, old.schedule, new.schedule)
    same_samples, same_ratios = _read_alike(step, old, new, sizes), _masked_alike(step, old, new)
    differences, found = config_difference(old, new), []
    phases_differ = any(is_among(key, MIXING) for key, _, _ in differences)
    for key, before, after in differences:
        if key == "name":  # of a folder that was renamed
            continue
        refused, needs_flag = "", not (key.startswith("schedule.") and same_rates)
        if is_among(key, MIXING) and same_samples:
            needs_flag = key == "phases" and not same_ratios
        elif not is_among(key, CHANGEABLE):
            refused = next((why for name, why in REASONS.items() if is_among(key, (name,))), "decides what is computed")
        elif key == "schedule.steps" and after < step:
            refused = f"{step} steps are done"
        elif key == "schedule.steps" and not same_samples and not phases_differ:  # the epochs of the last phase do
            refused = REASONS["phases"]
        found.append(Change(key, before, after, needs_flag, refused))
    return found


def accept_changes(
    step: int, old: RunConfig, new: RunConfig, sizes: Sequence[int] = (), *, allow: bool
) -> list[Change]:
    """The changes with which a run goes on after `step` steps; CheckpointError, with the commands that work, for those
    that cannot be or that need `allow`. `sizes` as in `find_changes`."""
    changes = find_changes(step, old, new, sizes)
    if any(change.refused or (change.needs_flag and not allow) for change in changes):
        raise CheckpointError(_refusal(step, old, new, changes))
    return changes


def _read_alike(step: int, old: RunConfig, new: RunConfig, sizes: Sequence[int]) -> bool:
    """Whether both take as many samples of each source, in the same places, in the first `step` steps."""
    if old.batch.sequences != new.batch.sequences:  # refused for itself
        return True
    before, after = Mixture.of(old, sizes[: len(old.data.sources)]), Mixture.of(new, sizes)
    return before.begins_as(after, step * old.batch.sequences)


def _masked_alike(step: int, old: RunConfig, new: RunConfig) -> bool:
    """Whether the phases of both give the first `step` steps the same masking ratios."""
    one, other = (masking_of(config.model_copy(update={"masking": new.masking})) for config in (old, new))
    same = (ratio_at(one.ratio, one.schedule, n) == ratio_at(other.ratio, other.schedule, n) for n in range(step))
    return one == other or all(same)


def describe(changes: list[dict[str, Any]]) -> str:
    """The changes of a run, as `state.json` lists them, in a line."""
    return "; ".join(f"step {one['step']}: {one['key']} {one['old']} -> {one['new']}" for one in changes) or "none"


def _refusal(step: int, old: RunConfig, new: RunConfig, changes: list[Change]) -> str:
    run = Path(new.runs) / new.name
    lines = [f"{run} was trained to step {step} with other settings:", _table(changes)]
    if any(change.key.startswith("schedule.") and change.needs_flag and not change.refused for change in changes):
        lines.append(_why_not_the_same_curve(step, old, new))
    if not any(change.refused for change in changes):
        lines += [f"To go on with these settings from step {step}, recorded in the run:"]
        lines += [f"  {same_command(allow_changes=True)}"]
    if not any(change.key.removeprefix("model.") in ARCHITECTURE for change in changes):
        lines += ["To train a new run from its weights:", f"  {new_run_command(new)}"]
    lines += [
        "To start afresh, give the new run another `name`. To continue this one as it was, put the settings back."
    ]
    return "\n".join(lines)


def _table(changes: list[Change]) -> str:
    """Aligned lines `setting  there  here  verdict`."""
    rows = [("setting", "of the run", "given now", ALLOW_CHANGES)]
    for change in changes:
        verdict = f"no: {change.refused}" if change.refused else "accepts it" if change.needs_flag else "not needed"
        rows.append((change.key, _shortened(change.old), _shortened(change.new), verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(3)] + [0]
    return "\n".join("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _shortened(value: Any) -> str:
    """A value in at most 40 characters: phases would fill the line."""
    return text if len(text := str(value)) <= 40 else f"{text[:37]}..."


def _why_not_the_same_curve(step: int, old: RunConfig, new: RunConfig) -> str:
    """Why the schedule needs the flag: the first step whose rate would have been another."""
    peak = old.optimizer.lr
    pairs = [(learning_rate(n, peak, old.schedule), learning_rate(n, peak, new.schedule)) for n in range(step)]
    first = next(number for number, (had, other) in enumerate(pairs) if had != other)
    had, other = pairs[first]
    following = learning_rate(step, new.optimizer.lr, new.schedule)
    return (
        f"The rates of the steps done belong to {old.schedule.kind} over {old.schedule.steps} steps: step {first + 1} "
        f"had {had:.4g}, and would have had {other:.4g}. After step {step} the rate would go from "
        f"{pairs[-1][0]:.4g} to {following:.4g}."
    )
