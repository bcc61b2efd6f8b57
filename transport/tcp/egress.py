"""By which device this host reaches a peer: does what leaves by it leave the host?

Rules kept here: hardware is what its own driver says so of; loopback, bridges, pairs of virtual devices, tunnels and
whatever is not understood are not. Nothing is read from /sys, which may be another network namespace's.

Why it matters: a page that is sent by reference stays a page of ours in a socket buffer of the *same* kernel, and a
reader there can keep hold of it, whatever it says (splice(2) from the socket into a pipe). A device copies it; a peer
that acknowledges what still waits in the device's queue could be sent what is written there within milliseconds.

Sources: rtnetlink(7), RTM_GETROUTE; ETHTOOL_GDRVINFO of linux/ethtool.h; netdevice(7).
"""

from __future__ import annotations

import array
import fcntl
import re
import socket
import struct

_NETLINK_ROUTE = 0
_RTM_NEWROUTE, _RTM_GETROUTE = 24, 26
_NLM_F_REQUEST = 1
_RTN_UNICAST = 1
_RTA_DST, _RTA_OIF = 1, 4
_HEADER = struct.Struct("=IHHII")
_ROUTE = struct.Struct("=BBBBBBBBI")
_ATTRIBUTE = struct.Struct("=HH")
_ANSWER_NBYTES = 8192
_ANSWER_S = 1.0

_SIOCETHTOOL = 0x8946
_GDRVINFO = 3
_BUS_AT, _BUS_NBYTES, _INFO_NBYTES = 4 + 3 * 32, 32, 196
_REQUEST = struct.Struct("16sP16x")
_BUS = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]|virtio\d+")


def leaves_by_hardware(host: str) -> bool:
    """Whether packets to an address (not a name) go out by a PCI or virtio network device; False where in doubt."""
    try:
        device = _device_to(host)
        return bool(device) and _BUS.fullmatch(_bus_of(device)) is not None
    except (OSError, ValueError, struct.error):
        return False


def _device_to(host: str) -> str:
    """Name of the device that the route to `host` ends in; empty where that is this host, or several."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    packed = socket.inet_pton(family, host)
    route = _ROUTE.pack(family, 8 * len(packed), 0, 0, 0, 0, 0, 0, 0)
    body = route + _ATTRIBUTE.pack(_ATTRIBUTE.size + len(packed), _RTA_DST) + packed
    header = _HEADER.pack(_HEADER.size + len(body), _RTM_GETROUTE, _NLM_F_REQUEST, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_ROUTE) as netlink:
        netlink.settimeout(_ANSWER_S)
        netlink.send(header + body)
        answer = netlink.recv(_ANSWER_NBYTES)
    nbytes, kind, *_ = _HEADER.unpack_from(answer)
    if kind != _RTM_NEWROUTE:
        return ""
    *_, route_kind, _ = _ROUTE.unpack_from(answer, _HEADER.size)
    at = _HEADER.size + _ROUTE.size
    while route_kind == _RTN_UNICAST and at + _ATTRIBUTE.size <= nbytes:
        size, name = _ATTRIBUTE.unpack_from(answer, at)
        if name == _RTA_OIF:
            return socket.if_indextoname(struct.unpack_from("=I", answer, at + _ATTRIBUTE.size)[0])
        at += max(_ATTRIBUTE.size, size + 3 & ~3)
    return ""


def _bus_of(device: str) -> str:
    """Where a device's driver says that it is plugged in; raises OSError where it says nothing."""
    info = array.array("B", bytes(_INFO_NBYTES))
    struct.pack_into("=I", info, 0, _GDRVINFO)
    request = _REQUEST.pack(device.encode(), info.buffer_info()[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as plain:
        fcntl.ioctl(plain, _SIOCETHTOOL, request)
    return bytes(info[_BUS_AT : _BUS_AT + _BUS_NBYTES]).partition(b"\0")[0].decode("ascii")
