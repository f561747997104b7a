"""The interface towards the other ranks."""

from __future__ import annotations

import psutil
import pytest

from exlm_dist.parallel.network import interface_towards


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.9", "localhost"])
def test_the_loopback(address):
    assert interface_towards(address) == "lo"


def test_an_own_address_is_on_the_interface_that_has_it():
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family.name == "AF_INET":
                assert interface_towards(entry.address) == name


def test_an_unknown_name():
    assert interface_towards("no-such-host.invalid") is None
