"""One large request over several paths: cut into stripes, handed out to whoever is free.

Rules kept here: every byte is landed exactly once; a lane (one connection on one path) takes its
next stripe from one shared queue, so that the faster lanes carry more; what a lost lane did not
land goes back to the front of the queue; the request ends while at least one path lives, and raises
PeerLost otherwise. Pure: the caller brings the time. Not for several threads at once: the
caller's lock guards it together with its `PathSet`.

How a reader drives it:

    stripes = Stripes(runs, paths)
    while not stripes.is_done:
        for lane in stripes.lanes_to_open(now_s):   # raises PeerLost; ask again after each loss
            connect from paths.path(lane.path).local_address to .remote_address, shake hands,
            paths.reached(lane.path); then, in each lane's thread or task:
                stripe = stripes.take(lane, now_s)  # None: nothing to do now; wait for a change
                ask the owner for stripe.runs; for each piece that came whole, in order:
                    if stripes.landed(stripe, nbytes, now_s):   # False: lane was lost; drop it
                        tell the caller's `landed`
            a lane may take the next stripe before the last one landed (keeps the wire busy);
            on an error, CLOSE its connection, then stripes.lost(lane, now_s)
        for lane in stripes.stalled(now_s):         # next asked at stripes.next_stall_at_s()
            CLOSE its connection, then stripes.lost(lane, now_s)
    stripes.close()                                 # always: also after a deadline or an error

Runs of one stripe land in order, stripes in any. A lane may only be lost after its connection was
closed and its receiving thread or task has stopped writing: from then on others write there.

Stripes are cut when they are taken: at most `stripe_nbytes`, in the order of the runs, at multiples
of `piece_nbytes` from a run's start, and smaller towards the end and on slower lanes (guided
self-scheduling, Polychronopoulos & Kuck 1987), so that all lanes end at nearly the same time.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from snowskin.transport.errors import PeerLost
from snowskin.transport.runs import Run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from snowskin.transport.paths import Path, PathSet

STRIPED_FROM_NBYTES = 4 << 20  # below, a second connection costs more than it gains
STRIPE_NBYTES = 16 << 20
PIECE_NBYTES = 1 << 20
MAX_STRIPE_RUNS = 1024
STALL_S = 1.0


class Lane(NamedTuple):
    """One connection of a request: the path's name, and which of its streams."""

    path: str
    stream: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stripe:
    """A part of a request, on its way over one lane; `runs` are in the order of the request."""

    index: int
    lane: Lane
    runs: tuple[Run, ...]
    nbytes: int


@dataclass(slots=True)
class _OpenLane:
    moved_at_s: float  # last movement, or when it was given work after having had none
    proven_at_s: float = -math.inf  # last bytes, or the handshake: the peer answered here
    waiting: dict[int, Stripe] = field(default_factory=dict)
    landed_nbytes: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class _OnPath:
    first_taken_at_s: float
    num_streams: int
    landed_nbytes: int = 0
    landed_at_s: float = -math.inf


