"""The node's process: memory, state, two doors, the data plane, health; and a drain at the end."""

from __future__ import annotations

import asyncio
import secrets
import socket
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from snowskin.kvstore.clock import SystemClock
from snowskin.kvstore.config import setting
from snowskin.kvstore.errors import BadSetting
from snowskin.kvstore.eviction.registry import make_eviction
from snowskin.kvstore.metrics import Metrics
from snowskin.kvstore.node.admin import NodeAdminService
from snowskin.kvstore.node.data_ports import DataPlaneSettings, open_transports, shown_addresses
from snowskin.kvstore.node.door import CallMeter, LocalDoor
from snowskin.kvstore.node.limits import NodeLimits
from snowskin.kvstore.node.metrics import NodeMetrics
from snowskin.kvstore.node.reach import NodeReach
from snowskin.kvstore.node.service import StoreService
from snowskin.kvstore.node.shell import NodeShell
from snowskin.kvstore.node.state import NodeState
from snowskin.kvstore.node.watching import WatchLimits
from snowskin.kvstore.owned_folder import OwnedFolder
from snowskin.kvstore.pool.arena import Arena, HugePages
from snowskin.kvstore.pool.pool import Pool
from snowskin.kvstore.role import Stop, announce_ready, tracer_of
from snowskin.kvstore.rpc import serving
from snowskin.kvstore.session import DEFAULT_TENANT
from snowskin.kvstore.telemetry import HealthServer, get_logger
from snowskin.kvstore.transport_metrics import TransportMetrics
from snowskin.v1 import admin_pb2_grpc, store_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from snowskin.transport.api import Transport

ROLE = "node"
DRAIN_LOOK_S = 0.02
FOLDER_PREFIX = "snowskin-node-"

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class NodeSettings(DataPlaneSettings):
    """Settings of a store node."""

    node_id: str = setting("", help="Name of the node; the host's name if empty.")
    door: str = setting(
        "", help="Path of the local door's socket; a private temporary path if empty."
    )
    dram_nbytes: int = setting(1 << 30, help="Size of the DRAM pool.")
    huge_pages: HugePages = setting(
        "auto", help="Huge pages under the pool: where they can be had, never, or nothing else."
    )
    eviction: str = setting("lru", help="Who goes first when the pool is full.")
    read_lease_s: float = setting(10.0, help="Life of a read lease.")
    write_lease_s: float = setting(30.0, help="Life of a write lease, and of an unread tail.")
    grace_s: float = setting(10.0, help="Time between a lease's end and reuse of its bytes.")
    lease_life_s: float = setting(600.0, help="Longest life of a lease with all renewals.")
    max_extent_nbytes: int = setting(64 << 20, help="Longest contiguous extent.")
    max_keys: int = setting(8192, help="Keys that one call may carry.")
    max_leased_ratio: float = setting(
        0.5, help="Share of a pool that all readers together may lease, and so keep from eviction."
    )
    max_client_leased_ratio: float = setting(
        0.25, help="Share of a pool that one client may lease; it may always begin with one extent."
    )
    max_quarantined_ratio: float = setting(
        0.25,
        help="Share of a pool in quarantine beyond which those whose writes are there get no room.",
    )
    watch_ring_nbytes: int = setting(
        16 << 20, help="Block changes kept for subscribers who come back."
    )
    watch_beat_s: float = setting(2.0, help="Silence of a watch at most.")
    watch_stall_s: float = setting(
        10.0, help="How long a subscriber may read nothing before it is dropped."
    )
    max_watchers: int = setting(16, help="Subscribers to block changes at once.")

    def __post_init__(self) -> None:
        """Refuses what cannot work, before anything is opened."""
        super().__post_init__()
        if self.dram_nbytes < 1 << 20:
            raise BadSetting(f"dram_nbytes is {self.dram_nbytes}", hint="give at least 1MiB")
        self.limits()
        self.watch_limits()

    def limits(self) -> NodeLimits:
        """The part that the state machine needs."""
        return NodeLimits(
            read_lease_s=self.read_lease_s,
            write_lease_s=self.write_lease_s,
            grace_s=self.grace_s,
            lease_life_s=self.lease_life_s,
            max_extent_nbytes=self.max_extent_nbytes,
            max_keys=self.max_keys,
            max_leased_ratio=self.max_leased_ratio,
            max_client_leased_ratio=self.max_client_leased_ratio,
            max_quarantined_ratio=self.max_quarantined_ratio,
            watch_ring_nbytes=self.watch_ring_nbytes,
        )

    def watch_limits(self) -> WatchLimits:
        """The part that those who watch are held to."""
        return WatchLimits(
            beat_s=self.watch_beat_s,
            stall_s=self.watch_stall_s,
            max_watchers=self.max_watchers,
        )


