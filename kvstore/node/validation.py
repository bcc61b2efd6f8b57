"""Requests are checked whole, before anything is allocated for them.

Rules kept here: nothing here changes anything; what is wrong is said with its number and its limit. Key columns check
their own width and length where they are made (`KeyColumn`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from snowskin.kvstore.checksum import CHECKSUM_NBYTES
from snowskin.kvstore.errors import BadRequest, LimitExceeded, NamespaceMismatch
from snowskin.kvstore.messages import (
    CommitRequest,
    MatchRequest,
    ProbeRequest,
    ReleaseRequest,
    RenewRequest,
    Request,
    ReserveRequest,
)

if TYPE_CHECKING:
    from snowskin.kvstore.node.limits import NodeLimits
    from snowskin.kvstore.session import Session

NAMESPACE_NBYTES = 32
MAX_REQUEST_ID_NBYTES = 128


def check_request(request: Request, session: Session, limits: NodeLimits) -> None:
    """Raises what is wrong with `request`; returns where nothing is."""
    match request:
        case MatchRequest():
            if request.tail_request_id:
                _check_tail_id(request.tail_request_id)
                if len(request.keys):
                    raise BadRequest(
                        "a match asks for keys or for a tail, not for both", hint="send two matches"
                    )
                return
            _check_look_up(request, limits)
            if request.wait_blocks > len(request.keys):
                raise BadRequest(
                    f"wait_blocks is {request.wait_blocks}, but there are {len(request.keys)} keys",
                    hint="wait for at most as many blocks as keys",
                )
        case ProbeRequest():
            _check_look_up(request, limits)
        case ReserveRequest():
            _check_reserve(request, session, limits)
        case CommitRequest():
            if request.num_blocks < 1:
                raise BadRequest("a commit of no blocks", hint="commit at least one")
            if len(request.checksums) != request.num_blocks * CHECKSUM_NBYTES:
                raise BadRequest(
                    f"{len(request.checksums)} bytes of checksums for {request.num_blocks} blocks",
                    hint=f"give {CHECKSUM_NBYTES} bytes for each",
                )
        case RenewRequest():
            _check_count(len(request.lease_ids), limits.max_leases_per_session, "leases")
        case ReleaseRequest():
            _check_count(len(request.lease_ids), limits.max_leases_per_session, "leases")
            for complaint in request.complaints:
                _check_count(len(complaint.block_indices), limits.max_keys, "complaints")


def _check_look_up(request: MatchRequest | ProbeRequest, limits: NodeLimits) -> None:
    _check_namespaces(request.namespaces, limits)
    _check_num_keys(len(request.keys), limits)
    num_blocks = len(request.keys) * len(request.namespaces)
    _check_count(num_blocks, limits.max_match_blocks, "blocks (keys times namespaces)")


def _check_reserve(request: ReserveRequest, session: Session, limits: NodeLimits) -> None:
    if not session.may_write:
        raise BadRequest(
            f"session of {session.client_name!r} was opened for reading",
            hint="connect with write access",
        )
    if len(request.namespace) != NAMESPACE_NBYTES:
        raise NamespaceMismatch(
            f"a namespace has {NAMESPACE_NBYTES} bytes, not {len(request.namespace)}",
            hint="send the layout's digest",
        )
    if request.tail is not None:
        _check_tail_id(request.tail.request_id)
        if len(request.keys):
            raise BadRequest(
                "a reservation is of keys or of a tail, not of both", hint="reserve twice"
            )
        if request.tail.nbytes < 1:
            raise BadRequest("a tail of no bytes", hint="a prompt of full blocks has no tail")
        return
    if not len(request.keys):
        raise BadRequest("a reservation of no blocks", hint="send at least one key")
    _check_num_keys(len(request.keys), limits)
    if request.block_nbytes < 1:
        raise BadRequest("block_nbytes is 0", hint="send the layout's block size in bytes")
    if request.parent_key and len(request.parent_key) != request.keys.width:
        raise BadRequest(
            f"the parent key has {len(request.parent_key)} bytes, the column's keys {request.keys.width}",
            hint="send the key of the block before the first, of the same width, or none",
        )
    keys = set(request.keys)
    if len(keys) != len(request.keys):
        raise BadRequest("a key stands twice in the column", hint="send each block once")
    if request.parent_key in keys:
        # A block that is its own ancestor would never be a leaf, and never leave.
        raise BadRequest(
            "the parent key stands in the column too", hint="send the key before the first"
        )


def _check_tail_id(request_id: str) -> None:
    if not 1 <= len(request_id.encode()) <= MAX_REQUEST_ID_NBYTES:
        raise BadRequest(
            f"a tail's request id has {len(request_id.encode())} bytes",
            hint=f"use 1 to {MAX_REQUEST_ID_NBYTES}",
        )


def _check_namespaces(namespaces: tuple[bytes, ...], limits: NodeLimits) -> None:
    if not namespaces:
        raise BadRequest("no namespace given", hint="send the digest of at least one layout")
    _check_count(len(namespaces), limits.max_namespaces, "namespaces")
    for namespace in namespaces:
        if len(namespace) != NAMESPACE_NBYTES:
            raise NamespaceMismatch(
                f"a namespace has {NAMESPACE_NBYTES} bytes, not {len(namespace)}",
                hint="send the layout's digest",
            )


def _check_num_keys(num_keys: int, limits: NodeLimits) -> None:
    _check_count(num_keys, limits.max_keys, "keys")


def _check_count(count: int, limit: int, what: str) -> None:
    if count > limit:
        raise LimitExceeded(f"{count} {what} in one call", hint=f"send at most {limit}")
