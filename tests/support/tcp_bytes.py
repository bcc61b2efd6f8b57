"""What travelled by TCP, as the kernel counts it, socket by socket.

Outside of the product on purpose: a claim about bytes on the wire is not proved by the counters of those who send
them. The kernel tells of every socket by netlink (`sock_diag(7)`, `INET_DIAG_INFO`), as `ss -ti` shows it; headers of
HTTP/2 are in it, those of TCP and IP are not.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLM_F_REQUEST_DUMP = 0x301
NLMSG_ERROR, NLMSG_DONE = 2, 3
INET_DIAG_INFO = 2
ESTABLISHED = 1 << 1
# struct inet_diag_msg: four bytes, then the ids (ports big-endian, ... , cookie at 44), 72 bytes in all.
IDS_OFFSET, COOKIE_OFFSET, ATTRIBUTES_OFFSET = 4, 44, 72
# struct tcp_info: tcpi_bytes_acked and tcpi_bytes_received.
BYTES_OFFSET = 120
HEADER_NBYTES = 16
MAX_ANSWER_NBYTES = 1 << 20


def tcp_nbytes(server_ports: Collection[int]) -> dict[int, int]:
    """Bytes that the servers on these ports received and sent so far, by connection (its kernel cookie)."""
    return {
        cookie: nbytes
        for family in (socket.AF_INET, socket.AF_INET6)
        for port, cookie, nbytes in _connections(family)
        if port in server_ports
    }


def is_counted() -> bool:
    """Whether this kernel tells: some containers have no `tcp_diag`."""
    try:
        tcp_nbytes(())
    except OSError:
        return False
    return True


def since(before: dict[int, int], after: dict[int, int]) -> int:
    """Bytes between two counts; none of the connections may have ended meanwhile."""
    assert before.keys() <= after.keys(), "a connection ended, and with it its count"
    return sum(after.values()) - sum(before.values())


def _connections(family: int) -> Iterator[tuple[int, int, int]]:
    """Local port, cookie, and bytes of each established connection of this network namespace."""
    request = struct.pack(
        "=BBBBI48x", family, socket.IPPROTO_TCP, 1 << (INET_DIAG_INFO - 1), 0, ESTABLISHED
    )
    header = struct.pack(
        "=IHHII", HEADER_NBYTES + len(request), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST_DUMP, 1, 0
    )
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as netlink:
        netlink.send(header + request)
        while True:
            answer = memoryview(netlink.recv(MAX_ANSWER_NBYTES))
            while answer:
                nbytes, kind = struct.unpack_from("=IH", answer)
                if kind == NLMSG_DONE:
                    return
                if kind == NLMSG_ERROR:
                    number = -struct.unpack_from("=i", answer, HEADER_NBYTES)[0]
                    raise OSError(number, f"the kernel tells no TCP counts: {os.strerror(number)}")
                yield from _connection(answer[HEADER_NBYTES:nbytes])
                answer = answer[_aligned(nbytes) :]


def _connection(message: memoryview) -> Iterator[tuple[int, int, int]]:
    (port,) = struct.unpack_from(">H", message, IDS_OFFSET)
    (cookie,) = struct.unpack_from("=Q", message, COOKIE_OFFSET)
    at = ATTRIBUTES_OFFSET
    while at < len(message):
        nbytes, kind = struct.unpack_from("=HH", message, at)
        if kind == INET_DIAG_INFO:
            yield port, cookie, sum(struct.unpack_from("=QQ", message, at + 4 + BYTES_OFFSET))
        at += _aligned(nbytes)


def _aligned(nbytes: int) -> int:
    return (nbytes + 3) & ~3
