"""What a client does, without I/O: the steps of a publish and of a pull.

Rules kept here: nothing in this file waits. A *flow* (`publish`, `pull`) is a generator of steps; a driver does each
step and sends its result in, or throws its error in; so the asyncio and the blocking driver cannot differ in what they
do, only in how they wait. Whatever ends a flow, its lease is given back.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from snowskin.kvstore.checksum import CHECKSUM_NBYTES, RunningChecksums
from snowskin.kvstore.errors import (
    BadRequest,
    ChecksumMismatch,
    LeaseExpired,
    NamespaceMismatch,
    ProtocolViolation,
    TailUnknown,
)
from snowskin.kvstore.messages import (
    AbortRequest,
    CommitRequest,
    Committed,
    Complaint,
    Lease,
    Matched,
    MatchRequest,
    Probed,
    ProbeRequest,
    ReleaseRequest,
    ReplyMessage,
    Request,
    Reserved,
    ReserveRequest,
    Run,
    TailSpec,
    WakeReason,
)
from snowskin.kvstore.value import value
from snowskin.kvstore.wire import (
    EMPTY_KEYS,
)
from snowskin.transport.errors import SnowskinError
from snowskin.transport.runs import Run as TransferRun
from snowskin.transport.traffic import TrafficClass

if TYPE_CHECKING:
    from snowskin.kvstore.blocks import KeyColumn
    from snowskin.transport.api import Landed
    from snowskin.transport.memory import MemoryRegion


@value(kw_only=False)
class Call:
    """Step: ask the node; the result is its reply. `lease` is the one that the request is under."""

    request: Request
    timeout_s: float
    lease: Lease | None = None


@value(kw_only=False)
class Tell:
    """Step: say something that needs no answer; a failure to say it is not an error."""

    request: Request
    lease: Lease


@value(kw_only=False)
class Move:
    """Step: copy bytes under a lease. `runs` are in the order of the lease's blocks, by pool."""

    is_push: bool
    lease: Lease
    runs: list[tuple[int, list[TransferRun]]]
    local: MemoryRegion
    landed: Landed | None
    timeout_s: float
    traffic: TrafficClass


Step = Call | Tell | Move


@value(kw_only=False)
class Done:
    """Result of a step: the reply of a Call, when the step began and ended on the holder's clock."""

    reply: ReplyMessage | None
    began_at_s: float
    ended_at_s: float


@value()
class Published:
    """What a publish did; blocks that were there before, or that another writer committed first, moved nothing new."""

    num_blocks: int
    num_blocks_existing: int
    nbytes: int
    seconds: float


@value()
class Pulled:
    """What a pull brought: `num_blocks` good blocks, gapless from the first key.

    `corrupt_blocks` are indices of blocks whose bytes were not what was committed; the node was told.
    `first_byte_s` are the seconds from the call until bytes began to land, None where none did. `broken_by` is what
    ended the pull before all had come: what landed before it is good, and counted. `num_blocks_withheld` are at the
    node, right behind: no more could be leased at once.
    """

    num_blocks: int
    nbytes: int
    num_extents: int
    corrupt_blocks: tuple[int, ...]
    wake_reason: WakeReason
    seconds: float
    first_byte_s: float | None
    broken_by: SnowskinError | None = None
    num_blocks_withheld: int = 0


@value()
class PullBounds:
    """What a pull may take, where it is not as its client's other calls.

    Attributes:
        lookup_timeout_s: until the node says what it has, beyond the time that the look-up may wait inside it.
        move_timeout_s: for the copy.
        on_found: called when the node has said what it has and the copy begins; not called where it has nothing.
        traffic: how urgent the copy is.
    """

    lookup_timeout_s: float | None = None
    move_timeout_s: float | None = None
    on_found: Callable[[], None] | None = None
    traffic: TrafficClass = TrafficClass.DECODE_CRITICAL


AS_THE_CLIENT = PullBounds()

PublishFlow = Generator[Step, Done, Published]
PullFlow = Generator[Step, Done, Pulled]
DiscardFlow = Generator[Step, Done, int]


@value()
class FlowSettings:
    """What flows need to know of their client."""

    verify: bool
    call_timeout_s: float
    move_timeout_s: float
    read_ttl_s: float
    write_ttl_s: float