class Stripes:
    """The stripes of one request; see the rules above."""

    def __init__(
        self,
        runs: Sequence[Run],
        paths: PathSet,
        *,
        stripe_nbytes: int = STRIPE_NBYTES,
        piece_nbytes: int = PIECE_NBYTES,
        max_stripe_runs: int = MAX_STRIPE_RUNS,
        striped_from_nbytes: int = STRIPED_FROM_NBYTES,
        stall_s: float = STALL_S,
        num_streams: int = 0,
    ) -> None:
        """Nothing taken yet. `runs` are checked (`check_bounds`) and joined by the caller.

        Args:
            runs: of the request, at least one byte each.
            paths: to the peer; what this request learns of them stays there.
            stripe_nbytes: of the largest stripe.
            piece_nbytes: of the smallest stripe that is cut, and where runs may be cut.
            max_stripe_runs: what one request to the owner may hold.
            striped_from_nbytes: smaller requests use one lane of one path.
            stall_s: a lane that moves nothing for so long, while others do, is given up.
            num_streams: of each path; 0 = what the path is worth, by what was measured.
        """
        if min(stripe_nbytes, piece_nbytes, max_stripe_runs) < 1 or stall_s <= 0:
            raise ValueError("stripes, pieces and runs of at least 1, and a stall above 0 s")
        self._paths = paths
        self._queue: deque[Run] = deque(runs)
        self._queued_nbytes = self.nbytes = sum(run.nbytes for run in runs)
        self._stripe_nbytes = max(stripe_nbytes, piece_nbytes)
        self._piece_nbytes = piece_nbytes
        self._max_stripe_runs = max_stripe_runs
        self._is_striped = self.nbytes >= striped_from_nbytes
        self._stall_s = stall_s
        self._wanted_streams = num_streams
        self._open: dict[Lane, _OpenLane] = {}
        self._lost: set[Lane] = set()
        self._forgiven: set[Lane] = set()
        self._num_streams: dict[str, int] = {}
        self._on_path: dict[str, _OnPath] = {}
        self._num_stripes = 0
        self._is_closed = False
        self.landed_nbytes = 0

    @property
    def is_done(self) -> bool:
        """Whether all bytes landed."""
        return self.landed_nbytes == self.nbytes

    @property
    def open_lanes(self) -> tuple[Lane, ...]:
        """Lanes that were handed out and not lost."""
        return tuple(self._open)

    def is_open(self, lane: Lane) -> bool:
        """Whether this lane may still take stripes."""
        return lane in self._open

    def lanes_to_open(self, now_s: float) -> tuple[Lane, ...]:
        """Lanes to be connected now, each told once; empty while those that are open are enough.

        Raises:
            PeerLost: bytes are missing, no lane is open and no path may be tried now.
        """
        if self.is_done or self._is_closed:
            return ()
        wanted = self._wanted_lanes()
        for path in self._paths.due(now_s):
            self._paths.tried(path.name, now_s)
            self._lost -= {lane for lane in self._lost if lane.path == path.name}
            wanted.append(Lane(path.name, 0))
        fresh = tuple(lane for lane in wanted if lane not in self._open and lane not in self._lost)
        if not fresh and all(self._stands_still(state, now_s) for state in self._open.values()):
            fresh = self._unused_lanes()
        for lane in fresh:
            self._open[lane] = _OpenLane(moved_at_s=now_s)
        if not self._open:
            raise self._no_path_left(now_s)
        return fresh

    def reached(self, lane: Lane, now_s: float) -> None:
        """The connection of this lane stands and the peer answered on it: the path lives."""
        state = self._open.get(lane)
        if state is not None:
            state.proven_at_s = now_s
            self._paths.reached(lane.path)

    def take(self, lane: Lane, now_s: float) -> Stripe | None:
        """The next stripe for this lane, or None: nothing is queued now, or the lane was lost.

        Call it when the lane is connected. After None, wait until another lane is lost, a lane is
        done or the request is: what others fail to land is queued again.
        """
        state = self._open.get(lane)
        if state is None or not self._queue:
            return None
        runs = self._cut(self._wanted_nbytes(lane))
        stripe = Stripe(
            index=self._num_stripes, lane=lane, runs=runs, nbytes=sum(run.nbytes for run in runs)
        )
        self._num_stripes += 1
        if not state.waiting:
            state.moved_at_s = now_s
        state.waiting[stripe.index] = stripe
        state.landed_nbytes[stripe.index] = 0
        on_path = self._on_path.setdefault(
            lane.path, _OnPath(first_taken_at_s=now_s, num_streams=0)
        )
        on_path.num_streams = max(
            on_path.num_streams, sum(other.path == lane.path for other in self._open)
        )
        self._paths.in_flight(lane.path, stripe.nbytes)
        return stripe

    def landed(self, stripe: Stripe, nbytes: int, now_s: float) -> bool:
        """The next `nbytes` of this stripe are in their place, and valid.

        False where its lane was lost before: then these bytes do not count, others bring them.
        """
        state = self._open.get(stripe.lane)
        if state is None or stripe.index not in state.waiting:
            return False
        landed_nbytes = state.landed_nbytes[stripe.index] + nbytes
        if nbytes < 1 or landed_nbytes > stripe.nbytes:
            raise ValueError(f"{nbytes} bytes landed, {landed_nbytes} of {stripe.nbytes} in all")
        state.landed_nbytes[stripe.index] = landed_nbytes
        state.moved_at_s = state.proven_at_s = now_s
        self.landed_nbytes += nbytes
        self._paths.landed(stripe.lane.path, nbytes)
        self._forgiven.discard(stripe.lane)
        on_path = self._on_path[stripe.lane.path]
        on_path.landed_nbytes += nbytes
        on_path.landed_at_s = now_s
        if landed_nbytes == stripe.nbytes:
            del state.waiting[stripe.index], state.landed_nbytes[stripe.index]
        if self.is_done:
            self._measure()
        return True

    def lost(self, lane: Lane, now_s: float, *, was_stale: bool = False) -> None:
        """The connection of this lane is closed, and nothing of it lands any more.

        What it did not land is queued again, before all else. With its last lane, a path has
        failed, and is left alone for a while.

        Args:
            lane: as told by `lanes_to_open`; one that was lost already is ignored.
            now_s: monotonic.
            was_stale: it had been kept open from an earlier request and the peer had ended it:
                the path is not blamed, and the lane is offered anew. Once: without a byte landed
                in between, the second time is a failure.
        """
        if self._open.get(lane) is None:
            return
        self._requeue(lane)
        if was_stale and lane not in self._forgiven:
            self._forgiven.add(lane)
            return
        self._lost.add(lane)
        if not any(other.path == lane.path for other in self._open):
            self._paths.failed(lane.path, now_s)

    def failed(self, path: str, now_s: float) -> None:
        """A whole path is gone, and all its connections are closed: as `lost` for all its lanes."""
        lanes = [lane for lane in self._open if lane.path == path]
        for lane in reversed(lanes):
            self._requeue(lane)
            self._lost.add(lane)
        self._paths.failed(path, now_s)

    def stalled(self, now_s: float) -> tuple[Lane, ...]:
        """Lanes that hold stripes and moved nothing for `stall_s`, while another lane could.

        That is: another one landed bytes since, or has proven that it can and is idle. Nothing is
        changed by asking: close the connection of each, then say `lost`. Where all lanes stand
        still, `lanes_to_open` tells paths that were not used yet; where those do not answer
        either, it is the peer, and the deadline's matter.
        """
        return tuple(
            lane
            for lane, state in self._open.items()
            if self._stands_still(state, now_s)
            and any(
                other.proven_at_s > state.moved_at_s
                or (other.proven_at_s > -math.inf and not other.waiting)
                for other in self._open.values()
                if other is not state
            )
        )

    def next_look_at_s(self, now_s: float) -> float:
        """When `lanes_to_open` and `stalled` are worth asking though nothing happened; later."""
        stalls_s = (
            state.moved_at_s + self._stall_s for state in self._open.values() if state.waiting
        )
        soonest_s = min(*stalls_s, self._paths.retry_at_s(), now_s + self._stall_s)
        return soonest_s if soonest_s > now_s else now_s + self._stall_s / 4

    def close(self) -> None:
        """Gives up what has not landed, without blame; idempotent. Its connections are closed."""
        self._is_closed = True
        for lane in tuple(self._open):
            self._requeue(lane)

    def _wanted_lanes(self) -> list[Lane]:
        """Of every living path as many streams as its part is worth; one lane for small requests."""
        if not self._is_striped:
            path = None if self._open else self._paths.least_busy()
            self._forget_lost(path)
            return [] if path is None else [Lane(path.name, 0)]
        alive = self._paths.alive()
        total_bytes_per_s = sum(self._paths.bytes_per_s(path.name) for path in alive)
        lanes = []
        for path in alive:
            self._forget_lost(path)
            if path.name not in self._num_streams:
                part = self._paths.bytes_per_s(path.name) / total_bytes_per_s
                self._num_streams[path.name] = self._wanted_streams or self._paths.num_streams(
                    path.name, int(self.nbytes * part)
                )
            lanes += [Lane(path.name, stream) for stream in range(self._num_streams[path.name])]
        lanes.sort(key=lambda lane: lane.stream)
        return lanes[: max(1, self.nbytes // self._piece_nbytes)]

    def _unused_lanes(self) -> tuple[Lane, ...]:
        """Of every living path of either group that has no lane here, the first stream."""
        used = {lane.path for lane in self._open}
        return tuple(
            Lane(path.name, 0)
            for path in self._paths.paths
            if path.name not in used and self._paths.is_alive(path.name)
        )

    def _stands_still(self, state: _OpenLane, now_s: float) -> bool:
        return bool(state.waiting) and now_s - state.moved_at_s >= self._stall_s

    def _forget_lost(self, path: Path | None) -> None:
        """A living path without an open lane was proven by another request: all of it again."""
        if path is not None and not any(lane.path == path.name for lane in self._open):
            self._lost -= {lane for lane in self._lost if lane.path == path.name}

    def _wanted_nbytes(self, lane: Lane) -> int:
        """Half of this lane's fair part of what is queued, between a piece and a stripe."""
        if len(self._open) == 1:
            return self._stripe_nbytes
        per_lane = {
            path: self._bytes_per_s(path) / sum(other.path == path for other in self._open)
            for path in {other.path for other in self._open}
        }
        fair_part = per_lane[lane.path] / sum(per_lane[other.path] for other in self._open)
        wanted_nbytes = int(self._queued_nbytes * fair_part / 2)
        wanted_nbytes -= wanted_nbytes % self._piece_nbytes
        return min(max(wanted_nbytes, self._piece_nbytes), self._stripe_nbytes)

    def _bytes_per_s(self, path: str) -> float:
        """As measured in this request once a stripe's worth moved; what is known of it before."""
        on_path = self._on_path.get(path)
        if on_path is not None and on_path.landed_nbytes >= self._stripe_nbytes:
            seconds = on_path.landed_at_s - on_path.first_taken_at_s
            if seconds > 0:
                return on_path.landed_nbytes / seconds
        return self._paths.bytes_per_s(path)

    def _cut(self, wanted_nbytes: int) -> tuple[Run, ...]:
        """Takes runs from the front of the queue, the last one cut at a multiple of a piece."""
        runs: list[Run] = []
        nbytes = 0
        while self._queue and len(runs) < self._max_stripe_runs and nbytes < wanted_nbytes:
            run = self._queue.popleft()
            room = wanted_nbytes - nbytes
            if run.nbytes > room:
                room -= room % self._piece_nbytes
                if room == 0 and runs:
                    self._queue.appendleft(run)
                    break
                room = max(room, min(self._piece_nbytes, run.nbytes))
                if room < run.nbytes:
                    self._queue.appendleft(_behind(run, room))
                    run = run._replace(nbytes=room)
            runs.append(run)
            nbytes += run.nbytes
        self._queued_nbytes -= nbytes
        return tuple(runs)

    def _requeue(self, lane: Lane) -> None:
        """Closes the lane; what it had not landed goes to the front, in its order."""
        state = self._open.pop(lane)
        rest: list[Run] = []
        for index, stripe in sorted(state.waiting.items()):
            skip = state.landed_nbytes[index]
            self._paths.in_flight(lane.path, skip - stripe.nbytes)
            for run in stripe.runs:
                if skip >= run.nbytes:
                    skip -= run.nbytes
                    continue
                rest.append(_behind(run, skip))
                skip = 0
        self._queue.extendleft(reversed(rest))
        self._queued_nbytes += sum(run.nbytes for run in rest)

    def _measure(self) -> None:
        """Tells the paths how fast they were in this request."""
        for name, on_path in self._on_path.items():
            self._paths.measured(
                name,
                on_path.landed_nbytes,
                num_streams=on_path.num_streams,
                seconds=on_path.landed_at_s - on_path.first_taken_at_s,
            )

    def _no_path_left(self, now_s: float) -> PeerLost:
        rows = self._paths.statistics(now_s)
        return PeerLost(
            f"no path is left to the peer, {self.landed_nbytes} of {self.nbytes} bytes landed: "
            + ", ".join(f"{row.name} failed {row.num_failures} times" for row in rows),
            hint="is the peer alive, and are its advertised addresses reachable from here?",
            retry_after_s=max(0.0, self._paths.retry_at_s() - now_s),
        )


def _behind(run: Run, nbytes: int) -> Run:
    """What is left of a run without its first `nbytes`."""
    return Run(run.remote_offset + nbytes, run.local_offset + nbytes, run.nbytes - nbytes)
