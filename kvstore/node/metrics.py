"""What a node shows at /metrics: its account as it is at the scrape, and its calls.

Rules kept here: a counter of the state machine is shown under its own name, and only if it is
described here; nothing is counted twice. Names and units: docs/metrics.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from prometheus_client.core import Metric

    from snowskin.kvstore.messages import NodeStat, PoolStat
    from snowskin.kvstore.metrics import Metrics
    from snowskin.kvstore.node.door import CallMeter
    from snowskin.kvstore.node.watching import Watchers
    from snowskin.transport.lending import Lending

# As `NodeStat.counters` names them, and what each says.
COUNTERS = {
    "matches": "Matches that were answered with blocks or without, tails included.",
    "matches_cut": "Matches that got a shorter run, so that no client holds too much of the pool.",
    "matches_refused": "Matches that got nothing for the same reason.",
    "blocks_matched": "Blocks that readers were given, once for each shard and reader.",
    "blocks_committed": "Blocks that became visible, tails included.",
    "blocks_duplicate": "Blocks whose writer found them committed by another one.",
    "blocks_evicted": "Blocks that made room for new ones.",
    "blocks_evicted_unread": "Of these, blocks for one reader that it had not read.",
    "blocks_evicted_by_operator": "Blocks that an operator had removed.",
    "blocks_corrupt": "Blocks taken out because a reader complained of their bytes.",
    "read_leases_expired": "Read leases that ran out before they were released.",
    "write_leases_expired": "Write leases that ran out before all was committed.",
    "leases_revoked": "Leases that an operator ended.",
    "reserves_refused": "Reservations for which no room came free in time.",
}
POOL_SIZES = {
    "capacity": "Size of the pool: free, committed, reserved and quarantined together.",
    "free": "Bytes in holes.",
    "committed": "Bytes of visible blocks, and of those that went while a reader held them.",
    "reserved": "Bytes that a writer may fill now.",
    "quarantined": "Bytes whose writer's lease ran out, but whose stores may still land.",
    "leased": "Bytes of segments under a read lease; part of the committed ones.",
    "largest_hole": "Longest contiguous free range.",
}
KINDS = ("kind",)
POOL_LABELS = ("pool", "tier", "tenant")


class SlowPath(Protocol):
    """What moves bytes by gRPC."""

    read_nbytes: int
    written_nbytes: int


class NodeMetrics:
    """Reads one node's account."""

    def __init__(
        self,
        metrics: Metrics,
        stat: Callable[[], NodeStat],
        *,
        door: CallMeter,
        watchers: Watchers,
        slow_path: SlowPath,
        lendings: Mapping[int, Lending],
    ) -> None:
        """Is read with `metrics` from now on; `lendings` by pool, of those whose pages are lent."""
        self._metrics = metrics
        self._stat = stat
        self._door = door
        self._watchers = watchers
        self._slow_path = slow_path
        self._lendings = lendings
        metrics.read(self._read)
        metrics.read(door.seconds.collect)

    def _read(self) -> Iterable[Metric]:
        stat, metrics = self._stat(), self._metrics
        yield from self._pools(stat)
        yield from self._lent()
        yield metrics.gauge("blocks", "Committed blocks, tails included.", [((), stat.num_blocks)])
        yield metrics.gauge(
            "leases",
            "Leases that have not ended, those in their grace or quarantine included.",
            [(("read",), stat.num_read_leases), (("write",), stat.num_write_leases)],
            KINDS,
        )
        yield metrics.gauge(
            "sessions", "Clients: on the local door, and by gRPC.", [((), stat.num_sessions)]
        )
        yield metrics.gauge(
            "waiting",
            "Calls that wait inside the node: matches for blocks, reservations for room.",
            [(("match",), stat.num_waiting_matches), (("reserve",), stat.num_waiting_reserves)],
            KINDS,
        )
        yield metrics.gauge(
            "draining", "1 while the node grants no new leases.", [((), stat.draining)]
        )
        yield metrics.gauge(
            "watchers", "Subscribers to block changes.", [((), len(self._watchers))]
        )
        yield metrics.total(
            "watchers_dropped_total",
            "Subscribers that were dropped because they read too slowly.",
            [((), self._watchers.num_dropped)],
        )
        yield metrics.total(
            "door_calls_total",
            "Messages of clients on the local door.",
            [((), self._door.num_calls)],
        )
        yield metrics.total(
            "slow_path_bytes_total",
            "Bytes that went through gRPC, for clients without a transport.",
            [
                (("read",), self._slow_path.read_nbytes),
                (("write",), self._slow_path.written_nbytes),
            ],
            KINDS,
        )
        for name, help in COUNTERS.items():
            yield metrics.total(f"{name}_total", help, [((), stat.counters.get(name, 0))])

    def _pools(self, stat: NodeStat) -> Iterable[Metric]:
        for size, help in POOL_SIZES.items():
            values = [(_labels(pool), getattr(pool, f"{size}_nbytes")) for pool in stat.pools]
            yield self._metrics.gauge(f"pool_{size}_bytes", help, values, POOL_LABELS)

    def _lent(self) -> Iterable[Metric]:
        """What sockets refer to."""
        shown = {(str(pool_id),): each for pool_id, each in self._lendings.items()}
        yield self._metrics.gauge(
            "pool_lent_bytes",
            "Bytes that sockets refer to, once for each transfer under way.",
            [(labels, each.lent_nbytes) for labels, each in shown.items()],
            ("pool",),
        )
        yield self._metrics.gauge(
            "pool_forsaken_bytes",
            "Bytes that a reader which left may still refer to; they get other pages before they are written.",
            [(labels, each.forsaken_nbytes) for labels, each in shown.items()],
            ("pool",),
        )
        yield self._metrics.total(
            "pool_reclaimed_bytes_total",
            "Bytes that got other pages, because somebody might still refer to the old ones.",
            [(labels, each.num_reclaimed * each.unit_nbytes) for labels, each in shown.items()],
            ("pool",),
        )


def _labels(pool: PoolStat) -> tuple[str, ...]:
    return (str(pool.pool_id), pool.tier, pool.tenant)
