"""A tracking server that is down, frozen, killed or mute never holds up the training, and gets everything later."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from exlm_dist.tracking import EventLog, Tracker, sync


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def mlflow_server(folder, port):
    """`mlflow server` over SQLite in its own process group; killed whole at the end."""
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "mlartifacts"),
    ]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(folder / "server.log", "ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, start_new_session=True, cwd=folder, env=environment
        )
    try:
        _wait_for(port, process)
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=10)


def _wait_for(port, process, limit=60):
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"mlflow server did not listen on port {port} within {limit} s")


@pytest.fixture
def short_waits(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.mark.timeout(180)
def test_a_server_that_freezes_dies_and_comes_back(make_run, query, tmp_path, short_waits):
    port = free_port()
    folder, config = make_run(uri=f"http://127.0.0.1:{port}")
    (tmp_path / "runs").mkdir(exist_ok=True)
    log = EventLog(folder / "events.jsonl")

    def train(steps):
        for step in steps:
            log.metrics(step, {"train/loss": 1 / step})

    with mlflow_server(tmp_path / "runs", port) as server:
        tracker = Tracker.start(folder, config, log)
        train(range(1, 11))
        assert tracker.close("KILLED", timeout=60)
        os.killpg(server.pid, signal.SIGSTOP)
        tracker = Tracker.start(folder, config, log)
        train(range(11, 21))
        report = tracker.close("KILLED", timeout=3)
        assert not report and report.remaining >= 10 and "exlm sync" in str(report)
        os.killpg(server.pid, signal.SIGCONT)
    tracker = Tracker.start(folder, config, log)  # nothing listens now
    train(range(21, 31))
    assert not tracker.close("FINISHED", timeout=3)
    with mlflow_server(tmp_path / "runs", port):
        assert sync(folder, timeout=60)
    assert query("select step, value from metrics order by step") == [(step, 1 / step) for step in range(1, 31)]
    assert query("select name, status from runs") == [("tiny", "FINISHED")]
    assert (tmp_path / "runs" / "mlartifacts").is_dir()


class Broken(BaseHTTPRequestHandler):
    """Answers 500 to everything."""

    def do_GET(self):
        self.send_error(500)

    do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture(params=["mute", "broken"])
def bad_server(request):
    """Port of a server that accepts and never answers, or answers 500."""
    if request.param == "mute":
        with socket.create_server(("127.0.0.1", 0)) as server:
            yield server.getsockname()[1]
        return
    with ThreadingHTTPServer(("127.0.0.1", 0), Broken) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join(timeout=10)


def test_a_bad_server_costs_the_training_nothing(make_run, bad_server, short_waits, caplog):
    folder, config = make_run(uri=f"http://me:hunter2@127.0.0.1:{bad_server}")
    log = EventLog(folder / "events.jsonl")
    tracker = Tracker.start(folder, config, log)
    for step in range(1, 501):
        log.metrics(step, {"train/loss": 1 / step})
    written = sum(b'"metrics"' in line for line in log.path.read_bytes().splitlines())
    report = tracker.close("FINISHED", timeout=2)
    assert written == 500
    assert not report and report.remaining >= 500 and report.error
    assert "training goes on" in caplog.text and "hunter2" not in caplog.text + str(report)
    assert not sync(folder, timeout=2)