def publish(
    settings: FlowSettings,
    *,
    namespace: bytes,
    keys: KeyColumn,
    parent_key: bytes,
    block_nbytes: int,
    local: MemoryRegion,
    local_offsets: Sequence[int],
    one_reader: bool,
    timeout_s: float,
    traffic: TrafficClass = TrafficClass.DECODE_CRITICAL,
) -> PublishFlow:
    """Reserve what is new, copy it with checksums, commit it."""
    if len(local_offsets) != len(keys):
        raise BadRequest(f"{len(local_offsets)} local offsets for {len(keys)} blocks")
    request = ReserveRequest(
        namespace=namespace,
        keys=keys,
        parent_key=parent_key,
        block_nbytes=block_nbytes,
        one_reader=one_reader,
        ttl_s=settings.write_ttl_s,
        timeout_s=timeout_s,
    )
    return (
        yield from _publish(
            settings, request, list(keys), block_nbytes, local, local_offsets, traffic
        )
    )


def publish_tail(
    settings: FlowSettings,
    *,
    namespace: bytes,
    tail_id: str,
    local: MemoryRegion,
    local_offset: int,
    nbytes: int,
    timeout_s: float,
    traffic: TrafficClass = TrafficClass.DECODE_CRITICAL,
) -> PublishFlow:
    """The same for the last, partial block of a request."""
    request = ReserveRequest(
        namespace=namespace,
        keys=EMPTY_KEYS,
        tail=TailSpec(request_id=tail_id, nbytes=nbytes),
        ttl_s=settings.write_ttl_s,
        timeout_s=timeout_s,
    )
    names = [tail_id.encode()]
    if not tail_id:
        raise BadRequest("a tail without an id", hint="give the request's id")
    return (yield from _publish(settings, request, names, nbytes, local, [local_offset], traffic))


def _publish(
    settings: FlowSettings,
    request: ReserveRequest,
    names: list[bytes],
    block_nbytes: int,
    local: MemoryRegion,
    local_offsets: Sequence[int],
    traffic: TrafficClass,
) -> PublishFlow:
    asked = yield Call(request, settings.call_timeout_s + request.timeout_s)
    reserved = asked.reply
    assert isinstance(reserved, Reserved), "the reply to a Reserve is Reserved"
    lease = reserved.lease
    if lease is None:
        return Published(
            num_blocks=0,
            num_blocks_existing=len(names),
            nbytes=0,
            seconds=asked.ended_at_s - asked.began_at_s,
        )
    try:
        order = [
            index
            for run in reserved.runs
            for index in range(run.first_block_index, run.first_block_index + run.num_blocks)
        ]
        sums = RunningChecksums(local.buffer, block_nbytes)
        moves = _transfer_runs(reserved.runs, block_nbytes, local_offsets)
        yield Move(True, lease, moves, local, sums.landed, settings.move_timeout_s, traffic)
        new_names = b"".join([names[index] for index in order])
        checksums = sums.records(request.namespace, new_names, len(names[0])).tobytes()
        commit = CommitRequest(lease_id=lease.id, num_blocks=len(order), checksums=checksums)
        answered = yield Call(commit, settings.call_timeout_s, lease)
    except BaseException:
        yield Tell(AbortRequest(lease_id=lease.id), lease)
        raise
    committed = answered.reply
    assert isinstance(committed, Committed), "the reply to a Commit is Committed"
    lost = len(committed.existing_block_indices)
    return Published(
        num_blocks=len(order) - lost,
        num_blocks_existing=len(names) - len(order) + lost,
        nbytes=len(order) * block_nbytes,
        seconds=answered.ended_at_s - asked.began_at_s,
    )


class Names(NamedTuple):
    """What checksums are tied to: a packed column of keys, or one tail's id."""

    packed: bytes
    width: int


def pull(
    settings: FlowSettings,
    *,
    namespace: bytes,
    keys: KeyColumn,
    block_nbytes: int,
    local: MemoryRegion,
    local_offsets: Sequence[int],
    wait_blocks: int,
    timeout_s: float,
    bounds: PullBounds = AS_THE_CLIENT,
) -> PullFlow:
    """Lease the longest committed run, copy it, verify it, release it."""
    request = MatchRequest(
        namespaces=(namespace,),
        keys=keys,
        max_blocks=len(local_offsets),
        ttl_s=settings.read_ttl_s,
        wait_blocks=wait_blocks,
        timeout_s=timeout_s,
    )
    if not local_offsets:
        raise BadRequest("a pull into no blocks", hint="give a local offset for each block")
    return (
        yield from _pull(
            settings,
            request,
            namespace,
            Names(keys.packed, keys.width),
            block_nbytes,
            local,
            local_offsets,
            bounds,
        )
    )


