"""Metrics of GPUs, which must open a CUDA context on none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from exlm_dist.tracking.system import system_metrics

TOTAL = 80_000_000_000


@pytest.fixture
def asked(monkeypatch):
    """A node of eight GPUs, of which this process uses number 2; the devices that CUDA itself was asked about."""
    devices: list[int] = []

    def mem_get_info(device):
        devices.append(device)
        return TOTAL // 4 * 3, TOTAL

    fakes = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 8,
        "mem_get_info": mem_get_info,
        "memory_reserved": lambda device: 7 * (device == 2),
        "get_device_properties": lambda device: SimpleNamespace(total_memory=TOTAL),
        "device_memory_used": lambda device: TOTAL // 2,
        "utilization": lambda device: 50 + device,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake, raising=False)
    return devices


def test_all_devices_by_nvml(asked):
    values = system_metrics()
    assert asked == [] and values["system/gpu_7_utilization_percentage"] == 57
    assert {values[f"system/gpu_{device}_memory_usage_percentage"] for device in range(8)} == {50}


def test_without_nvml_only_those_in_use(asked, monkeypatch):
    def missing(device):
        raise ModuleNotFoundError("nvidia-ml-py")

    monkeypatch.setattr(torch.cuda, "device_memory_used", missing, raising=False)
    values = system_metrics()
    assert asked == [2] and values["system/gpu_2_memory_usage_megabytes"] == TOTAL / 4e6
    assert [name for name in values if "gpu" in name and "gpu_2" not in name] == []
