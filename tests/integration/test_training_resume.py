"""Whatever ends a run, the same command continues it and reaches the same bits as a run that was never interrupted."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path

import pytest
from made_run import make_data
from training_runs import final_hashes, tiny, train_on

from exlm_dist.checkpoint import reader
from exlm_dist.tracking import read_events
from exlm_dist.training.sample_log import samples_of_steps
from exlm_dist.utils.errors import EXIT_DONE, EXIT_SAVED


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "prepared")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Uninterrupted runs on two ranks by (ZeRO stage, dtype), trained when first asked for."""
    runs = tmp_path_factory.mktemp("whole")
    made = {}

    def make(zero: int, dtype: str):
        if (zero, dtype) not in made:
            config = tiny(runs, f"zero{zero}-{dtype}", data, parallel={"zero": zero}, precision={"dtype": dtype})
            assert train_on(config, 2) == [EXIT_DONE] * 2
            made[zero, dtype] = config
        return made[zero, dtype]

    return make


@pytest.mark.parametrize(
    "zero, dtype", [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (1, "bf16"), (3, "bf16")]
)
def test_sigkill_then_the_same_bits(zero, dtype, data, whole, tmp_path):
    config = tiny(tmp_path, "killed", data, parallel={"zero": zero}, precision={"dtype": dtype})
    codes = train_on(config, 2, ("step", 1, 7))
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None)
    assert train_on(config, 2) == [EXIT_DONE] * 2
    assert final_hashes(config) == final_hashes(whole(zero, dtype))