def pull_tail(
    settings: FlowSettings,
    *,
    namespace: bytes,
    tail_id: str,
    nbytes: int,
    local: MemoryRegion,
    local_offset: int,
    timeout_s: float,
    bounds: PullBounds = AS_THE_CLIENT,
) -> PullFlow:
    """The same for a tail; one that is not there raises TailUnknown, one that is corrupt ChecksumMismatch."""
    request = MatchRequest(
        namespaces=(namespace,),
        keys=EMPTY_KEYS,
        ttl_s=settings.read_ttl_s,
        wait_blocks=1 if timeout_s > 0 else 0,
        timeout_s=timeout_s,
        tail_request_id=tail_id,
    )
    if not tail_id:
        raise BadRequest("a tail without an id", hint="give the request's id")
    name = tail_id.encode()
    names = Names(name, len(name))
    pulled = yield from _pull(
        settings, request, namespace, names, nbytes, local, [local_offset], bounds
    )
    if pulled.corrupt_blocks:
        raise ChecksumMismatch(
            f"the tail of request {tail_id!r} is not what was committed", hint="compute it again"
        )
    return pulled


def discard(
    settings: FlowSettings, *, namespace: bytes, keys: KeyColumn = EMPTY_KEYS, tail_id: str = ""
) -> DiscardFlow:
    """Reads nothing of what was left for one reader, so that it goes; how many blocks that were.

    Of blocks that stay anyway this is a harmless touch. Blocks that another reader took, or that never came, are
    passed over.
    """
    num_blocks = 0
    if keys:
        asked = yield Call(
            ProbeRequest(namespaces=(namespace,), keys=keys), settings.call_timeout_s
        )
        assert isinstance(asked.reply, Probed), "the reply to a Probe is Probed"
        present = int.from_bytes(asked.reply.present_bitmap, "little")
        for is_here, run in groupby(range(len(keys)), lambda index: present >> index & 1):
            if is_here:
                first, *rest = run
                keys_of_run = keys[first : first + 1 + len(rest)]
                request = MatchRequest(namespaces=(namespace,), keys=keys_of_run)
                num_blocks += yield from _discard_run(settings, request)
    if tail_id:
        request = MatchRequest(namespaces=(namespace,), keys=EMPTY_KEYS, tail_request_id=tail_id)
        try:
            num_blocks += yield from _discard_run(settings, request)
        except TailUnknown:
            return num_blocks
    return num_blocks


def _discard_run(settings: FlowSettings, request: MatchRequest) -> DiscardFlow:
    num_blocks = 0
    while True:
        asked = yield Call(request, settings.call_timeout_s)
        matched = asked.reply
        assert isinstance(matched, Matched), "the reply to a Match is Matched"
        num_blocks += matched.num_blocks
        if matched.lease is None:
            return num_blocks
        release = ReleaseRequest(lease_ids=(matched.lease.id,))
        if not matched.num_blocks_withheld:
            yield Tell(release, matched.lease)
            return num_blocks
        # What it withheld can be asked for when this has surely been heard.
        yield Call(release, settings.call_timeout_s, matched.lease)
        request = replace(request, keys=request.keys[matched.num_blocks :])


