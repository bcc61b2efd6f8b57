"""Settings of `ucx`: which network, whom to trust, how much at once, how long it waits.

Rules kept here: UCX is told by its own settings object and never by this process's environment, and the operator's own
`UCX_*` wins; every wait has a limit; what cannot work is refused when the settings are made.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field, fields

from snowskin.transport.errors import TransportUnavailable
from snowskin.transport.frames import MAX_NAME_NBYTES
from snowskin.transport.ucp.api import HARDWARE_TRANSPORTS

RECEIVE_SEGMENT_NBYTES = 1 << 20
CHUNK_NBYTES = RECEIVE_SEGMENT_NBYTES - 4096  # one fragment of UCX's tcp, with its heads
MAX_HEARTBEAT_S = 20  # an owner waits for nobody who speaks more seldom

# Transports that only bring others about or move bytes inside this host: they serve no peer's one-sided access.
_AUXILIARY = frozenset({"self", "cuda_copy", "cuda", "ud:aux", "ud_v:aux", "ud_x:aux"})


@dataclass(frozen=True, slots=True, kw_only=True)
class UcxSettings:
    """Of one `ucx` transport.

    Attributes:
        name: what this side calls itself, in its peers' errors and logs.
        net_devices: `UCX_NET_DEVICES`, e.g. `mlx5_0:1` or `eth0`; empty: UCX takes all it finds.
        tls: `UCX_TLS`, e.g. `rc,cuda_copy,cuda_ipc`; empty: UCX chooses.
        trusted_network: peers may reach granted memory one-sidedly over whatever UCX uses. Over tcp and shared memory
            UCX then serves ANY address of this process to whoever asks: only where every host is trusted.
        binding: `auto`, `ucx-py` or `ctypes`.
        max_sessions: peers that are served at once.
        max_transfers: of one peer at once.
        max_chunks_posted: over all transfers, in UCX's hands.
        max_chunks_a_peer: of these, to one peer, which may take none of them.
        get_nbytes: of one one-sided access; a larger run is several.
        max_gets_in_flight: of one transfer.
        connect_timeout_s: from connecting to the owner's first answer.
        heartbeat_s: how often an idle reader says PING.
        silence_s: after so long without a word the peer is lost.
        stall_s: after so long a posted chunk that the peer's side does not accept costs it the session.
        reconnect_s: a peer that was lost is not asked anew before; doubled each time, up to 2 s.
        linger_s: how long the way to an owner is kept of whom no region is attached any more.
        more: further settings of UCX, without `UCX_`.
    """

    name: str = field(default_factory=lambda: f"{socket.gethostname()}:{os.getpid()}"[:64])
    net_devices: str = ""
    tls: str = ""
    trusted_network: bool = False
    binding: str = "auto"
    max_sessions: int = 1024
    max_transfers: int = 64
    max_chunks_posted: int = 8
    max_chunks_a_peer: int = 2
    get_nbytes: int = 4 << 20
    max_gets_in_flight: int = 4
    connect_timeout_s: float = 2.0
    heartbeat_s: float = 1.5
    silence_s: float = 4.5
    stall_s: float = 3.0
    reconnect_s: float = 0.05
    linger_s: float = 10.0
    more: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        """Refuses what cannot work."""
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0:
                raise TransportUnavailable(f"ucx: {each.name} = {value} is out of range")
        if self.heartbeat_s > MAX_HEARTBEAT_S:
            raise TransportUnavailable(
                f"ucx: heartbeat_s = {self.heartbeat_s}: owners take who says nothing for so long for lost",
                hint=f"at most {MAX_HEARTBEAT_S} s",
            )
        if self.silence_s < 2 * self.heartbeat_s:
            raise TransportUnavailable(
                f"ucx: a peer that speaks every {self.heartbeat_s} s is silent for {self.silence_s} s now and then",
                hint="silence_s at least twice heartbeat_s",
            )
        if not 0 < len(self.name.encode()) <= MAX_NAME_NBYTES:
            raise TransportUnavailable(f"ucx: a name has 1 to {MAX_NAME_NBYTES} bytes")

    @property
    def hardware_only(self) -> bool:
        """Whether `tls` leaves only transports whose hardware checks keys, beside auxiliary ones."""
        names = {name.strip() for name in self.tls.split(",") if name.strip()}
        return bool(names - _AUXILIARY) and all(
            name in _AUXILIARY or is_hardware(name) for name in names
        )

    @property
    def offers_one_sided(self) -> bool:
        """Whether peers may reach granted memory one-sidedly at all."""
        return self.trusted_network or self.hardware_only

    def config(self) -> dict[str, str]:
        """For UCX; names without `UCX_`."""
        config = {
            # As measured over tcp: larger segments, up to five times the rate. A chunk of ours is one fragment.
            "TCP_RX_SEG_SIZE": str(RECEIVE_SEGMENT_NBYTES),
            "TCP_TX_SEG_SIZE": "64k",
            # Messages land by copy, in order, and only where we put them.
            "TCP_PUT_ENABLE": "y" if self.trusted_network else "n",
        }
        if self.net_devices:
            config["NET_DEVICES"] = self.net_devices
        if self.tls:
            config["TLS"] = self.tls
        return config | dict(self.more)


def is_hardware(transport: str) -> bool:
    """Whether this transport, as UCX names it (`rc_mlx5/mlx5_0:1`, `dc_x`), checks keys in hardware."""
    name = transport.partition("/")[0]
    return name in HARDWARE_TRANSPORTS or name.startswith(("rc_", "dc_"))


def is_auxiliary(transport: str) -> bool:
    """Whether this transport reaches no peer's memory."""
    return transport.partition("/")[0] in _AUXILIARY