@pytest.mark.parametrize(
    "rank, call, number",
    [(0, "fsync", 1), (1, "fsync", 2), (0, "write", 9), (0, "rename", 1), (0, "fsync", 9), (0, "replace", 1)],
)
def test_sigkill_inside_a_save(rank, call, number, data, whole, tmp_path):
    """The second save (step 8) dies at that system call: the first remains, or the second is already complete."""
    config = tiny(tmp_path, "killed", data)
    assert train_on(config, 2, ("step", 0, 5))[0] == -signal.SIGKILL
    assert train_on(config, 2, ("writer", rank, f"{call}:{number}:rank"))[rank] == -signal.SIGKILL
    left = reader.newest_checkpoint(tmp_path / "killed")
    assert reader.step_of(left) in (4, 8)
    assert train_on(config, 2) == [EXIT_DONE] * 2
    assert final_hashes(config) == final_hashes(whole(1, "fp32"))
    assert not list((tmp_path / "killed" / "checkpoints").glob(".t*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_saves_on_all_and_ends_with_75(number, data, whole, tmp_path):
    config = tiny(tmp_path, "stopped", data)
    assert train_on(config, 2, ("signal", 1, 6, number)) == [EXIT_SAVED] * 2
    state = reader.read_state(reader.newest_checkpoint(tmp_path / "stopped"))
    assert state["step"] == 7 and state["progress"]["sequences"] == 56
    assert train_on(config, 2) == [EXIT_DONE] * 2
    assert final_hashes(config) == final_hashes(whole(1, "fp32"))


def test_events_have_each_point_once_and_the_same_as_uninterrupted(data, whole, tmp_path):
    config = tiny(tmp_path, "killed", data)
    train_on(config, 2, ("step", 1, 7))
    train_on(config, 2)
    kept = ("train/loss", "train/nll", "train/lr", "train/grad_norm", "valid/nll", "progress/sequences")

    def points(run: Path):
        events = [event for event in read_events(run / "events.jsonl") if event["kind"] == "metrics"]
        pairs = [(event["step"], name) for event in events for name in event["values"]]
        assert max(Counter(pairs).values()) == 1
        return {
            (event["step"], name): value for event in events for name, value in event["values"].items() if name in kept
        }

    other = whole(1, "fp32")
    assert points(tmp_path / "killed") == points(Path(other.runs) / other.name)
    children = [event for event in read_events(tmp_path / "killed" / "events.jsonl") if event["kind"] == "child_run"]
    assert [(child["step"], child["tags"]["checkpoint.step"]) for child in children] == [(12, "12")]


def test_more_steps_of_a_schedule_without_end_and_going_back_with_another_rate(data, tmp_path):
    """6 steps and 6 more are 12 at once, to the bit. Then back to step 8, and from there at a lower rate."""
    schedule = {"kind": "constant", "warmup": 2}
    short, long = (tiny(tmp_path, "run", data, schedule={**schedule, "steps": steps}) for steps in (6, 12))
    at_once = tiny(tmp_path, "at_once", data, schedule={**schedule, "steps": 12})
    for config in (short, long, at_once):
        assert train_on(config, 1) == [EXIT_DONE]
    assert final_hashes(long) == final_hashes(at_once)
    run = tmp_path / "run"
    changes = [{"step": 6, "key": "schedule.steps", "old": 6, "new": 12}]
    assert reader.read_state(reader.newest_checkpoint(run))["changes"] == changes
    (run / "checkpoints/step-00000012/COMPLETE").unlink()
    lower = long.model_copy(update={"optimizer": long.optimizer.model_copy(update={"lr": 1e-3})})
    assert train_on(lower, 1, allow_changes=True) == [EXIT_DONE]
    changes.append({"step": 8, "key": "optimizer.lr", "old": 1e-2, "new": 1e-3})
    newest = reader.newest_checkpoint(run)
    assert reader.read_state(newest)["changes"] == changes and reader.read_config(newest) == lower
    assert final_hashes(lower) != final_hashes(at_once) and not list(newest.parent.glob("rejected-*"))
    events = list(read_events(run / "events.jsonl"))
    rates = {event["step"]: event["values"]["train/lr"] for event in events if "train/lr" in event.get("values", {})}
    assert rates == {3: 1e-2, 6: 1e-2, 9: 1e-3, 12: 1e-3}
    said = [event["values"]["config.changes"] for event in events if "config.changes" in event.get("values", {})]
    assert said[-1] == "step 6: schedule.steps 6 -> 12; step 8: optimizer.lr 0.01 -> 0.001"
    (child,) = [event for event in events if event["kind"] == "child_run" and event["step"] == 12]
    assert child["tags"]["checkpoint.sha256"] == reader.reference(newest)["checkpoint.sha256"]


def test_a_start_that_saved_nothing_binds_nothing(data, tmp_path):
    """Killed before its first save; the next start is another model on another number of ranks."""
    first = tiny(tmp_path, "run", data, tracking={"samples": True})
    assert train_on(first, 2, ("step", 1, 3))[1] == -signal.SIGKILL
    second = tiny(tmp_path, "run", data, seed=5, model={"width": 8}, tracking={"samples": True})
    assert train_on(second, 1) == [EXIT_DONE]
    assert reader.read_config(tmp_path / "run") == second
    assert reader.read_state(reader.newest_checkpoint(tmp_path / "run"))["changes"] == []
    assert sorted(samples_of_steps(tmp_path / "run")) == list(range(12))


def losses(config) -> list[float]:
    events = [
        event for event in read_events(Path(config.runs) / config.name / "events.jsonl") if event["kind"] == "metrics"
    ]
    return [event["values"]["train/loss"] for event in events if "train/loss" in event["values"]]


@pytest.fixture(scope="module")
def curve(data, tmp_path_factory) -> list[float]:
    """Loss of every step of an uninterrupted run on two ranks."""
    config = tiny(tmp_path_factory.mktemp("curve"), "whole", data, tracking={"every": 1})
    assert train_on(config, 2) == [EXIT_DONE] * 2
    return losses(config)


@pytest.mark.parametrize("before, after", [((2, 1), (1, 3)), ((1, 3), (4, 2)), ((2, 0), (1, 1))])
def test_world_size_and_zero_stage_may_change(before, after, data, curve, tmp_path):
    """(ranks, stage) before and after a stop at step 7: the same curve as without the change, up to rounding."""
    config = tiny(tmp_path, "changed", data, parallel={"zero": before[1]}, tracking={"every": 1})
    assert train_on(config, before[0], ("signal", 0, 6, signal.SIGTERM)) == [EXIT_SAVED] * before[0]
    config = tiny(tmp_path, "changed", data, parallel={"zero": after[1]}, tracking={"every": 1})
    assert train_on(config, after[0]) == [EXIT_DONE] * after[0]
    assert len(curve) == 12 and losses(config) == pytest.approx(curve, rel=1e-5)