def _pull(
    settings: FlowSettings,
    request: MatchRequest,
    namespace: bytes,
    names: Names,
    block_nbytes: int,
    local: MemoryRegion,
    local_offsets: Sequence[int],
    bounds: PullBounds,
) -> PullFlow:
    lookup_timeout_s = _or(bounds.lookup_timeout_s, settings.call_timeout_s)
    asked = yield Call(request, lookup_timeout_s + request.timeout_s)
    matched = asked.reply
    assert isinstance(matched, Matched), "the reply to a Match is Matched"
    lease, num_blocks = matched.lease, matched.num_blocks
    if lease is None:
        return _nothing(matched, asked.ended_at_s - asked.began_at_s)
    if bounds.on_found is not None:
        bounds.on_found()
    wrong: tuple[int, ...] = ()
    num_good, broken_by, ended_at_s = num_blocks, None, asked.ended_at_s
    try:
        moves = _transfer_runs(matched.runs, block_nbytes, local_offsets)
        if num_blocks != sum(run.num_blocks for run in matched.runs) or not matched.checksums:
            raise ProtocolViolation(f"the node's runs or checksums are not of {num_blocks} blocks")
        sums = RunningChecksums(local.buffer, block_nbytes) if settings.verify else None
        move_timeout_s = _or(bounds.move_timeout_s, settings.move_timeout_s)
        landed = sums.landed if sums else None
        try:
            moved = yield Move(False, lease, moves, local, landed, move_timeout_s, bounds.traffic)
            ended_at_s = moved.ended_at_s
        except SnowskinError as error:
            if sums is None or not sums.num_passed:
                raise
            num_good, broken_by = sums.num_passed, error
        if sums is not None:
            packed = names.packed[: num_good * names.width]
            expected = matched.checksums[0][: num_good * CHECKSUM_NBYTES]
            wrong = tuple(sums.mismatches(namespace, packed, names.width, expected))
        elif ended_at_s > asked.began_at_s + lease.ttl_s:
            raise LeaseExpired("the read lease ran out during the copy", hint="pull again")
    finally:
        complaints = (Complaint(lease_id=lease.id, block_indices=wrong),) if wrong else ()
        released = yield Tell(ReleaseRequest(lease_ids=(lease.id,), complaints=complaints), lease)
    if broken_by is not None:
        ended_at_s = released.ended_at_s
    num_withheld = 0 if wrong or broken_by else matched.num_blocks_withheld
    if num_withheld:
        # Who asks for the rest must not be told that the lease of before is in the way: what was said is heard now.
        try:
            yield Call(ReleaseRequest(lease_ids=(lease.id,)), lookup_timeout_s, lease)
        except SnowskinError as error:
            num_withheld, broken_by = 0, error
    return Pulled(
        num_blocks=wrong[0] if wrong else num_good,
        nbytes=num_good * block_nbytes,
        num_extents=len(matched.runs),
        corrupt_blocks=wrong,
        wake_reason=matched.wake_reason,
        seconds=ended_at_s - asked.began_at_s,
        first_byte_s=asked.ended_at_s - asked.began_at_s,
        broken_by=broken_by,
        num_blocks_withheld=num_withheld,
    )


def _nothing(matched: Matched, seconds: float) -> Pulled:
    return Pulled(
        num_blocks=0,
        nbytes=0,
        num_extents=0,
        corrupt_blocks=(),
        wake_reason=matched.wake_reason,
        seconds=seconds,
        first_byte_s=None,
    )


def _or(seconds: float | None, default_s: float) -> float:
    return default_s if seconds is None else seconds


def _transfer_runs(
    runs: Sequence[Run], block_nbytes: int, local_offsets: Sequence[int]
) -> list[tuple[int, list[TransferRun]]]:
    """What to copy, in order, by pool; neighbours on both sides become one."""
    side_by_side = isinstance(local_offsets, range) and local_offsets.step == block_nbytes
    moves: list[tuple[int, list[TransferRun]]] = []
    next_index = 0
    for run in runs:
        extent = run.extent
        if run.first_block_index < next_index or run.num_blocks < 1:
            raise ProtocolViolation("the node's runs are not in prefix order")
        next_index = run.first_block_index + run.num_blocks
        if next_index > len(local_offsets):
            raise ProtocolViolation(
                f"a run of the node's reaches to block {next_index} of {len(local_offsets)}"
            )
        if extent.nbytes != run.num_blocks * block_nbytes:
            raise NamespaceMismatch(
                f"an extent of {extent.nbytes} bytes for {run.num_blocks} blocks of {block_nbytes}",
                hint="two layouts must have two namespaces",
            )
        if not moves or moves[-1][0] != extent.pool_id:
            moves.append((extent.pool_id, []))
        pieces = moves[-1][1]
        if side_by_side:
            pieces.append(
                TransferRun(extent.offset, local_offsets[run.first_block_index], extent.nbytes)
            )
            continue
        for position in range(run.num_blocks):
            pieces.append(
                TransferRun(
                    extent.offset + position * block_nbytes,
                    local_offsets[run.first_block_index + position],
                    block_nbytes,
                )
            )
    return moves
