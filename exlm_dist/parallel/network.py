"""Which network interface leads to the other ranks. No torch."""

from __future__ import annotations

import socket

import psutil


def interface_towards(address: str) -> str | None:
    """Name of the interface from which this machine reaches `address` (a host name or an IP address); None if unknown.

    Left alone, gloo takes the interface that the host name resolves to, which on many clusters is the loopback.
    """
    try:
        family, _, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # chooses the route; nothing is sent
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == own for entry in addresses):
            return name
    # 127.0.0.2 and the like belong to the loopback without being listed.
    return "lo" if own.startswith("127.") and "lo" in psutil.net_if_addrs() else None
