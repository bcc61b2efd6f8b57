"""One connection to a local door, without I/O: requests become bytes, and bytes answers.

Rules kept here: nothing in this file waits. An answer belongs to a call that waits for it; a lease that comes when
nobody wants it any more is given back at once.
"""

from __future__ import annotations

from typing import Any

from snowskin.kvstore.errors import ProtocolViolation
from snowskin.kvstore.frames import FrameReader, frame
from snowskin.kvstore.messages import (
    WIRE_VERSION,
    AbortRequest,
    Access,
    Greeting,
    Lease,
    Matched,
    MatchRequest,
    ReleaseRequest,
    ReplyMessage,
    Request,
    Reserved,
    ReserveRequest,
)
from snowskin.kvstore.wire import detail_to_error, greeting_from, parse, reply_from, request_to
from snowskin.transport.errors import SnowskinError
from snowskin.v1 import door_pb2

Trace = tuple[tuple[str, str], ...]
Answer = tuple[int, "ReplyMessage | SnowskinError"]


class Conversation:
    """Calls and answers of one connection to a local door."""

    def __init__(self) -> None:
        """Nothing said yet."""
        self.greeting: Greeting | None = None
        self._reader = FrameReader()
        self._last_call_id = 0
        self._pending: dict[
            int, bool
        ] = {}  # unanswered calls, and whether they may wait inside the node

    def hello(self, client_name: str, access: Access) -> bytes:
        """The first thing to send."""
        request = door_pb2.DoorRequest(call_id=self._next_id())
        request.hello.wire_version = WIRE_VERSION
        request.hello.client_name = client_name
        request.hello.access = (
            door_pb2.POOL_ACCESS_WRITE if access is Access.WRITE else door_pb2.POOL_ACCESS_READ
        )
        self._pending[request.call_id] = False
        return frame(request.SerializeToString())

    def call(self, request: Request, request_id: str = "", trace: Trace = ()) -> tuple[int, bytes]:
        """(call id, what to send) of a call that wants an answer; `trace` as `tracing.outgoing`."""
        call_id = self._next_id()
        data = self._encode(call_id, request, request_id, trace)
        self._pending[call_id] = (
            isinstance(request, MatchRequest | ReserveRequest) and request.timeout_s > 0
        )
        return call_id, data

    def tell(self, request: Request, request_id: str = "") -> bytes:
        """What to send of a call that wants none."""
        return self._encode(0, request, request_id, ())

    def forget(self, call_id: int) -> bytes:
        """Nobody waits for this answer any more: what to send, empty where it came or comes soon by itself."""
        if not self._pending.pop(call_id, False):
            return b""
        # Left alone, it would keep its place in the node until its time is over; a reservation even the first.
        return frame(
            door_pb2.DoorRequest(cancel=door_pb2.Cancel(call_id=call_id)).SerializeToString()
        )

    def receive(self, data: bytes) -> tuple[list[Answer], list[bytes]]:
        """Answers that `data` completes, and what to send in turn."""
        answers: list[Answer] = []
        replies: list[bytes] = []
        for payload in self._reader.feed(data):
            response = parse(door_pb2.DoorResponse, payload)
            name = response.WhichOneof("response")
            if name is None:
                raise ProtocolViolation("the node answered in a way that this client does not know")
            if name == "hello":
                self.greeting = greeting_from(response.hello)
                self._pending.pop(response.call_id, None)
                continue
            answer: ReplyMessage | SnowskinError
            if name == "error":
                answer = detail_to_error(response.error)
                if response.call_id == 0:
                    raise answer  # it cuts us off
            else:
                node_id = self.greeting.node_id if self.greeting else ""
                answer = reply_from(name, getattr(response, name), node_id)
            if response.call_id in self._pending:
                del self._pending[response.call_id]
                answers.append((response.call_id, answer))
            elif (unwanted := giving_back(answer)) is not None:
                replies.append(self.tell(unwanted))
        return answers, replies

    def greeted(self, data: bytes) -> Greeting | None:
        """The greeting, once `data` completes it; raises what the node refused the session with."""
        for _, answer in self.receive(data)[0]:
            if isinstance(answer, SnowskinError):
                raise answer
        return self.greeting

    def _next_id(self) -> int:
        self._last_call_id = self._last_call_id % 0xFFFF_FFFF + 1
        return self._last_call_id

    def _encode(self, call_id: int, request: Request, request_id: str, trace: Trace) -> bytes:
        name, message = request_to(request)
        fields: dict[str, Any] = {name: message}  # a oneof: its name is known at run time
        envelope = door_pb2.DoorRequest(call_id=call_id, request_id=request_id, **fields)
        for header, said in trace:  # the fields have the headers' names
            setattr(envelope, header, said)
        return frame(envelope.SerializeToString())


def is_plain_release(request: Request) -> bool:
    """Whether all there is to say is that one read lease is done with: a release board can say it."""
    return (
        isinstance(request, ReleaseRequest)
        and not request.complaints
        and len(request.lease_ids) == 1
    )


def giving_back(answer: object) -> ReleaseRequest | AbortRequest | None:
    """The request that ends the lease which came with an answer; None where none came."""
    match answer:
        case Matched(lease=Lease() as lease):
            return ReleaseRequest(lease_ids=(lease.id,))
        case Reserved(lease=Lease() as lease):
            return AbortRequest(lease_id=lease.id)
    return None
