"""A tracking server that is down, frozen, killed or mute never delays training, and gets everything later."""

from __future__ import annotations

import os
import signal
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tracking_server import free_port, mlflow_server

from exlm_dist.tracking import EventLog, Tracker, sync


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
    assert "training continues" in caplog.text and "hunter2" not in caplog.text + str(report)
    assert not sync(folder, timeout=2)
