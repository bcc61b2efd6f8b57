"""Requests that cannot be meant are refused, with the number that is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest

from snowskin.kvstore.errors import BadRequest, LimitExceeded, NamespaceMismatch
from snowskin.kvstore.messages import (
    AbortRequest,
    CommitRequest,
    Complaint,
    LeaseId,
    ProbeRequest,
    ReleaseRequest,
    RenewRequest,
    Request,
    SessionId,
    StatRequest,
    TailSpec,
)
from snowskin.kvstore.node.limits import NodeLimits
from snowskin.kvstore.node.validation import check_request
from snowskin.kvstore.session import Session
from tests.support.node_driver import (
    NAMESPACE,
    column,
    key,
    matching,
    matching_tail,
    reserving,
    reserving_tail,
)

LIMITS = NodeLimits(max_keys=3, max_namespaces=2, max_match_blocks=5, max_leases_per_session=2)
WRITER = Session(id=SessionId(1), client_name="w", maps_memory=True)
LEASES = (LeaseId(1), LeaseId(2), LeaseId(3))

GOOD: list[Request] = [
    reserving("a b c"),
    reserving("b", parent="a"),
    reserving_tail("r" * 128),
    matching("a b c", wait_blocks=3),
    matching("", namespaces=(NAMESPACE, NAMESPACE)),
    matching_tail("r"),
    ProbeRequest(namespaces=(NAMESPACE,), keys=column("a")),
    CommitRequest(lease_id=LeaseId(1), num_blocks=2, checksums=bytes(8)),
    AbortRequest(lease_id=LeaseId(1)),
    RenewRequest(lease_ids=LEASES[:2], ttl_s=1.0),
    ReleaseRequest(lease_ids=LEASES[:2]),
    StatRequest(),
]
BAD: list[tuple[Request, type[BadRequest], str]] = [
    (reserving(""), BadRequest, "no blocks"),
    (reserving("a b c d"), LimitExceeded, "4 keys"),
    (reserving("a", namespace=b"short"), NamespaceMismatch, "32 bytes, not 5"),
    (reserving("a", namespace=b""), NamespaceMismatch, "not 0"),
    (reserving("a", block_nbytes=0), BadRequest, "block_nbytes is 0"),
    (reserving("a b a"), BadRequest, "twice"),
    (reserving("a b", parent="b"), BadRequest, "parent key stands in the column"),
    (replace(reserving("a"), parent_key=b"short"), BadRequest, "parent key has 5 bytes"),
    (reserving_tail(""), BadRequest, "id has 0 bytes"),
    (reserving_tail("ä" * 65), BadRequest, "id has 130 bytes"),
    (reserving_tail("r", nbytes=0), BadRequest, "tail of no bytes"),
    (
        replace(reserving("a"), tail=TailSpec(request_id="r", nbytes=1)),
        BadRequest,
        "not of both",
    ),
    (matching("a", namespaces=()), BadRequest, "no namespace"),
    (matching("a", namespaces=(NAMESPACE,) * 3), LimitExceeded, "3 namespaces"),
    (matching("a", namespaces=(b"x" * 33,)), NamespaceMismatch, "not 33"),
    (matching("a b c d"), LimitExceeded, "4 keys"),
    (matching("a b c", namespaces=(NAMESPACE,) * 2), LimitExceeded, "6 blocks"),
    (matching("a", wait_blocks=2), BadRequest, "wait_blocks is 2"),
    (matching_tail("r" * 129), BadRequest, "129 bytes"),
    (replace(matching_tail("r"), keys=column("a")), BadRequest, "not for both"),
    (ProbeRequest(namespaces=(NAMESPACE,) * 2, keys=column("a b c")), LimitExceeded, "6 blocks"),
    (ProbeRequest(namespaces=(), keys=column("a")), BadRequest, "no namespace"),
    (
        ProbeRequest(namespaces=(NAMESPACE,), keys=column("a b c d")),
        LimitExceeded,
        "at most 3",
    ),
    (
        CommitRequest(lease_id=LeaseId(1), num_blocks=0, checksums=b""),
        BadRequest,
        "no blocks",
    ),
    (
        CommitRequest(lease_id=LeaseId(1), num_blocks=2, checksums=bytes(7)),
        BadRequest,
        "7 bytes of checksums for 2",
    ),
    (RenewRequest(lease_ids=LEASES, ttl_s=1.0), LimitExceeded, "3 leases"),
    (ReleaseRequest(lease_ids=LEASES), LimitExceeded, "3 leases"),
    (
        ReleaseRequest(
            lease_ids=(), complaints=(Complaint(lease_id=LeaseId(1), block_indices=(0,) * 4),)
        ),
        LimitExceeded,
        "4 complaints",
    ),
]


@pytest.mark.parametrize("request_", GOOD, ids=lambda request: type(request).__name__)
def test_what_can_be_meant_passes(request_):
    check_request(request_, WRITER, LIMITS)


@pytest.mark.parametrize(("request_", "kind", "words"), BAD, ids=[words for _, _, words in BAD])
def test_what_cannot_be_meant_is_refused_with_its_number(request_, kind, words):
    with pytest.raises(kind) as refused:
        check_request(request_, WRITER, LIMITS)
    assert type(refused.value) is kind
    assert words in str(refused.value)


def test_session_for_reading_may_do_all_but_reserve():
    reader = replace(WRITER, may_write=False)
    for request in GOOD:
        if type(request) is type(reserving("a")):
            with pytest.raises(BadRequest, match="opened for reading"):
                check_request(request, reader, LIMITS)
        else:
            check_request(request, reader, LIMITS)


def test_parent_has_the_width_of_the_column():
    request = replace(reserving("b"), parent_key=key("a")[:16])
    with pytest.raises(BadRequest, match="16 bytes, the column's keys 32"):
        check_request(request, WRITER, LIMITS)
