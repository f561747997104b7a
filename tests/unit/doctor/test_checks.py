"""`exlm doctor` on a machine where everything works, and where each thing in turn does not."""

from __future__ import annotations

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from locations import ROOT
from made_run import make_config, make_data

from exlm_dist.cli import main
from exlm_dist.config import dump_config
from exlm_dist.doctor import machine_checks, rank_checks
from exlm_dist.doctor.findings import FAIL, PASS, WARN, Finding
from exlm_dist.utils.errors import EXIT_DATA


@pytest.fixture
def config(tmp_path):
    return make_config(tmp_path / "runs", "run", make_data(tmp_path / "data"))


def test_everything_passes_with_real_ranks(config, tmp_path, capfd):
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(config))
    assert main(["doctor", str(file), "--launch.processes", "2", "--launch.device", "cpu"]) == 0
    text = capfd.readouterr().out
    for check in ("python", "packages", "shards", "free space", "disk", "port", "devices", "all-reduce", "clocks"):
        assert check in text
    assert "2 ranks on 1 nodes" in text and "0 fail" in text
    assert not list((tmp_path / "runs").iterdir())


def test_a_failed_check_fails_the_command(config, tmp_path, capsys, monkeypatch):
    (tmp_path / "data" / "manifest.json").unlink()
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(config))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert main(["doctor", str(file), "--nodes"]) == 1
    text = capsys.readouterr().out
    assert "has no manifest.json" in text and "-> Prepare" in text and "inside salloc" in text


def test_a_manifest_that_was_cut_short_is_said_by_every_command(config, tmp_path, capsys, monkeypatch):
    manifest = tmp_path / "data" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:200])
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(config))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert main(["doctor", str(file), "--nodes"]) == 1
    assert f"shards      FAIL  {manifest}: not readable as JSON" in capsys.readouterr().out
    for command in (["config", "check", str(file)], ["plan", str(file), "--gpus", "8"]):
        assert main(command) == EXIT_DATA
        assert f"error: {manifest}: not readable as JSON" in capsys.readouterr().err


def test_shards_that_are_damaged_or_missing(config, tmp_path):
    assert machine_checks.check_shards(config)[0].status == PASS
    shard = next((tmp_path / "data").glob("train/*.tar"))
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    assert "is damaged" in machine_checks.check_shards(config)[0].text
    shard.unlink()
    finding = machine_checks.check_shards(config)[0]
    assert finding.status == FAIL and "is missing" in finding.text


def test_space_for_all_checkpoints_that_are_kept(config):
    assert machine_checks.check_space(config, 10**6).status == PASS
    finding = machine_checks.check_space(config, 10**15)
    assert finding.status == FAIL and "4 checkpoints" in finding.text and "checkpoint.keep" in finding.remedy


def test_disk_that_is_not_writable(config, monkeypatch):
    assert machine_checks.check_disk(config, 10**6).status in (PASS, WARN)
    monkeypatch.setattr(machine_checks, "nearest_folder", lambda path: Path("/proc"))
    assert machine_checks.check_disk(config, 10**6).status == FAIL


def tracked(config, uri: str) -> Finding:
    on = config.model_copy(update={"tracking": config.tracking.model_copy(update={"mlflow": True})})
    return machine_checks.check_tracking(on, uri, uri)


def test_tracking_server_up_and_down(config, tmp_path):
    class Healthy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Healthy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    uri = f"http://127.0.0.1:{server.server_port}"
    assert "answers" in tracked(config, uri).text
    server.shutdown()
    server.server_close()
    finding = tracked(config, uri)
    assert finding.status == WARN and "does not answer" in finding.text and "exlm sync" in finding.remedy
    assert tracked(config, f"sqlite:///{tmp_path}/mlflow.db").status == PASS


def test_a_port_in_use(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        assert machine_checks.check_port().status == FAIL
    assert machine_checks.check_port().status == PASS


def test_time_limit_before_the_next_checkpoint(config, tmp_path):
    assert "not known" in machine_checks.check_time_limit(config).text
    (tmp_path / "runs/run").mkdir(parents=True)
    event = {"kind": "metrics", "step": 10, "values": {"perf/step_seconds": 2.0}}
    (tmp_path / "runs/run/events.jsonl").write_text(json.dumps(event) + "\n")
    assert machine_checks.check_time_limit(config).status == PASS
    limited = config.model_copy(update={"launch": config.launch.model_copy(update={"time_limit": 30.0})})
    finding = machine_checks.check_time_limit(limited)
    assert finding.status == WARN and "1000 steps of 2.00 s are 33.3 minutes" in finding.text


RANK = {
    "host": "a",
    "device": "GPU",
    "backend": "nccl",
    "versions": {"torch": "2"},
    "computes": True,
    "reduced_bytes": 10**8,
    "reduce_seconds": 0.001,
    "reduced_well": True,
    "unseen": [],
    "clock": 0.0,
}


@pytest.mark.parametrize(
    "change, check, status, words",
    [
        ({}, "devices", PASS, "2 ranks on 2 nodes"),
        ({"computes": False}, "devices", FAIL, "rank 1 on b"),
        ({"device": "other"}, "devices", WARN, "GPU, other"),
        ({"versions": {"torch": "3"}}, "same versions", FAIL, "b: "),
        ({"reduced_well": False}, "all-reduce", FAIL, "wrong"),
        ({"reduce_seconds": 1.0}, "all-reduce", WARN, "0.10 GB/s"),
        ({"unseen": [0]}, "shared files", FAIL, "b does not see the file of rank 0"),
        ({"clock": -3.0}, "clocks", WARN, "3.000 s"),
        ({"clock": 60.0}, "clocks", FAIL, "60.000 s"),
    ],
)
def test_what_ranks_report_is_judged(change, check, status, words):
    ranks = [{**RANK, "rank": 0}, {**RANK, "rank": 1, "host": "b", **change}]
    findings = {finding.check: finding for finding in rank_checks.judge(ranks)}
    assert findings[check].status == status and words in findings[check].text
    assert bool(findings[check].remedy) == (status != PASS)


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a GPU")
def test_ranks_that_cannot_start(config, tmp_path, capfd):
    launch = config.launch.model_copy(update={"device": "cuda"})
    (finding,) = rank_checks.check_ranks(launch, tmp_path / "runs", processes=2)
    assert finding.status == FAIL and "the ranks ended with code 2" in finding.text
    assert "torch sees no CUDA device" in capfd.readouterr().err


def test_it_imports_no_torch():
    code = "import sys, exlm_dist.doctor.examination; sys.exit('torch' in sys.modules or 'mlflow' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60).returncode == 0


def test_the_end_of_the_job(monkeypatch, tmp_path):
    from exlm_dist.launch import deadline

    now = time.time()
    assert deadline.end_of_job(0.0, {}) is None
    assert deadline.end_of_job(2.0, {}) == pytest.approx(now + 120, abs=5)
    assert deadline.end_of_job(0.0, {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1999"}) == 1999
    assert deadline.end_of_job(1.0, {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1999"}) == 1999
    local = time.mktime((2026, 11, 24, 7, 0, 0, 0, 0, -1))
    for answer in ("2026-11-24T07:00:00\n", "JobId=7 StartTime=2026-11-23T07:00:00 EndTime=2026-11-24T07:00:00 X=1"):
        assert deadline._parse(answer) == local
    assert deadline._parse("N/A\n") is None and deadline._parse("JobId=7 EndTime=Unknown") is None
