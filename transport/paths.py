"""The ways to one peer: which are alive, how fast each is, how many streams each is worth.

Rules kept here: a path that failed is left alone for a while (0.1 s, doubling up to 10 s), and then
one request at a time tries it; fall-back paths are used only while no preferred one lives; more
streams than one only from 16 MiB, and only while they are measurably better. Pure: the caller
brings the time. Not for several threads at once: the caller's lock guards a `PathSet` together with
the `Stripes` made from it.

A path begins as alive. `failed` makes it dead until `retry_at_s`; from then it is *due*: offered
beside the living paths, for a try, never instead of one. `reached` makes it alive again; only bytes
that land end the doubling of its back-off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

STREAM_COUNTS = (1, 2, 4)
MANY_STREAMS_FROM_NBYTES = 16 << 20
MEASURED_FROM_NBYTES = 1 << 20

_UNKNOWN_BYTES_PER_S = 1.25e9  # of a NIC that does not say its speed: 10 Gbit/s
_NEWEST_WEIGHT = 0.25
_STREAMS_MUST_GAIN = 1.1
_STREAMS_HAVE_FALLEN = 2 / 3
_NUM_WINS, _NUM_FALLS = 2, 4
_TRY_FIRST, _TRY_LAST = 8, 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """One way to a peer, from one of this host's addresses to one of the peer's.

    Attributes:
        name: unique among the paths to this peer; for logs and `kvctl transports`.
        local_address: host address to bind before connecting; empty where the kernel may choose.
        local_device: NIC to bind the socket to (SO_BINDTODEVICE), where this host has two in one
            network and so the address alone would not decide which one sends; else empty.
        remote_address: `host:port`, or `[host]:port` for IPv6.
        speed_bytes_per_s: what the NIC says it can do; 0 where it does not say.
        is_preferred: near to the memory; the others are the fall-back group.
    """

    name: str
    local_address: str = ""
    local_device: str = ""
    remote_address: str
    speed_bytes_per_s: float = 0.0
    is_preferred: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class PathLimits:
    """How long a failed path is left alone, and how long one try of it may take."""

    first_back_off_s: float = 0.1
    max_back_off_s: float = 10.0
    try_s: float = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PathStatistics:
    """What one path did so far; `retry_in_s` is 0 for a path that may be used now."""

    name: str
    is_alive: bool
    retry_in_s: float
    moved_nbytes: int
    num_failures: int
    bytes_per_s: float


@dataclass(slots=True)
class _SizeClass:
    """What is known of pulls of one size: the count of streams in use, and the one that is tried next."""

    counts: tuple[int, ...]
    kept: int = STREAM_COUNTS[0]
    candidate: int = STREAM_COUNTS[1]
    bytes_per_s: float | None = None  # of the kept one
    num_asked: int = 0
    try_at: int = _TRY_FIRST
    interval: int = _TRY_FIRST
    num_wins: int = 0  # of the candidate, in a row
    num_falls: int = 0  # of the kept one, in a row

    def try_in(self, interval: int) -> None:
        self.interval = interval
        self.try_at = self.num_asked + interval

    def turn(self) -> None:
        """Another candidate."""
        others = [count for count in self.counts if count != self.kept]
        at = others.index(self.candidate) + 1 if self.candidate in others else 0
        self.candidate = others[at % len(others)]
        self.num_wins = 0


class StreamChoice:
    """How many streams a path is worth, by size: one, until more are measurably better.

    Sizes are classes of a factor of four from 32 MiB on. In each, the count in use is kept until another one was a
    tenth better twice in a row. The 8th request tries another; one that was not better doubles the time to the next
    try, up to every 1,024th, because a try may take twice as long. Where the kept one was a third slower several times
    in a row, they are tried soon again; a single slow one only shared its way with another request.
    """

    def __init__(self, max_streams: int = STREAM_COUNTS[-1]) -> None:
        """Nothing measured; never more than `max_streams`."""
        self._counts = tuple(count for count in STREAM_COUNTS if count <= max_streams)
        self._classes: dict[int, _SizeClass] = {}

    @property
    def most_kept(self) -> int:
        """Streams in use for those sizes that are worth most."""
        return max((known.kept for known in self._classes.values()), default=STREAM_COUNTS[0])

    def num_streams(self, nbytes: int) -> int:
        """Streams to open for a request that puts `nbytes` on this path: 1, 2 or 4."""
        if nbytes < MANY_STREAMS_FROM_NBYTES or len(self._counts) == 1:
            return 1
        known = self._known(nbytes)
        known.num_asked += 1
        if known.bytes_per_s is None or known.num_asked < known.try_at:
            return known.kept
        known.try_in(known.interval)  # whatever becomes of this one
        return known.candidate

    def measured(self, nbytes: int, *, num_streams: int, seconds: float) -> None:
        """Says how long `nbytes` took over `num_streams` streams."""
        if nbytes < MANY_STREAMS_FROM_NBYTES or seconds <= 0 or num_streams not in self._counts:
            return
        known, bytes_per_s = self._known(nbytes), nbytes / seconds
        if num_streams == known.kept:
            self._measured_kept(known, bytes_per_s)
        elif known.bytes_per_s is None:
            pass  # nothing to compare it with
        elif bytes_per_s < _STREAMS_MUST_GAIN * known.bytes_per_s:
            known.turn()
            known.try_in(min(2 * known.interval, _TRY_LAST))
        else:
            known.num_wins = 1 + known.num_wins * (num_streams == known.candidate)
            known.candidate = num_streams
            known.try_in(_TRY_FIRST)
            if known.num_wins == _NUM_WINS:
                known.kept, known.bytes_per_s = num_streams, bytes_per_s
                known.turn()

    @staticmethod
    def _measured_kept(known: _SizeClass, bytes_per_s: float) -> None:
        if not known.bytes_per_s or bytes_per_s >= _STREAMS_HAVE_FALLEN * known.bytes_per_s:
            known.num_falls = 0
            known.bytes_per_s = _averaged(known.bytes_per_s, bytes_per_s)
            return
        known.num_falls += 1
        if known.num_falls == _NUM_FALLS:
            known.num_falls = 0
            known.bytes_per_s = bytes_per_s
            known.try_in(_TRY_FIRST)

    def _known(self, nbytes: int) -> _SizeClass:
        size_class = _size_class(nbytes)
        known = self._classes.get(size_class)
        if known is None:
            known = self._classes[size_class] = _SizeClass(self._counts)
        return known


@dataclass(slots=True)
class _State:
    path: Path
    streams: StreamChoice
    is_alive: bool = True
    is_tried: bool = False
    retry_at_s: float = -math.inf
    num_failures_in_a_row: int = 0
    num_failures: int = 0
    moved_nbytes: int = 0
    in_flight_nbytes: int = 0
    measured_bytes_per_s: float | None = None


class PathSet:
    """All ways to one peer, for as long as the peer is known; see the rules above."""

    def __init__(
        self,
        paths: Sequence[Path],
        limits: PathLimits | None = None,
        *,
        max_streams: int = STREAM_COUNTS[-1],
    ) -> None:
        """All paths alive and none measured; their order is the preference among equals.

        Args:
            paths: at least one, each with a name of its own.
            limits: of those that fail.
            max_streams: on one path.
        """
        if not paths:
            raise ValueError("a peer needs at least one path")
        self._states = {
            path.name: _State(path, streams=StreamChoice(max_streams)) for path in paths
        }
        if len(self._states) != len(paths):
            raise ValueError(f"paths of one name: {sorted(path.name for path in paths)}")
        self._limits = limits or PathLimits()

    @property
    def paths(self) -> tuple[Path, ...]:
        """All of them, dead or alive."""
        return tuple(state.path for state in self._states.values())

    def path(self, name: str) -> Path:
        """The path of this name."""
        return self._states[name].path

    def is_alive(self, name: str) -> bool:
        """Whether this path may be used now."""
        return self._states[name].is_alive

    def alive(self) -> tuple[Path, ...]:
        """The living preferred paths; without any, the living others."""
        alive = [state.path for state in self._states.values() if state.is_alive]
        preferred = tuple(path for path in alive if path.is_preferred)
        return preferred or tuple(alive)

    def due(self, now_s: float) -> tuple[Path, ...]:
        """Dead paths that may be tried now: preferred ones, and any while nothing lives."""
        anything_lives = any(state.is_alive for state in self._states.values())
        return tuple(
            state.path
            for state in self._states.values()
            if not state.is_alive
            and state.retry_at_s <= now_s
            and (state.path.is_preferred or not anything_lives)
        )

    def least_busy(self) -> Path | None:
        """The living path that would be through with its bytes first; None where none lives."""
        return min(
            self.alive(),
            key=lambda path: (
                self._states[path.name].in_flight_nbytes / self.bytes_per_s(path.name),
                -self.bytes_per_s(path.name),
            ),
            default=None,
        )

    def retry_at_s(self) -> float:
        """When the next dead path is due; infinity while all live."""
        dead = (state.retry_at_s for state in self._states.values() if not state.is_alive)
        return min(dead, default=math.inf)

    def tried(self, name: str, now_s: float) -> None:
        """A due path is being tried: nobody else tries it until this one's time is over."""
        state = self._states[name]
        state.is_tried = True
        state.retry_at_s = now_s + self._limits.try_s

    def reached(self, name: str) -> None:
        """A connection stands, and the peer answered on it: the path lives."""
        state = self._states[name]
        state.is_alive = True
        state.is_tried = False

    def failed(self, name: str, now_s: float) -> None:
        """Could not be reached, or broke; says when it is due. The same break told twice is one."""
        state = self._states[name]
        if not state.is_alive and not state.is_tried:
            return
        state.is_alive = state.is_tried = False
        state.num_failures += 1
        state.num_failures_in_a_row += 1
        doublings = min(state.num_failures_in_a_row - 1, 32)
        back_off_s = min(self._limits.first_back_off_s * 2**doublings, self._limits.max_back_off_s)
        state.retry_at_s = now_s + back_off_s

    def in_flight(self, name: str, nbytes: int) -> None:
        """Bytes were asked for over this path (or, below 0, will not come any more)."""
        self._states[name].in_flight_nbytes += nbytes

    def landed(self, name: str, nbytes: int) -> None:
        """Bytes came: the path lives."""
        self.reached(name)
        state = self._states[name]
        state.num_failures_in_a_row = 0
        state.moved_nbytes += nbytes
        state.in_flight_nbytes -= nbytes

    def measured(self, name: str, nbytes: int, *, num_streams: int, seconds: float) -> None:
        """One request put `nbytes` on this path for `seconds`; small ones say nothing of a rate."""
        if nbytes < MEASURED_FROM_NBYTES or seconds <= 0:
            return
        state = self._states[name]
        state.measured_bytes_per_s = _averaged(state.measured_bytes_per_s, nbytes / seconds)
        state.streams.measured(nbytes, num_streams=num_streams, seconds=seconds)

    def bytes_per_s(self, name: str) -> float:
        """Measured rate, averaged over requests; before the first, what the NIC says."""
        state = self._states[name]
        if state.measured_bytes_per_s is not None:
            return state.measured_bytes_per_s
        return state.path.speed_bytes_per_s or _UNKNOWN_BYTES_PER_S

    def num_streams(self, name: str, nbytes: int) -> int:
        """Streams that `nbytes` on this path are worth; one on a path that is being tried."""
        state = self._states[name]
        return state.streams.num_streams(nbytes) if state.is_alive else 1

    def most_streams(self, name: str) -> int:
        """Streams that this path is in use with, for those sizes that are worth most."""
        return self._states[name].streams.most_kept

    def statistics(self, now_s: float) -> tuple[PathStatistics, ...]:
        """One row a path."""
        return tuple(
            PathStatistics(
                name=name,
                is_alive=state.is_alive,
                retry_in_s=0.0 if state.is_alive else max(0.0, state.retry_at_s - now_s),
                moved_nbytes=state.moved_nbytes,
                num_failures=state.num_failures,
                bytes_per_s=self.bytes_per_s(name),
            )
            for name, state in self._states.items()
        )


def _size_class(nbytes: int) -> int:
    """0 for 16 to 32 MiB, 1 up to 128 MiB, and so on."""
    return (nbytes // MANY_STREAMS_FROM_NBYTES).bit_length() // 2 if nbytes else 0


def _averaged(old: float | None, new: float) -> float:
    return new if old is None else old + _NEWEST_WEIGHT * (new - old)
