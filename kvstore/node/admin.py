"""The NodeAdmin service: an operator looks into one node, and takes away.

Rules kept here: a request is checked before anything is done for it. A page token is sealed by this node for these
filters: another one is refused, so that it need not be believed. Long work goes a piece at a time, and the node serves
others in between. What takes something away is logged as a warning, with who asked and how much; of blocks the log
names keys as hex, never what they stand for.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from snowskin.kvstore import admin_wire
from snowskin.kvstore.admin_messages import BlockPage, Evicted, LeasePage
from snowskin.kvstore.blocks import MAX_KEY_NBYTES, MIN_KEY_NBYTES
from snowskin.kvstore.errors import BadRequest, LimitExceeded, NamespaceMismatch
from snowskin.kvstore.messages import LeaseId
from snowskin.kvstore.node.inspection import PIECE_KEYS, shards
from snowskin.kvstore.node.reach import NodeReach
from snowskin.kvstore.node.validation import NAMESPACE_NBYTES
from snowskin.kvstore.rpc import CLIENT_HEADER
from snowskin.kvstore.session import DEFAULT_TENANT
from snowskin.kvstore.telemetry import get_logger
from snowskin.kvstore.wire import keys_from
from snowskin.v1 import admin_pb2, admin_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    import grpc.aio

    from snowskin.kvstore.node.shell import NodeShell

    Context = grpc.aio.ServicerContext[Any, Any]

MAX_PAGE_SIZE = 1000
DEFAULT_PAGE_SIZE = 100
SEAL_NBYTES = 16
# Blocks that are taken out between two looks at other clients: some milliseconds.
EVICT_PIECE = 512
NUM_LOGGED_KEYS = 8

log = get_logger(__name__)


async def _nobody_to_tell() -> None:
    """For a node without a health service."""


class NodeAdminService(admin_pb2_grpc.NodeAdminServicer):
    """NodeAdmin over one node's shell.

    Attributes:
        on_drain: awaited when an operator drains the node, so that whoever asks for its health hears of it.
    """

    def __init__(self, shell: NodeShell, reach: NodeReach | None = None) -> None:
        """All operators act for the tenant of the gRPC door; without `reach`, the node tells of no transport."""
        self._shell = shell
        self._reach = reach or NodeReach()
        self._secret = secrets.token_bytes(32)
        self.on_drain: Callable[[], Awaitable[None]] = _nobody_to_tell

    # --- looking; the generated names are the wire's

    async def ListBlocks(  # noqa: N802
        self, request: admin_pb2.ListBlocksRequest, context: Context
    ) -> admin_pb2.ListBlocksResponse:
        """Visible blocks, a page."""
        _check_namespace(request.namespace)
        if len(request.key_prefix) > MAX_KEY_NBYTES:
            raise BadRequest(
                f"a key prefix of {len(request.key_prefix)} bytes",
                hint=f"a key has at most {MAX_KEY_NBYTES}",
            )
        filters = (b"blocks", request.namespace, request.key_prefix, b"%d" % request.leased_only)
        size = _page_size(request.page_size)
        behind = None
        if request.page_token:
            place = self._unseal(request.page_token, filters)
            behind = (place[:NAMESPACE_NBYTES], place[NAMESPACE_NBYTES:])
        state = self._shell.state
        self._shell.settled_now_s()
        listing = state.inspection.list_blocks(
            DEFAULT_TENANT,
            namespace=request.namespace,
            key_prefix=request.key_prefix,
            leased_only=request.leased_only,
            behind=behind,
            limit=size + 1,
        )
        while listing.step():  # noqa: ASYNC110  it waits for nothing, but lets others in
            await asyncio.sleep(0)
        names, has_more = listing.found[:size], len(listing.found) > size
        page = BlockPage(
            blocks=state.inspection.describe(DEFAULT_TENANT, names, self._shell.clock.now_s()),
            next_page_token=self._seal(b"".join(names[-1]), filters) if has_more else b"",
        )
        return admin_wire.block_page_to(page)

    async def ShowBlock(  # noqa: N802
        self, request: admin_pb2.ShowBlockRequest, context: Context
    ) -> admin_pb2.ShowBlockResponse:
        """One block; none of them, where it is not here."""
        _check_namespace(request.namespace)
        if not MIN_KEY_NBYTES <= len(request.key) <= MAX_KEY_NBYTES:
            raise BadRequest(
                f"a key of {len(request.key)} bytes",
                hint=f"give the whole key, {MIN_KEY_NBYTES} to {MAX_KEY_NBYTES} bytes",
            )
        now_s = self._shell.settled_now_s()
        shown = self._shell.state.inspection.show_block(
            DEFAULT_TENANT, request.namespace, request.key, now_s
        )
        return admin_wire.shown_to(shown)

    async def ListLeases(  # noqa: N802
        self, request: admin_pb2.ListLeasesRequest, context: Context
    ) -> admin_pb2.ListLeasesResponse:
        """Leases, a page."""
        kind = admin_wire.kind_from(request.kind)
        filters = (b"leases", b"%d" % request.kind, request.client.encode())
        size = _page_size(request.page_size)
        behind = 0
        if request.page_token:
            behind = int.from_bytes(self._unseal(request.page_token, filters), "little")
        leases = self._shell.state.inspection.list_leases(
            kind=kind,
            client=request.client,
            behind=behind,
            limit=size + 1,
            now_s=self._shell.settled_now_s(),
        )
        token = b""
        if len(leases) > size:
            token = self._seal(leases[size - 1].id.to_bytes(8, "little"), filters)
        return admin_wire.lease_page_to(LeasePage(leases=leases[:size], next_page_token=token))

    async def ListTransports(  # noqa: N802
        self, request: admin_pb2.ListTransportsRequest, context: Context
    ) -> admin_pb2.ListTransportsResponse:
        """How the node's memory can be reached."""
        return admin_wire.transports_to(self._reach.report(door=self._shell.state.door))

    # --- taking away

    async def RevokeLease(  # noqa: N802
        self, request: admin_pb2.RevokeLeaseRequest, context: Context
    ) -> admin_pb2.RevokeLeaseResponse:
        """Ends a lease as if its time had run out."""
        lease = self._shell.revoke_lease(LeaseId(request.lease_id))
        log.warning(
            "operator revoked a lease",
            **_who(context),
            lease=lease.id,
            kind=lease.kind.value,
            client=lease.client,
            blocks=lease.num_blocks,
            nbytes=lease.nbytes,
        )
        return admin_wire.revoked_to(lease)

    async def Evict(  # noqa: N802
        self, request: admin_pb2.EvictRequest, context: Context
    ) -> admin_pb2.EvictResponse:
        """Takes out blocks that nobody holds, or counts them."""
        keys = list(keys_from(request.keys))
        self._check_evict(request, len(keys))
        namespaces = (
            [request.namespace]
            if request.namespace
            else shards(self._shell.state.residence.index, DEFAULT_TENANT)
        )
        evicted = Evicted()
        try:
            async for piece in self._evict(namespaces, keys, request):
                evicted = evicted.plus(piece)
        finally:
            if not request.dry_run:
                log.warning(
                    "operator evicted blocks",
                    **_who(context),
                    namespace=request.namespace.hex() or "every",
                    keys="all" if request.all else [k.hex() for k in keys[:NUM_LOGGED_KEYS]],
                    asked=len(keys),
                    blocks=evicted.num_blocks,
                    nbytes=evicted.nbytes,
                    held=evicted.num_held,
                )
        return admin_wire.evicted_to(evicted)

    async def _evict(
        self, namespaces: Sequence[bytes], keys: Sequence[bytes], request: admin_pb2.EvictRequest
    ) -> AsyncIterator[Evicted]:
        """What became of the blocks, a piece at a time."""
        if request.all:
            for namespace in namespaces:
                scope = self._shell.state.residence.index.scope(DEFAULT_TENANT, namespace)
                # Latest first, so that children go before their parents.
                listed = list(scope.blocks)[::-1] if scope else []
                async for piece in self._evict_keys([namespace], listed, request.dry_run):
                    yield replace(piece, num_unknown=0)  # it went by itself meanwhile
        else:
            async for piece in self._evict_keys(namespaces, keys, request.dry_run):
                yield piece

    async def _evict_keys(
        self, namespaces: Sequence[bytes], keys: Sequence[bytes], dry_run: bool
    ) -> AsyncIterator[Evicted]:
        num_blocks = PIECE_KEYS if dry_run else EVICT_PIECE
        num_keys = max(1, num_blocks // max(1, len(namespaces)))  # a key may be in every shard
        for start in range(0, len(keys), num_keys):
            yield self._shell.evict(namespaces, keys[start : start + num_keys], dry_run=dry_run)
            await asyncio.sleep(0)

    def _check_evict(self, request: admin_pb2.EvictRequest, num_keys: int) -> None:
        _check_namespace(request.namespace)
        if bool(num_keys) is bool(request.all):
            raise BadRequest(
                f"an eviction of {num_keys} keys {'and' if request.all else 'and not'} of all blocks",
                hint="give keys, or say that all are meant",
            )
        max_keys = self._shell.state.limits.max_keys
        if num_keys > max_keys:
            raise LimitExceeded(f"{num_keys} keys in one call", hint=f"send at most {max_keys}")

    async def Drain(  # noqa: N802
        self, request: admin_pb2.DrainRequest, context: Context
    ) -> admin_pb2.DrainResponse:
        """No new leases from now on."""
        self._shell.drain()
        stat = self._shell.stat()
        log.warning(
            "operator drains the node",
            **_who(context),
            read_leases=stat.num_read_leases,
            write_leases=stat.num_write_leases,
        )
        await self.on_drain()
        return admin_pb2.DrainResponse(
            num_read_leases=stat.num_read_leases, num_write_leases=stat.num_write_leases
        )

    # --- pages

    def _seal(self, place: bytes, filters: tuple[bytes, ...]) -> bytes:
        return self._mac(place, filters) + place

    def _unseal(self, token: bytes, filters: tuple[bytes, ...]) -> bytes:
        seal, place = token[:SEAL_NBYTES], token[SEAL_NBYTES:]
        if not hmac.compare_digest(seal, self._mac(place, filters)):
            raise BadRequest(
                f"a page token of {len(token)} bytes is not of this node and these filters",
                hint="send the token of the answer before, with the same filters, or none to begin",
            )
        return place

    def _mac(self, place: bytes, filters: tuple[bytes, ...]) -> bytes:
        mac = hashlib.blake2b(key=self._secret, digest_size=SEAL_NBYTES)
        for part in (*filters, place):
            mac.update(len(part).to_bytes(4, "little"))
            mac.update(part)
        return mac.digest()


def _check_namespace(namespace: bytes) -> None:
    if namespace and len(namespace) != NAMESPACE_NBYTES:
        raise NamespaceMismatch(
            f"a namespace has {NAMESPACE_NBYTES} bytes, not {len(namespace)}",
            hint="send the layout's digest, or nothing for every shard",
        )


def _page_size(wished: int) -> int:
    if wished > MAX_PAGE_SIZE:
        raise LimitExceeded(f"a page of {wished}", hint=f"ask for at most {MAX_PAGE_SIZE}")
    return wished or DEFAULT_PAGE_SIZE


def _who(context: Context) -> dict[str, str]:
    """Who asks, for the log."""
    metadata = {str(key): value for key, value in context.invocation_metadata() or ()}
    return {"peer": context.peer(), "operator": str(metadata.get(CLIENT_HEADER, ""))[:128]}
