"""What one node grants and accepts: numbers only, checked once."""

from __future__ import annotations

from dataclasses import dataclass

from snowskin.kvstore.errors import BadSetting

MIN_RETRY_S = 0.05  # nobody is told to come again sooner
MIN_LEASE_S = 0.01  # shorter, and a lease is over before its answer is read
MAX_LEASE_S = 86_400.0  # a day; longer is a mistake, and would not fit the wire's milliseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLimits:
    """Lease times in seconds, sizes in bytes, counts. The defaults are ARCHITECTURE's."""

    read_lease_s: float = 10.0
    write_lease_s: float = 30.0
    grace_s: float = 10.0
    lease_life_s: float = 600.0
    max_extent_nbytes: int = 64 << 20
    max_keys: int = 8192
    max_namespaces: int = 64
    # Keys times namespaces of one match: each may come back as a run of its own, some 40 bytes, and the answer
    # must fit a frame.
    max_match_blocks: int = 65536
    max_timeout_s: float = 600.0
    max_waiting: int = 1024
    max_waiting_per_session: int = 512
    max_leases_per_session: int = 4096
    # Of a pool: what all clients together, and one of them, may keep from eviction by reading; and what may be in
    # quarantine before those who brought it there get no more room.
    max_leased_ratio: float = 0.5
    max_client_leased_ratio: float = 0.25
    max_quarantined_ratio: float = 0.25
    # Of block changes that are kept for subscribers who come back: half a million of 32 bytes.
    watch_ring_nbytes: int = 16 << 20

    def __post_init__(self) -> None:
        """Refuses numbers that cannot work."""
        for name in ("read_lease_s", "write_lease_s", "lease_life_s"):
            if not MIN_LEASE_S <= getattr(self, name) <= MAX_LEASE_S:
                raise BadSetting(
                    f"{name} is {getattr(self, name)}",
                    hint=f"give seconds from {MIN_LEASE_S} to at most {MAX_LEASE_S:.0f}",
                )
        if not 0 <= self.grace_s <= MAX_LEASE_S:
            raise BadSetting(
                f"grace_s is {self.grace_s}", hint=f"give 0 to {MAX_LEASE_S:.0f} seconds"
            )
        for name in ("max_leased_ratio", "max_client_leased_ratio", "max_quarantined_ratio"):
            if not 0 < getattr(self, name) <= 1:
                raise BadSetting(
                    f"{name} is {getattr(self, name)}",
                    hint="give a share of a pool, above 0 and at most 1 (which sets no limit)",
                )
        if self.watch_ring_nbytes < 4096:
            raise BadSetting(
                f"watch_ring_nbytes is {self.watch_ring_nbytes}", hint="give 4096 bytes or more"
            )
        if self.max_keys < 1:
            raise BadSetting(f"max_keys is {self.max_keys}", hint="give 1 or more")
        if self.max_extent_nbytes < 4096:
            raise BadSetting(
                f"max_extent_nbytes is {self.max_extent_nbytes}", hint="give 4096 bytes or more"
            )

    @property
    def unread_s(self) -> float:
        """A block for one reader may be given up under pressure when nobody came for this long."""
        return self.read_lease_s