def make_shell(
    settings: NodeSettings, transports: Sequence[Transport] = (), *, epoch: int | None = None
) -> NodeShell:
    """A node's state with its memory, no doors yet; the caller closes it, and with it the data plane's `transports`."""
    arena = Arena(
        settings.dram_nbytes,
        name="dram",
        tenant=DEFAULT_TENANT,
        huge_pages=settings.huge_pages,
        lend_pages=settings.lend_pages,
    )
    pool = Pool(0, arena.nbytes, tenant=DEFAULT_TENANT, pages=arena.lending)
    state = NodeState(
        node_id=settings.node_id or socket.gethostname(),
        epoch=secrets.randbits(63) if epoch is None else epoch,
        pools=[pool],
        eviction=make_eviction(settings.eviction),
        limits=settings.limits(),
    )
    return NodeShell(state, {pool.id: arena}, SystemClock(), transports)


async def serve_node(settings: NodeSettings, stop: Stop) -> None:
    """Serves until `stop`, then drains: no new leases, and those out get `drain_s` to end."""
    async with AsyncExitStack() as stack:
        epoch = secrets.randbits(63)
        transports = open_transports(settings, epoch=epoch)
        for transport in transports:  # the shell's from now on; twice is no harm
            stack.callback(transport.close)
        shell = make_shell(settings, transports, epoch=epoch)
        stack.callback(shell.close)
        log.info("memory taken", nbytes=settings.dram_nbytes, **_words(shell.pages()))
        for arena in shell.arenas.values():
            log.info("pages lent to sockets", pool=arena.name, why_not=arena.why_not_lent)
        metrics = Metrics(ROLE)
        tracer = stack.enter_context(
            tracer_of(settings, role=ROLE, instance_id=shell.state.node_id)
        )
        calls = CallMeter()
        if "shm" in settings.transports:
            path = Path(settings.door) if settings.door else _private_path(stack)
            door = LocalDoor(shell, path, tracer=tracer, meter=calls)
            door.open()
            stack.callback(door.close)
            shell.state.door = f"unix:{path}"
        service = StoreService(shell, settings.watch_limits())
        stack.callback(service.close)
        reach = NodeReach.of_node(
            settings, transports, shell.data_plane.statistics, pages=shell.pages
        )
        shell.state.advertisement = reach.advertisement.to_bytes()
        admin = NodeAdminService(shell, reach)
        server = await stack.enter_async_context(
            serving(
                [
                    (store_pb2_grpc.add_StoreServicer_to_server, service),
                    (admin_pb2_grpc.add_NodeAdminServicer_to_server, admin),
                ],
                host=settings.host,
                port=settings.port,
                service_names=["snowskin.v1.Store", "snowskin.v1.NodeAdmin"],
                role=ROLE,
                metrics=metrics,
                tracer=tracer,
            )
        )
        admin.on_drain = server.say_draining
        NodeMetrics(
            metrics,
            shell.stat,
            door=calls,
            watchers=service.watchers,
            slow_path=service,
            lendings=shell.lendings(),
        )
        TransportMetrics(metrics, shell.data_plane.statistics)

        def check() -> tuple[bool, dict[str, object]]:
            state = shell.state
            door_path = state.door.removeprefix("unix:")
            facts: dict[str, object] = {"role": ROLE, "id": state.node_id, "door": door_path}
            return not state.draining, facts

        health = await stack.enter_async_context(
            HealthServer(
                settings.host,
                settings.http_port,
                check=check,
                metrics=metrics,
                insecure=settings.insecure,
            )
        )
        announce_ready(
            settings,
            role=ROLE,
            id=shell.state.node_id,
            address=server.address,
            http_address=f"{settings.host}:{health.port}",
            door=shell.state.door,
            data_address=shown_addresses(transports),
        )
        await stop.wait()
        await server.say_draining()
        await _drain(shell, settings.drain_s)


async def _drain(shell: NodeShell, drain_s: float) -> None:
    shell.drain()
    deadline_s = shell.clock.now_s() + drain_s
    # A look every 20 ms, once in the node's life: not worth a hook in the state machine.
    while not shell.is_idle() and shell.clock.now_s() < deadline_s:  # noqa: ASYNC110
        await asyncio.sleep(DRAIN_LOOK_S)
    stat = shell.state.stat()
    log.info("drained", read_leases=stat.num_read_leases, write_leases=stat.num_write_leases)


def _words(facts: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Facts as fields of a log line."""
    return {name.replace(" ", "_"): value for name, value in facts}


def _private_path(stack: AsyncExitStack) -> Path:
    folder = OwnedFolder(Path(tempfile.gettempdir()), FOLDER_PREFIX)
    stack.callback(folder.close)
    return folder.path / "door"
