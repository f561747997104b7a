"""The process that writes checkpoints: outcome, death, signals, limit, and that nothing of it stays behind."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from exlm_dist.checkpoint.messages import (
    Failed,
    Failure,
    Published,
    PublishJob,
    WriteJob,
    Written,
    job_from_json,
    outcome_from_json,
    to_json,
)
from exlm_dist.checkpoint.rank_files import SmallFiles, TensorFile
from exlm_dist.checkpoint.writer import SIGNALS, InlineWriter, Memory, ProcessWriter

CRASH_POINTS = Path(__file__).resolve().parents[2] / "crash_points"


def job(folder: Path, **texts: str) -> WriteJob:
    file = TensorFile("model-00000.safetensors", {"a": (2, 8)}, 0, 64)
    return WriteJob(str(folder), 7, [file], SmallFiles({"state.json": "{}", **texts}), [])


@pytest.fixture
def memory():
    memory = Memory(64)
    memory.bytes[:64] = np.arange(16, dtype=np.float32).tobytes()
    yield memory
    memory.close()


@pytest.fixture
def writer(memory):
    writer = ProcessWriter(memory, timeout=20)
    yield writer
    writer.close()


def outcome_of(writer, seconds: float = 30.0) -> Written | Published | Failed:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (outcome := writer.poll()) is not None:
            return outcome
        time.sleep(0.01)
    raise AssertionError("no outcome")


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether the process ends in time. (One that nobody waits for stays in the table as a zombie.)"""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def test_messages_arrive_as_they_were_sent(tmp_path):
    files = {"index.json": {"bytes": 3, "sha256": "0a"}}
    write = dataclasses.replace(job(tmp_path), small=SmallFiles({"a": "ä"}, {"b": "/c"}), sync=["/log"])
    for message in (write, PublishJob("/t", "/s", 4, files, 2, True)):
        assert job_from_json(to_json(message)) == message
    failed = Failed(Failure.VALUES, "it is not finite")
    for outcome in (Written(files), Published(["step-1"], "not removed"), Published([]), failed):
        assert outcome_from_json(to_json(outcome)) == outcome


def test_it_is_started_without_torch():
    code = "import sys, exlm_dist.checkpoint.writer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_it_writes_what_is_in_memory_when_the_job_is_given(memory, writer, tmp_path):
    inline = InlineWriter(memory)
    for number in range(2):
        memory.bytes[0] = number  # of the mantissa of the first
        outcomes = []
        for each in (writer, inline):
            folder = tmp_path / f"{number}{type(each).__name__}"
            folder.mkdir()
            each.submit(job(folder))
            outcomes.append(outcome_of(each))
            assert (folder / "model-00000.safetensors").read_bytes()[-64:] == memory.bytes[:64]
        assert outcomes[0] == outcomes[1] and set(outcomes[0].files) == {"model-00000.safetensors", "state.json"}


def test_a_job_begins_when_its_elements_are_there(memory, writer, tmp_path):
    release = threading.Event()

    def fill():
        assert release.wait(30)
        memory.bytes[:64] = bytes(range(64))

    writer.submit(job(tmp_path), fill)
    time.sleep(0.2)
    assert not (tmp_path / "model-00000.safetensors").exists()
    release.set()
    assert isinstance(outcome_of(writer), Written)
    assert (tmp_path / "model-00000.safetensors").read_bytes()[-64:] == bytes(range(64))


def test_elements_that_cannot_be_copied_are_an_error_of_the_rank(writer, tmp_path):
    def fill():
        raise RuntimeError("no such tensor")

    writer.submit(job(tmp_path), fill)
    with pytest.raises(RuntimeError, match="no such tensor"):
        outcome_of(writer)
    assert not (tmp_path / "model-00000.safetensors").exists()


