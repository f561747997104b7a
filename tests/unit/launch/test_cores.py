"""Cores: affinity and control groups, whichever allows fewer."""

from __future__ import annotations

from pathlib import Path

import pytest

from exlm_dist.utils import cores


def test_quota_of_version_2(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/job/step\n")
    inner = tmp_path / "job" / "step"
    inner.mkdir(parents=True)
    assert cores.cpu_quota(tmp_path, tmp_path / "own") is None
    (inner / "cpu.max").write_text("max 100000\n")
    assert cores.cpu_quota(tmp_path, tmp_path / "own") is None
    (tmp_path / "job" / "cpu.max").write_text("250000 100000\n")
    assert cores.cpu_quota(tmp_path, tmp_path / "own") == 2.5
    (inner / "cpu.max").write_text("50000 100000\n")
    assert cores.cpu_quota(tmp_path, tmp_path / "own") == 0.5


def test_quota_of_version_1(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("5:memory:/job\n4:cpu,cpuacct:/job\n")
    folder = tmp_path / "cpu" / "job"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    for quota, expected in (("-1", None), ("300000", 3.0)):
        (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        assert cores.cpu_quota(tmp_path, tmp_path / "own") == expected


@pytest.mark.parametrize(("quota", "expected"), [(None, 4), (2.5, 3), (0.3, 1), (16.0, 4)])
def test_the_smaller_limit_counts(monkeypatch: pytest.MonkeyPatch, quota: float | None, expected: int) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)))
    monkeypatch.setattr(cores, "cpu_quota", lambda *_: quota)
    assert cores.available_cores() == expected


def test_what_cannot_be_read_is_no_limit(tmp_path: Path) -> None:
    assert cores.cpu_quota(tmp_path, tmp_path / "missing") is None
    (tmp_path / "own").write_text("0::/\n")
    (tmp_path / "cpu.max").write_text("???")
    assert cores.cpu_quota(tmp_path, tmp_path / "own") is None
