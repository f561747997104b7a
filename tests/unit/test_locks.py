"""File systems without locks, as Lustre mounted without `-o flock`."""

from __future__ import annotations

import errno
import fcntl
import logging
import os

import pytest
from made_run import make_config

from exlm_dist.doctor.findings import table
from exlm_dist.doctor.machine_checks import check_locks
from exlm_dist.tracking import EventLog, read_events
from exlm_dist.training.run_folder import RunFolder
from exlm_dist.utils import locks


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def lockless(request, monkeypatch):
    """A file system that answers every lock with an error."""

    def flock(handle, operation):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(locks, "_named", set())


def test_a_run_goes_on_without_locks_and_one_warning_says_so(lockless, tmp_path, caplog):
    config = make_config(tmp_path / "runs", "one", tmp_path / "data")
    with caplog.at_level(logging.WARNING):
        folder = RunFolder.open(config, patience=0.1)
        log = EventLog(folder.path / "events.jsonl")
        for step in (1, 2):
            log.metrics(step, {"train/loss": 1.0})
        log.close()
        folder.close()
    assert [event["step"] for event in read_events(log.path) if event["kind"] == "metrics"] == [1, 2]
    assert len(caplog.records) == 1 and "-o flock" in caplog.text and str(folder.path) in caplog.text


def test_the_doctor_says_whether_there_are_locks(lockless, tmp_path, monkeypatch):
    config = make_config(tmp_path, "one", tmp_path / "data")
    assert "-o flock" in table([check_locks(config)])
    monkeypatch.undo()
    assert "-o flock" not in table([check_locks(config)])


def test_other_errors_are_raised(tmp_path):
    with pytest.raises(OSError, match="Bad file descriptor"):
        locks.lock(9999, tmp_path)