@pytest.mark.gpu
def test_elements_of_a_gpu_go_to_pinned_memory_by_a_stream_of_their_own():
    import torch

    from exlm_dist.training import saver as saving
    from exlm_dist.training.engine import state as checkpoint

    memory = Memory(1 << 20)
    elements = torch.frombuffer(memory.bytes, dtype=torch.float32)
    saving._pin(elements)
    assert elements.is_pinned()
    stream, sources = torch.cuda.Stream(), [torch.randn(1 << 17, device="cuda") for _ in range(2)]
    stream.wait_stream(torch.cuda.current_stream())
    checkpoint.copy_out(sources, elements, stream)
    assert torch.equal(elements, torch.cat(sources).cpu())
    assert int(torch.cuda.cudart().cudaHostUnregister(elements.data_ptr())) == 0
    memory.close()


def test_a_failure_is_reported_and_the_next_job_is_done(writer, tmp_path):
    writer.submit(job(tmp_path / "nowhere"))
    failed = outcome_of(writer)
    assert failed.kind is Failure.DISK and "file system that all machines of the job can see" in failed.why
    writer.submit(job(tmp_path))
    assert isinstance(outcome_of(writer), Written)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_parameters_that_are_not_finite_are_not_written(value, memory, writer, tmp_path):
    elements = np.frombuffer(memory.bytes, np.float32)
    elements[:15] = 3e38  # a sum that overflows is no sign by itself
    writer.submit(job(tmp_path / "nowhere"))
    assert outcome_of(writer).kind is Failure.DISK
    elements[7] = value
    writer.submit(job(tmp_path))
    failed = outcome_of(writer)
    assert failed.kind is Failure.VALUES and "parameter a is not finite after step 7" in failed.why
    assert not (tmp_path / "model-00000.safetensors").exists()


def test_signals_that_ask_a_run_to_save_do_not_reach_it(writer, tmp_path):
    for number in SIGNALS:
        os.kill(writer.pid, number)
    writer.submit(job(tmp_path))
    assert isinstance(outcome_of(writer), Written)


def test_a_death_is_reported_and_another_process_takes_the_next_job(writer, tmp_path):
    pid = writer.pid
    os.kill(pid, signal.SIGKILL)
    writer.submit(job(tmp_path))
    outcome = outcome_of(writer)
    if isinstance(outcome, Failed):  # it was not dead yet when the job was given
        assert outcome.kind is Failure.LOST and "exit code -9" in outcome.why
        writer.submit(job(tmp_path))
        outcome = outcome_of(writer)
    assert isinstance(outcome, Written) and writer.pid != pid


def test_a_hanging_process_is_ended_at_the_limit(memory, tmp_path):
    writer = ProcessWriter(memory, timeout=1)
    pid = writer.pid
    os.kill(pid, signal.SIGSTOP)
    writer.submit(job(tmp_path, long="x" * 1_000_000))  # more than a pipe takes at once
    failed = outcome_of(writer)
    assert failed.kind is Failure.LOST
    assert "did not finish within checkpoint.timeout, 1 s" in failed.why
    assert gone(pid)
    writer.close()


OWNER = """
import sys, time
from exlm_dist.checkpoint.messages import job_from_json
from exlm_dist.checkpoint.writer import Memory, ProcessWriter
writer = ProcessWriter(Memory(1 << 20), timeout=60)
writer.submit(job_from_json(sys.argv[1]))
print(writer.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_it_ends_with_its_rank_whatever_ends_that(number, tmp_path):
    """In the middle of a job that would never end."""
    (tmp_path / "point").write_text("fsync:1:hang")
    environment = {
        **os.environ,
        "EXLM_CRASH_POINT": str(tmp_path / "point"),
        "PYTHONPATH": os.pathsep.join([str(CRASH_POINTS), *sys.path]),
    }
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, to_json(job(tmp_path))], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        pid = int(owner.stdout.readline())
        end = time.monotonic() + 30
        while not (tmp_path / "model-00000.safetensors").exists() and time.monotonic() < end:
            time.sleep(0.02)
        assert (tmp_path / "model-00000.safetensors").exists() and not gone(pid, 0.1)
        owner.send_signal(number)
        assert owner.wait(timeout=20) == -number
        assert gone(pid)
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()
