"""The process that writes checkpoints: outcome, death, signals, limit, and that nothing of it stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from exlm_dist.checkpoint import writer as checkpoint_writer
from exlm_dist.checkpoint.writer import InlineWriter, Memory, ProcessWriter

CRASH_POINTS = Path(__file__).resolve().parents[2] / "crash_points"


def job(folder: Path, name: str = "model-00000.safetensors") -> dict:
    file = {"name": name, "tensors": {"a": [2, 8]}, "offset": 0, "bytes": 64}
    small = {"texts": {"state.json": "{}"}, "copies": {}, "sync": []}
    return {"kind": "write", "folder": str(folder), "step": 7, "tensors": [file], **small}


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


def reply_of(writer, seconds: float = 30.0) -> dict:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (reply := writer.poll()) is not None:
            return reply
        time.sleep(0.01)
    raise AssertionError("no reply")


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


def test_it_is_started_without_torch():
    code = "import sys, exlm_dist.checkpoint.writer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_it_writes_what_is_in_memory_when_the_job_is_given(memory, writer, tmp_path):
    inline = InlineWriter(memory)
    for number in range(2):
        memory.bytes[0] = number  # of the mantissa of the first
        replies = []
        for each in (writer, inline):
            folder = tmp_path / f"{number}{type(each).__name__}"
            folder.mkdir()
            each.submit(job(folder))
            replies.append(reply_of(each))
            assert (folder / "model-00000.safetensors").read_bytes()[-64:] == memory.bytes[:64]
        assert replies[0] == replies[1] and set(replies[0]["files"]) == {"model-00000.safetensors", "state.json"}


def test_a_job_begins_when_its_numbers_are_there(memory, writer, tmp_path):
    release = threading.Event()

    def fill():
        assert release.wait(30)
        memory.bytes[:64] = bytes(range(64))

    writer.submit(job(tmp_path), fill)
    time.sleep(0.2)
    assert not (tmp_path / "model-00000.safetensors").exists()
    release.set()
    assert "files" in reply_of(writer)
    assert (tmp_path / "model-00000.safetensors").read_bytes()[-64:] == bytes(range(64))


def test_numbers_that_cannot_be_copied_are_an_error_of_the_rank(writer, tmp_path):
    def fill():
        raise RuntimeError("no such number")

    writer.submit(job(tmp_path), fill)
    with pytest.raises(RuntimeError, match="no such number"):
        reply_of(writer)
    assert not (tmp_path / "model-00000.safetensors").exists()


@pytest.mark.gpu
def test_numbers_of_a_gpu_go_to_pinned_memory_by_a_stream_of_their_own():
    import torch

    from exlm_dist.training import saver as saving
    from exlm_dist.training.engine import state as checkpoint

    memory = Memory(1 << 20)
    numbers = torch.frombuffer(memory.bytes, dtype=torch.float32)
    saving._pin(numbers)
    assert numbers.is_pinned()
    stream, sources = torch.cuda.Stream(), [torch.randn(1 << 17, device="cuda") for _ in range(2)]
    stream.wait_stream(torch.cuda.current_stream())
    checkpoint.copy_out(sources, numbers, stream)
    assert torch.equal(numbers, torch.cat(sources).cpu())
    assert int(torch.cuda.cudart().cudaHostUnregister(numbers.data_ptr())) == 0
    memory.close()


def test_a_failure_is_told_and_the_next_job_is_done(writer, tmp_path):
    writer.submit(job(tmp_path / "nowhere"))
    failure = reply_of(writer)
    assert "file system that all machines of the job share" in failure["failure"]
    assert failure["kind"] == checkpoint_writer.DISK
    writer.submit(job(tmp_path))
    assert "files" in reply_of(writer)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_parameters_that_are_not_finite_are_not_written(value, memory, writer, tmp_path):
    numbers = np.frombuffer(memory.bytes, np.float32)
    numbers[:15] = 3e38  # a sum that overflows is no sign by itself
    writer.submit(job(tmp_path / "nowhere"))
    assert reply_of(writer)["kind"] == checkpoint_writer.DISK
    numbers[7] = value
    writer.submit(job(tmp_path))
    reply = reply_of(writer)
    assert reply["kind"] == checkpoint_writer.VALUES and "parameter a is not finite after step 7" in reply["failure"]
    assert not (tmp_path / "model-00000.safetensors").exists()


def test_signals_that_ask_a_run_to_save_do_not_reach_it(writer, tmp_path):
    for number in checkpoint_writer.SIGNALS:
        os.kill(writer.pid, number)
    writer.submit(job(tmp_path))
    assert "files" in reply_of(writer)


def test_a_death_is_told_and_another_process_takes_the_next_job(writer, tmp_path):
    pid = writer.pid
    os.kill(pid, signal.SIGKILL)
    writer.submit(job(tmp_path))
    reply = reply_of(writer)
    if "failure" in reply:  # it was not dead yet when the job was given
        assert reply["kind"] == checkpoint_writer.LOST and "exit code -9" in reply["failure"]
        writer.submit(job(tmp_path))
        reply = reply_of(writer)
    assert "files" in reply and writer.pid != pid


def test_a_hanging_process_is_ended_at_the_limit(memory, tmp_path):
    writer = ProcessWriter(memory, timeout=1)
    pid = writer.pid
    os.kill(pid, signal.SIGSTOP)
    writer.submit({**job(tmp_path), "texts": {"long": "x" * 1_000_000}})  # more than a pipe holds
    reply = reply_of(writer)
    assert reply["kind"] == checkpoint_writer.LOST
    assert "did not finish within checkpoint.timeout, 1 s" in reply["failure"]
    assert gone(pid)
    writer.close()


OWNER = """
import json, os, sys, time
from pathlib import Path
from exlm_dist.checkpoint.writer import Memory, ProcessWriter
writer = ProcessWriter(Memory(1 << 20), timeout=60)
writer.submit(json.loads(sys.argv[1]))
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
        [sys.executable, "-c", OWNER, json.dumps(job(tmp_path))], stdout=subprocess.PIPE, text=True, env=environment
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
