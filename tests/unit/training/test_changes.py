"""Which settings a run may change when it goes on, and that what a refusal advises works as it is printed."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from made_run import make_config, with_sources, write_initial_checkpoint

from exlm_dist.cli import build_parser
from exlm_dist.config import RunConfig, dump_config, flatten, load_config
from exlm_dist.config.pinned import CHANGEABLE, RESUMABLE, is_among
from exlm_dist.training.advice import lower_rate, same_command
from exlm_dist.training.changes import accept_changes, describe, find_changes
from exlm_dist.utils.errors import CheckpointError

#: Settings that never change. A new one has to be placed: here, in RESUMABLE or in CHANGEABLE.
NEVER = {"name", "seed", "batch.sequences", "init", "data.shuffle", "data.block", "data.window", "phases"} | {
    f"model.{name}"
    for name in ("objective", "layers", "width", "heads", "ffn", "states", "transitions", "transition_positions")
    + ("jump_prior", "jump_width", "jump_floor", "rotary", "anchors", "norm", "tie_head", "max_positions", "init_std")
}


def settings(**sections: Any) -> RunConfig:
    return make_config(Path("runs"), "run", Path("data"), **sections)


def schedule(steps: int, kind: str, **values: Any) -> RunConfig:
    return settings(schedule={"steps": steps, "kind": kind, "warmup": 2, **values})


def test_every_setting_is_in_one_of_the_three_lists():
    keys = set(flatten(settings()))
    never = {key for key in keys if not is_among(key, RESUMABLE) and not is_among(key, CHANGEABLE)}
    assert never == NEVER & keys
    assert not any(is_among(key, RESUMABLE) and is_among(key, CHANGEABLE) for key in keys)


@pytest.mark.parametrize(
    "step, old, new, free",
    [
        (10, schedule(10, "constant"), schedule(20, "constant"), True),
        (10, schedule(10, "inverse_sqrt"), schedule(20, "inverse_sqrt"), True),
        (5, schedule(10, "constant"), schedule(6, "constant"), True),
        (8, schedule(10, "constant"), schedule(20, "wsd", decay=0.5), True),  # a decay that begins later
        (8, schedule(10, "constant"), schedule(20, "inverse_sqrt"), False),
        (50, schedule(100, "wsd"), schedule(200, "wsd"), True),  # before either decay begins
        (91, schedule(100, "wsd"), schedule(200, "wsd"), True),  # the decay begins at its second step
        (92, schedule(100, "wsd"), schedule(200, "wsd"), False),
        (100, schedule(100, "wsd"), schedule(200, "wsd"), False),
        (50, schedule(100, "wsd"), schedule(52, "wsd"), False),  # whose decay would have begun
        (10, schedule(10, "linear"), schedule(20, "linear"), False),
        (10, schedule(10, "cosine"), schedule(20, "cosine"), False),
        (3, schedule(10, "linear"), schedule(20, "linear"), True),  # so far it was warm-up
        (4, schedule(10, "linear"), schedule(20, "linear"), False),
        (10, schedule(10, "constant"), schedule(10, "constant", warmup=3), False),
    ],
)
def test_a_schedule_goes_on_where_no_step_would_have_had_another_rate(step, old, new, free):
    changes = find_changes(step, old, new)
    assert changes and all(change.needs_flag is not free and not change.refused for change in changes)
    if free:
        assert accept_changes(step, old, new, allow=False) == changes
    else:
        with pytest.raises(CheckpointError, match="--allow-changes"):
            accept_changes(step, old, new, allow=False)
        assert accept_changes(step, old, new, allow=True) == changes


def test_a_run_is_not_made_shorter_than_it_is():
    with pytest.raises(CheckpointError, match="schedule.steps +20 +9 +no: 10 steps are done"):
        accept_changes(10, schedule(20, "constant"), schedule(9, "constant"), allow=True)
    assert accept_changes(10, schedule(20, "constant"), schedule(10, "constant"), allow=False)


def test_what_decides_how_the_next_steps_learn_needs_the_flag_and_is_listed():
    old = settings()
    new = settings(
        optimizer={"lr": 1e-5, "clip": 1.0}, masking={"ratio": 0.3}, loss={"reduction": "token", "max_invalid": 0.5}
    )
    with pytest.raises(CheckpointError, match="optimizer.clip +0.0 +1.0 +accepts it"):
        accept_changes(7, old, new, allow=False)
    changes = [change.as_dict(7) for change in accept_changes(7, old, new, allow=True)]
    assert [(one["key"], one["old"], one["new"], one["step"]) for one in changes] == [
        ("masking.ratio", 0.15, 0.3, 7),
        ("loss.reduction", "sequence", "token", 7),
        ("optimizer.lr", 0.0005, 1e-05, 7),
        ("optimizer.clip", 0.0, 1.0, 7),
    ]
    assert describe(changes[2:3]) == "step 7: optimizer.lr 0.0005 -> 1e-05" and describe([]) == "none"


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"seed": 5}, "samples would come twice"),
        ({"batch": {"sequences": 16, "micro": 8}}, "step x batch.sequences is the position"),
        ({"objective": "mlm"}, "what the weights are"),
        (
            {"model": settings().model.model_dump() | {"jump_prior": "group"}},
            "model.jump_prior +none +group +no: decides what the weights are",
        ),
    ],
)
def test_what_never_changes_is_refused_with_the_reason(change, reason):
    with pytest.raises(CheckpointError, match=reason) as caught:
        accept_changes(7, settings(), settings(**change), allow=True)
    assert "from step 7, recorded" not in str(caught.value)  # the flag would not do
    assert "--init runs/" in str(caught.value)


def test_no_command_is_advised_for_weights_of_another_architecture():
    with pytest.raises(CheckpointError, match="what the weights are") as caught:
        accept_changes(7, settings(), settings(model={"width": 32}), allow=True)
    assert "--init" not in str(caught.value) and "another `name`" in str(caught.value)


def test_a_folder_that_was_renamed_goes_on():
    assert accept_changes(7, settings(), settings().model_copy(update={"name": "other"}), allow=False) == []


def mixture(steps: int, weights: dict[str, Any], phases: Sequence[Any] = ()) -> RunConfig:
    """8 sequences a step of sources with these weights, or epochs."""
    amounts = {name: weight if isinstance(weight, dict) else {"weight": weight} for name, weight in weights.items()}
    sources = {name: {"path": f"data/{name}", **amount} for name, amount in amounts.items()}
    return with_sources(schedule(steps, "constant"), sources, phases)


@pytest.mark.parametrize(
    "old, new",
    [
        (mixture(30, {"a": 3, "b": 1}), mixture(30, {"a": 6, "b": 2})),
        (
            mixture(30, {"a": 3, "b": 1}),
            mixture(60, {"a": 1, "b": 1}, [{"steps": 20, "sources": {"a": 3, "b": 1}}, {}]),
        ),
        (mixture(30, {"a": 1}), mixture(30, {"a": 1, "b": 5}, [{"steps": 20, "sources": {"a": 1}}, {}])),
        (schedule(30, "constant"), mixture(30, {"x": 1, "b": 1}, [{"steps": 25, "sources": {"x": 1}}, {}])),
        (
            mixture(30, {"a": 1, "b": 1}, [{"steps": 10, "sources": {"a": {"epochs": 0.5}, "b": 1}}, {}]),
            mixture(40, {"a": 1, "b": 1}, [{"steps": 10, "sources": {"a": {"epochs": 0.5}, "b": 1}}, {}]),
        ),
    ],
)
def test_what_is_read_may_change_after_the_steps_done(old, new):
    changes = accept_changes(20, old, new, [50, 60], allow=False)
    assert changes and not any(change.needs_flag for change in changes)


@pytest.mark.parametrize(
    "old, new, key",
    [
        (mixture(30, {"a": 3, "b": 1}), mixture(30, {"a": 3, "b": 2}), "data.sources.b.weight"),
        (
            mixture(30, {"a": 1, "b": 1}),
            mixture(30, {"a": 1, "b": 1}, [{"steps": 19, "sources": {"a": 1}}, {}]),
            "phases",
        ),
        (mixture(30, {"a": {"epochs": 2}, "b": 1}), mixture(40, {"a": {"epochs": 2}, "b": 1}), "schedule.steps"),
    ],
)
def test_what_the_steps_done_have_read_stays(old, new, key):
    with pytest.raises(CheckpointError, match=f"{key} .* no: decides what the steps done have read"):
        accept_changes(20, old, new, [50, 60], allow=True)


def test_a_masking_ratio_of_phases_done_needs_the_flag():
    ratios = [{"steps": 10, "masking": {"ratio": 0.3}}, {"masking": {"ratio": 0.2}}]
    old, new = (mixture(30, {"a": 1, "b": 1}, phases) for phases in ([], ratios))
    assert accept_changes(0, old, new, [50, 60], allow=False)
    with pytest.raises(CheckpointError, match=r"phases +\[\] +\[.*\.\.\. +accepts it"):
        accept_changes(1, old, new, [50, 60], allow=False)
    (change,) = accept_changes(1, old, new, [50, 60], allow=True)
    assert change.key == "phases" and change.needs_flag


def advised(text: str, flag: str) -> list[str]:
    """Words of the one command in a message that has `flag`."""
    (line,) = [line for line in text.splitlines() if line.startswith("  exlm pretrain ") and flag in line]
    return shlex.split(line)[1:]


def test_the_commands_of_a_refusal_work_as_they_are_printed(tmp_path, monkeypatch):
    old = make_config(tmp_path / "it's runs", "run", tmp_path, schedule={"steps": 20})
    (tmp_path / "run.yaml").write_text(dump_config(old))
    given = [str(tmp_path / "run.yaml"), "--optimizer.lr=1e-3", "--schedule.steps", "40", "--budget", "a b"]
    monkeypatch.setattr(sys, "argv", ["exlm", "pretrain", *given])
    (tmp_path / "it's runs/run-2").mkdir(parents=True)
    with pytest.raises(CheckpointError) as caught:
        accept_changes(20, old, load_config(given[0], given[1:]), allow=False)
    options, overrides = build_parser().parse_known_args(advised(str(caught.value), "--allow-changes"))
    again = load_config(options.config, overrides)
    assert again == load_config(given[0], given[1:])
    assert len(accept_changes(20, old, again, allow=options.allow_changes)) == 2
    words = advised(str(caught.value), "--init")
    pairs = dict(zip(words[2::2], words[3::2]))
    assert pairs["--init"] == str(tmp_path / "it's runs/run") and pairs["--name"] == "run-3"
    assert pairs["--schedule.steps"] == "40"


def test_a_divergence_advises_a_command_from_the_checkpoint_or_from_the_start(tmp_path, monkeypatch):
    from made_run import make_data

    config = make_config(tmp_path, "run", make_data(tmp_path / "data"), optimizer={"lr": 1e-3})
    monkeypatch.setattr(sys, "argv", ["exlm", "pretrain", "run.yaml", "--optimizer.lr", "1e-3", "--allow-changes"])
    text = lower_rate(config)
    assert "Nothing is saved" in text and text.endswith("exlm pretrain run.yaml --optimizer.lr 0.0001")
    (tmp_path / "run").mkdir()
    write_initial_checkpoint(config, tmp_path / "run", 4)
    text = lower_rate(config)
    assert "step 4" in text and text.endswith("exlm pretrain run.yaml --optimizer.lr 0.0001 --allow-changes")
    far = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"lr": 1e30})})
    assert "--optimizer.lr 0.0005" in lower_rate(far)


def test_a_command_without_a_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["my_notebook.py"])
    assert same_command({"name": "x"}) == "exlm pretrain CONFIG --name x"
