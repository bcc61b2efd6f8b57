"""Ports for servers that must come back under the same number.

Rules kept here: never from the kernel's ephemeral range. While a server is down its clients keep connecting; from
inside that range the kernel may give one of them the server's own number as its source, and on loopback such a
connect succeeds with itself and holds the port.
"""

from __future__ import annotations

import random
import socket
from pathlib import Path

from snowskin.kvstore.errors import AddressInUse

LOWEST, HIGHEST = 10_240, 65_535
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_NUM_TRIES = 64


def ephemeral_range(text: str) -> tuple[int, int]:
    """First and last port of the kernel's setting; (0, -1), an empty range, where it is unreadable."""
    try:
        low, high = (int(word) for word in text.split())
    except ValueError:
        return 0, -1
    return low, high


def candidate_ports(low: int, high: int) -> range:
    """The longer side of what lies outside of `low`..`high`; everything, where nothing does."""
    below = range(LOWEST, max(LOWEST, min(low, HIGHEST)))
    above = range(max(high + 1, LOWEST), HIGHEST + 1)
    return max(below, above, key=len) or range(LOWEST, HIGHEST + 1)


def _free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def pick_port(host: str, *, preferred: int = 0) -> int:
    """A port that nobody listens on now; it may be taken before it is used, so be ready to pick again.

    Args:
        host: the address that it will be used on.
        preferred: taken where it is free; 0 for none.

    Raises:
        AddressInUse: none was found.
    """
    if preferred and _free(host, preferred):
        return preferred
    try:
        text = _EPHEMERAL.read_text()
    except OSError:
        text = ""
    ports = candidate_ports(*ephemeral_range(text))
    for _ in range(_NUM_TRIES):
        port = random.choice(ports)  # noqa: S311  no secret
        if _free(host, port):
            return port
    raise AddressInUse(
        f"no free port on {host} among {_NUM_TRIES} tried", hint="stop what listens there"
    )
