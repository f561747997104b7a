"""One training is one MLflow run, whatever happens: restarts, lost files, deleted runs, a rejected value."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from exlm_dist.tracking import EventLog, Tracker, read_events, redact, shipping, sync, tracking_uri
from exlm_dist.tracking.store import LONGEST_PARAM, cut
from exlm_dist.tracking.system import SystemSampler, system_metrics
from exlm_dist.utils.errors import CheckpointError, ConfigError

POINTS = "select key, step, value from metrics order by key, step"


def session(folder, config, steps, status="FINISHED", **options):
    """One start of a training that logs `steps`."""
    log = EventLog(folder / "events.jsonl")
    tracker = Tracker.start(folder, config, log, **options)
    for step in steps:
        log.metrics(step, {"train/loss": 1 / step})
    report = tracker.close(status)
    log.close()
    return report


def test_a_restart_continues_the_same_run(make_run, query):
    folder, config = make_run()
    first = session(folder, config, [1, 2, 3], "KILLED")
    assert first and query("select status from runs") == [("KILLED",)]
    _, config = make_run(batch={"micro": 16})
    second = session(folder, config, [2, 3, 4])
    assert second and second.run_id == first.run_id
    assert query(POINTS) == [("train/loss", step, 1 / step) for step in (1, 2, 3, 4)]
    assert query("select name, status from runs") == [("tiny", "FINISHED")]
    assert query("select value from params where key = 'batch.micro'") == [("32",)]
    assert query("select value from tags where key = 'resumed.batch.micro'") == [("16",)]
    assert query("select count(*) from tags where key like 'resumed.%'") == [(1,)]


def test_going_back_shows_the_newer_values_and_starting_anew_is_another_run(make_run, query):
    """Sent as it happens, and once more from the beginning, to the same end."""
    folder, config = make_run()
    log = EventLog(folder / "events.jsonl")
    for step in (10, 20):
        log.child_run("evaluation", step, {"valid/nll": 1.0}, {"checkpoint.sha256": "old"})
    first = session(folder, config, [1, 2], "KILLED")
    log = EventLog(folder / "events.jsonl")
    log.resumed(1)
    log.metrics(2, {"train/loss": 7.0})
    log.child_run("evaluation", 10, {"valid/nll": 2.0}, {"checkpoint.sha256": "new"})
    names = "select name, status from runs order by name"
    shown = [
        ("tiny", "KILLED"),
        ("tiny evaluation @10", "FINISHED"),
        ("tiny evaluation @20 (weights given up)", "FINISHED"),
    ]
    for _ in range(2):
        assert sync(folder).run_id == first.run_id
        assert query(names) == shown
        assert query("select key, step, value from latest_metrics where key = 'train/loss'") == [("train/loss", 2, 7.0)]
        values = "select key, value from latest_metrics join runs using (run_uuid) where name like '%@10'"
        assert query(values) == [("valid/nll", 2.0)]
        assert query("select value from tags where key = 'checkpoint.sha256' and value = 'new'") == [("new",)]
        assert "given up" in query("select value from tags where key = 'resumed_after_step_1'")[0][0]
        (folder / "tracking.json").unlink()
    log.begin_again()
    _, config = make_run(optimizer={"lr": 1e-5})
    second = session(folder, config, [1])
    assert second and second.run_id != first.run_id
    (folder / "tracking.json").unlink()
    assert sync(folder).run_id == second.run_id
    parents = "select run_uuid, status from runs where name = 'tiny' order by start_time"
    assert query(parents) == [(first.run_id, "FAILED"), (second.run_id, "FINISHED")]
    rates = dict(query("select run_uuid, value from params where key = 'optimizer.lr'"))
    assert rates == {first.run_id: "0.0005", second.run_id: "1e-05"}
    assert query(f"select key, step, value from metrics where run_uuid = '{second.run_id}'") == [("train/loss", 1, 1.0)]


def test_a_lost_position_is_found_again_without_duplicates(make_run, query):
    folder, config = make_run()
    first = session(folder, config, [1, 2])
    (folder / "tracking.json").unlink()
    log = EventLog(folder / "events.jsonl")
    log.child_run("valid", 2, {"valid/nll": 0.5}, {"checkpoint.step": 2})
    assert sync(folder).run_id == first.run_id
    (folder / "tracking.json").unlink()
    assert sync(folder)
    assert query(POINTS) == [("train/loss", 1, 1.0), ("train/loss", 2, 0.5), ("valid/nll", 2, 0.5)]
    assert query("select count(*) from runs") == [(2,)]


def size(path) -> int:
    """Bytes of a file that may come and go."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def test_a_kill_while_the_database_is_created_leaves_one_that_works(make_run, query, tmp_path):
    folder, config = make_run()
    log = EventLog(folder / "events.jsonl")
    log.metrics(1, {"train/loss": 1.0})
    code = f"from pathlib import Path; from exlm_dist.tracking import sync; sync(Path({str(folder)!r}))"
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    # Some of the tables exist, others do not.
    while max(size(tmp_path / "runs" / name) for name in ("mlflow.db", "mlflow.db.new")) < 220_000:
        assert process.poll() is None and time.monotonic() < deadline, "the database was not seen half-created"
        time.sleep(0.01)
    process.kill()
    process.wait(timeout=10)
    assert sync(folder, timeout=60)
    assert query(POINTS) == [("train/loss", 1, 1.0)]


