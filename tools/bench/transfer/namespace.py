"""A network namespace of its own with nothing but loopback, for a peer that listens on all interfaces."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

CLONE_NEWNET = 0x4000_0000
CONGESTION = Path(
    "/proc/sys/net/ipv4/tcp_congestion_control"
)  # of the network that this process is in
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_IFREQ = struct.Struct("16sH14x")


class NoNamespace(Exception):
    """The kernel gives this process no network of its own; mostly it is not root."""


def own_network(congestion: str = "") -> None:
    """Moves this process into a new network namespace and brings its loopback device up.

    Args:
        congestion: TCP's congestion control there, where the kernel has it; empty: as on the host.
    """
    _call("unshare", CLONE_NEWNET)
    if congestion:
        CONGESTION.write_text(congestion)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        _, flags = _IFREQ.unpack(fcntl.ioctl(any_socket, _SIOCGIFFLAGS, _IFREQ.pack(b"lo", 0)))
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, _IFREQ.pack(b"lo", flags | _IFF_UP))


def enter_network_of(pid: int) -> None:
    """Moves this process into the network namespace of another."""
    fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    try:
        _call("setns", fd, CLONE_NEWNET)
    finally:
        os.close(fd)


def _call(name: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        raise NoNamespace(f"{name}: {os.strerror(ctypes.get_errno())}")


def namespaces_work() -> bool:
    """Whether this user may make network namespaces; tried in a child process."""
    question = f"import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare({CLONE_NEWNET}) != 0)"
    return subprocess.run([sys.executable, "-I", "-c", question], check=False).returncode == 0
