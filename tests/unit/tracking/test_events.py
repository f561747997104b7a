"""events.jsonl survives kills, restarts and full disks, and never has a point twice."""

from __future__ import annotations

import json
import math
import os
import random
import threading
from pathlib import Path

import pytest

from exlm_dist.tracking import EventLog, read_events


def points(path: Path) -> list[tuple[int, str, float]]:
    return [
        (e["step"], name, value)
        for e in read_events(path)
        if e["kind"] == "metrics"
        for name, value in e["values"].items()
    ]


def test_recomputed_steps_are_not_logged_twice(tmp_path):
    path = tmp_path / "events.jsonl"
    first = EventLog(path)
    for step in (1, 2, 3):
        first.metrics(step, {"train/loss": step})
    first.close()
    again = EventLog(path)
    for step in (2, 3, 4):
        again.metrics(step, {"train/loss": -step, "train/lr": 0.5})
    assert points(path) == [
        (1, "train/loss", 1),
        (2, "train/loss", 2),
        (3, "train/loss", 3),
        (2, "train/lr", 0.5),
        (3, "train/lr", 0.5),
        (4, "train/loss", -4),
        (4, "train/lr", 0.5),
    ]
    assert again.last_step("train/loss") == 4 and again.last_step("valid/nll") is None


@pytest.mark.parametrize("torn", [b'{"time": 17, "kind": "metr', b"\0" * 50, b"\0\0\n\0\0\n", b'{"kind"'])
def test_a_torn_end_is_cut_off(tmp_path, torn, caplog):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.metrics(1, {"a": 1})
    log.close()
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    EventLog(path).close()
    assert path.read_bytes() == whole
    assert "cut off" in caplog.text


def test_every_prefix_of_the_file_can_be_continued(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    for step in range(1, 4):
        log.metrics(step, {"a": step})
    log.close()
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        log = EventLog(path)
        for step in range(1, 4):
            log.metrics(step, {"a": step})
        log.close()
        assert [value for _, _, value in points(path)] == [1, 2, 3], length
        assert next(read_events(path))["kind"] == "run", length


def test_a_damaged_line_in_the_middle_is_logged_and_skipped(tmp_path, caplog):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.metrics(1, {"a": 1})
    log.close()
    path.write_bytes(
        path.read_bytes() + b"garbage\n" + b'{"time": 5, "kind": "metrics", "step": 2, "values": {"a": 2}}\n'
    )
    assert points(path) == [(1, "a", 1), (2, "a", 2)]
    assert "line 3 is damaged" in caplog.text


def test_values_that_json_lacks(tmp_path):
    path = tmp_path / "events.jsonl"
    EventLog(path).metrics(1, {"nan": math.nan, "inf": math.inf, "minus": -math.inf})
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    values = dict((name, value) for _, name, value in points(path))
    assert math.isnan(values["nan"]) and values["inf"] == math.inf and values["minus"] == -math.inf


def test_an_evaluation_is_logged_once(tmp_path):
    path = tmp_path / "events.jsonl"
    for _ in range(2):
        log = EventLog(path)
        log.child_run("valid", 10, {"valid/nll": 1.0}, {"checkpoint.step": 10})
        log.child_run("valid", 20, {"valid/nll": 0.5}, {})
        log.close()
    assert [e["step"] for e in read_events(path) if e["kind"] == "child_run"] == [10, 20]


def test_the_uid_stays(tmp_path):
    path = tmp_path / "events.jsonl"
    EventLog(path).close()
    first = next(read_events(path))
    EventLog(path).close()
    assert [e for e in read_events(path) if e["kind"] == "run"] == [first]


def test_two_writers_do_not_mix_lines(tmp_path):
    path = tmp_path / "events.jsonl"
    logs = [EventLog(path) for _ in range(2)]

    def write(log, name):
        for step in range(300):
            log.metrics(step, {name: step, "long/" + name * 50: 0.1})

    threads = [threading.Thread(target=write, args=(log, name)) for log, name in zip(logs * 2, "abcd")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sum(e["kind"] == "metrics" for e in read_events(path)) == 1200


def test_a_full_disk_costs_points_but_not_the_run(tmp_path, monkeypatch, caplog):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.metrics(1, {"a": 1})
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:5]))
    log.metrics(2, {"a": 2})
    log.metrics(3, {"a": 3})
    monkeypatch.undo()
    log.metrics(4, {"a": 4})
    assert points(path) == [(1, "a", 1), (4, "a", 4)]
    assert caplog.text.count("cannot be written") == 1


def test_an_unknown_status_is_refused(tmp_path):
    with pytest.raises(ValueError, match="DONE"):
        EventLog(tmp_path / "events.jsonl").status("DONE")


def test_after_going_back_later_points_are_logged_again_and_only_those_stand(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    for step in (5, 10, 15):
        log.metrics(step, {"train/loss": step, "valid/nll": step})
        log.child_run("evaluation", step, {"valid/nll": step}, {})
    log.metrics(40, {"system/cpu": 1.0})
    log.close()
    log = EventLog(path)
    log.resumed(12)
    assert log.last_step("train/loss") == 10 and log.last_step("system/cpu") == 40
    log.metrics(12, {"valid/nll": -12})
    log.metrics(15, {"train/loss": -15})
    log.child_run("evaluation", 15, {"valid/nll": -15}, {})
    stand = [(5, 5), (10, 10), (15, -15)]
    assert [(step, value) for step, name, value in points(path) if name == "train/loss"] == stand
    assert [(step, value) for step, name, value in points(path) if name == "valid/nll"] == [(5, 5), (10, 10), (12, -12)]
    assert (40, "system/cpu", 1.0) in points(path)
    children = [(e["step"], e["values"]["valid/nll"]) for e in read_events(path) if e["kind"] == "child_run"]
    assert children == stand
    size = path.stat().st_size
    EventLog(path).resumed(15)  # nothing is later
    assert path.stat().st_size == size


def test_what_stands_is_what_the_last_attempt_at_each_step_has_logged(tmp_path):
    """Random histories of a run that goes back again and again, against a dictionary that forgets what is later."""
    draw = random.Random(0)
    for number in range(50):
        path = tmp_path / f"{number}.jsonl"
        log, expected, step = EventLog(path), {}, 0
        for _ in range(40):
            if draw.random() < 0.2:
                log.close()
                log = EventLog(path)
                if draw.random() < 0.1:
                    log.begin_again()
                    step, expected = 0, {}
                else:
                    step = draw.randint(0, step)
                    log.resumed(step)
                    expected = {key: value for key, value in expected.items() if key[0] <= step}
            step += draw.randint(1, 3)
            name, value = draw.choice(["train/loss", "valid/nll"]), draw.random()
            log.metrics(step, {name: value})
            expected[step, name] = value
        assert {(step, name): value for step, name, value in points(path)} == expected
        assert len(points(path)) == len(expected)


def test_a_start_as_another_run_has_another_uid(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.metrics(3, {"train/loss": 1.0})
    first = next(read_events(path))
    log.begin_again()
    log.metrics(1, {"train/loss": 2.0})
    run, *rest = read_events(path)
    assert run["kind"] == "run" and run["uid"] != first["uid"] and [event["step"] for event in rest] == [1]
    assert b"FAILED" in path.read_bytes()