def test_each_evaluation_is_a_child_run(make_run, query):
    folder, config = make_run()
    log = EventLog(folder / "events.jsonl")
    log.child_run("valid", 10, {"valid/nll": 1.5}, {"checkpoint.step": 10, "checkpoint.sha256": "ab" * 32})
    report = session(folder, config, [1])
    children = query("select run_uuid, name, status from runs where name != 'tiny'")
    assert [child[1:] for child in children] == [("tiny valid @10", "FINISHED")]
    tags = dict(query(f"select key, value from tags where run_uuid = '{children[0][0]}'"))
    assert tags["mlflow.parentRunId"] == report.run_id
    assert tags["checkpoint.step"] == "10" and tags["checkpoint.sha256"] == "ab" * 32


def test_a_new_store_gets_everything(make_run, query, tmp_path):
    folder, config = make_run()
    session(folder, config, [1, 2])
    (tmp_path / "runs" / "mlflow.db").unlink()
    command = f"from exlm_dist.tracking import sync; from pathlib import Path; assert sync(Path({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", command], check=True, timeout=60)
    assert query(POINTS) == [("train/loss", 1, 1.0), ("train/loss", 2, 0.5)]


def test_a_deleted_run_is_reported_and_nothing_is_lost(make_run, query, tmp_path, capsys):
    folder, config = make_run()
    run_id = session(folder, config, [1]).run_id
    import mlflow

    mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/runs/mlflow.db").delete_run(run_id)
    EventLog(folder / "events.jsonl").metrics(2, {"train/loss": 0.5})
    report = sync(folder, timeout=20)
    assert not report and report.remaining == 1
    assert "mlflow runs restore" in str(report) and f"exlm sync {folder}" in capsys.readouterr().out


def test_what_mlflow_rejects_does_not_delay_the_rest(make_run, query, caplog):
    folder, config = make_run()
    log = EventLog(folder / "events.jsonl")
    log.metrics(1, {"bad?name*": 1.0})
    log.metrics(1, {"good": 1.0})
    log.artifact(folder / "plots" / "gone.png")
    assert session(folder, config, [1])
    assert query(POINTS) == [("good", 1, 1.0), ("train/loss", 1, 1.0)]
    assert "rejects" in caplog.text and "gone" in caplog.text


def test_artifacts_and_long_values(make_run, query, tmp_path):
    folder, config = make_run(budget="x" * 700)
    (folder / "plot.png").write_bytes(b"\x89PNG")
    log = EventLog(folder / "events.jsonl")
    log.artifact(folder / "plot.png", "plots")
    report = session(folder, config, [1])
    stored = tmp_path / "runs" / "mlartifacts" / report.run_id / "artifacts"
    assert (stored / "config.yaml").is_file() and (stored / "plots" / "plot.png").read_bytes() == b"\x89PNG"
    ((value,),) = query("select value from params where key = 'budget'")
    assert len(value) == LONGEST_PARAM and value.endswith("…")
    assert cut("short", 5) == "short"


@pytest.mark.filterwarnings("ignore:Query string")
def test_no_password_leaves_the_machine_or_reaches_a_log(make_run, tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setenv("PLANTED_SECRET", "hunter2-env")
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db?password=hunter2-query"
    folder, config = make_run(uri=uri)
    config_text = (folder / "config.yaml").read_text()
    assert "hunter2" in config_text
    session(folder, config, [1])
    sync(folder, timeout=1)
    for path in (tmp_path / "runs").rglob("*"):
        if path.is_file() and path != folder / "config.yaml":
            assert b"hunter2" not in path.read_bytes(), path
    assert "hunter2" not in caplog.text + "".join(capsys.readouterr())


@pytest.mark.parametrize(
    "text, clean",
    [
        ("http://me:pw@host:5000/x", "http://***@host:5000/x"),
        ("failed: https://token@host/api?token=abc&x=1", "failed: https://***@host/api?token=***&x=1"),
        ("postgresql+psycopg2://u:p%40@db/mlflow", "postgresql+psycopg2://***@db/mlflow"),
        ("sqlite:////runs/mlflow.db", "sqlite:////runs/mlflow.db"),
    ],
)
def test_redact(text, clean):
    assert redact(text) == clean


def test_uri(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri("", tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:1")
    assert tracking_uri("", tmp_path) == "http://host:1"
    for wrong in ("file:///tmp/mlruns", "mlruns", "./mlruns"):
        with pytest.raises(ConfigError, match="sqlite:///"):
            tracking_uri(wrong, tmp_path)


def test_an_address_below_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tracking_uri("sqlite:///~/x/mlflow.db", tmp_path) == f"sqlite:///{tmp_path}/x/mlflow.db"


@pytest.mark.parametrize("hindrance", ["address", "package"])
def test_whatever_hinders_mlflow_training_goes_on(make_run, monkeypatch, caplog, hindrance):
    folder, config = make_run(uri="./mlruns" if hindrance == "address" else "")
    if hindrance == "package":

        def broken():
            raise TypeError("Descriptors cannot be created directly")

        monkeypatch.setattr(shipping, "import_mlflow", broken)
    log = EventLog(folder / "events.jsonl")
    with caplog.at_level("WARNING", logger="exlm_dist"):
        tracker = Tracker.start(folder, config, log)
    log.metrics(1, {"train/loss": 2.0})
    assert tracker.close("FINISHED") is None
    log.close()
    said = "not in plain files" if hindrance == "address" else "Descriptors cannot be created"
    assert said in caplog.text and f"exlm sync {folder}" in caplog.text
    assert any(event["kind"] == "metrics" for event in read_events(folder / "events.jsonl"))


def test_two_runs_at_once_in_a_new_database(make_run, query, tmp_path):
    """Both create the tables and the experiment at the same moment."""
    script = (
        "import sys; from pathlib import Path\n"
        "from exlm_dist.config import load_config; from exlm_dist.tracking import *\n"
        "folder = Path(sys.argv[1]); log = EventLog(folder / 'events.jsonl')\n"
        "tracker = Tracker.start(folder, load_config(folder / 'config.yaml'), log)\n"
        "for step in range(1, 21): log.metrics(step, {'train/loss': step})\n"
        "sys.exit(0 if tracker.close('FINISHED', timeout=60) else 1)"
    )
    processes = [subprocess.Popen([sys.executable, "-c", script, str(make_run(name)[0])]) for name in ("one", "two")]
    assert [process.wait(timeout=90) for process in processes] == [0, 0]
    assert query("select name, count(*) from runs join metrics using (run_uuid) group by run_uuid order by name") == [
        ("one", 20),
        ("two", 20),
    ]
    assert query("select count(*) from experiments where name = 'exlm'") == [(1,)]


def test_tracking_off(make_run, tmp_path):
    folder, config = make_run(tracking={"mlflow": False})
    assert session(folder, config, [1]) is None
    assert not (tmp_path / "runs" / "mlflow.db").exists()
    assert sync(folder)
    assert json.loads((folder / "tracking.json").read_text())["run_id"]


def test_sync_of_something_else(tmp_path):
    with pytest.raises(CheckpointError, match="no run folder"):
        sync(tmp_path)


def test_system_metrics(tmp_path):
    values = system_metrics(tmp_path)
    assert {"system/cpu_utilization_percentage", "system/process_memory_megabytes"} <= set(values)
    log = EventLog(tmp_path / "events.jsonl")
    for _ in range(2):
        before = log.last_step("system/cpu_utilization_percentage") or 0
        sampler = SystemSampler(log, interval=0.01)
        while (log.last_step("system/cpu_utilization_percentage") or 0) < before + 2:
            time.sleep(0.005)
        sampler.close()
