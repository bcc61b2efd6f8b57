"""One large pull over several connections: a lane each, over several paths or several streams of one.

Rules kept here: the calling thread drives a lane itself, further ones have threads of their own; a lane that broke or
stands still gives its rest to the others once nothing of it can land any more; with a `landed`, pieces are told in the
order of the runs, one at a time; when the pull has ended, in whatever way, nobody receives into its region.

What goes over which lane is decided in `stripes.py`; the link's lock guards it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import TYPE_CHECKING

from snowskin.transport.errors import PeerLost
from snowskin.transport.runs import pieces
from snowskin.transport.stripes import STRIPE_NBYTES, STRIPED_FROM_NBYTES, Lane, Stripes
from snowskin.transport.tcp.connection import WAIT_S
from snowskin.transport.tcp.reader import CHUNK_NBYTES, Job, pull

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from snowskin.transport.runs import Run
    from snowskin.transport.stripes import Stripe
    from snowskin.transport.tcp.connection import Connection
    from snowskin.transport.tcp.connections import Link

ONE_PATH_STRIPE_NBYTES = 1 << 30  # where nothing is re-routed, one request to the owner is enough


LANE_STALL_S = 0.5  # longer than TCP's own first two resends take


class _LaneOver(Exception):
    """The pull has ended meanwhile; not an error."""


class LaneJob(Job):
    """A job's part on one lane, a stripe at a time."""

    __slots__ = ("_moved_nbytes", "_pieces", "_stripe_nbytes", "lane", "pull", "stripe")

    def __init__(self, pull: StripedPull, lane: Lane) -> None:
        """No stripe yet."""
        super().__init__(pull.job.order, (), root=pull.job)
        self.note = b""
        self.pull = pull
        self.lane = lane
        self.begin(None)

    def begin(self, stripe: Stripe | None) -> None:
        """The next stripe."""
        self.stripe = stripe
        self.runs: Sequence[Run] = () if stripe is None else stripe.runs
        self._stripe_nbytes = 0 if stripe is None else stripe.nbytes
        self.landed_nbytes = self._moved_nbytes = 0
        self.heard = False
        self._pieces = iter(pieces(self.runs, self.order.piece_nbytes))

    def check(self) -> float:
        """As for the whole; and looks after the other lanes when it is time."""
        if self.pull.is_over:
            raise _LaneOver
        remaining_s = self.root.check()
        self.flush()
        self.pull.tend()
        return remaining_s

    def moved(self, local_offset: int, nbytes: int) -> None:
        """Counts small chunks together; pieces for a `landed` are told as soon as it is their turn."""
        self.landed_nbytes += nbytes
        self._moved_nbytes += nbytes
        if self.order.landed is not None:
            self.flush()
            self.pull.tell(next(self._pieces))
        elif self._moved_nbytes >= CHUNK_NBYTES or self.landed_nbytes == self._stripe_nbytes:
            self.flush()

    def flush(self) -> None:
        """Says what has landed since; raises PeerLost where this lane was given up before."""
        nbytes, self._moved_nbytes = self._moved_nbytes, 0
        if nbytes and self.stripe is not None and not self.pull.landed(self.stripe, nbytes):
            raise PeerLost(f"{self.lane.path} was given up")


class StripedPull:
    """Carries the runs of a job out; see the rules above.

    Attributes:
        is_over: all has landed, or it failed.
    """

    def __init__(
        self,
        link: Link,
        job: Job,
        runs: Sequence[Run],
        *,
        num_streams: int,
        begin: Callable[[Callable[[], None]], object],
    ) -> None:
        """`begin` runs a lane in a thread, sooner or later; `num_streams` as for `Stripes`."""
        self.job = job
        self.is_over = False
        self._link = link
        self._begin = begin
        self._error: BaseException | None = None
        self._lost: PeerLost | None = None
        self._has_resumed = False
        self._num_active = 0
        self._next_look_s = 0.0
        self._changed = threading.Condition(link.lock)
        has_one_path = len(link.path_names) == 1
        is_looked_at = job.order.landed is not None
        self._stripes = Stripes(
            runs,
            link.paths,
            stripe_nbytes=ONE_PATH_STRIPE_NBYTES if has_one_path else STRIPE_NBYTES,
            piece_nbytes=job.order.piece_nbytes if is_looked_at else CHUNK_NBYTES,
            striped_from_nbytes=STRIPED_FROM_NBYTES,
            stall_s=LANE_STALL_S,
            num_streams=num_streams,
        )
        self._untold = iter(pieces(runs if is_looked_at else (), job.order.piece_nbytes))
        self._next_untold = next(self._untold, None)
        self._arrived: Counter[Run] = Counter()
        self._is_telling = False

    def run(self) -> None:
        """Returns when all has landed and was told; raises what ended it."""
        try:
            while not self._is_through():
                self.job.check()
                lanes = self._lanes_to_open()
                for lane in lanes[1:]:
                    self._open_in_thread(lane)
                if lanes:
                    self._drive_lane(lanes[0])
                else:
                    self._wait()
                    self.tend()
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self._end()
        if self._error is not None:
            raise self._error

    def landed(self, stripe: Stripe, nbytes: int) -> bool:
        """The next bytes of a stripe are in their place; False where they count no more."""
        with self._changed:
            counts = self._stripes.landed(stripe, nbytes, time.monotonic())
            if counts and self.job.order.landed is None and self.job.order.control is not None:
                self.job.order.control.moved_nbytes += nbytes
            if self._stripes.is_done:
                self._changed.notify_all()
            return counts

    def tell(self, piece: Run) -> None:
        """A piece has landed: tells it, and those behind it that came before, when it is their turn."""
        with self._changed:
            self._arrived[piece] += 1
            if self._is_telling:
                return
            self._is_telling = True
        while True:
            with self._changed:
                due = self._next_untold
                if due is None or not self._arrived[due]:
                    self._is_telling = False
                    return
                self._arrived[due] -= 1
                if not self._arrived[due]:
                    del self._arrived[due]
                self._next_untold = next(self._untold, None)
            try:
                self.job.order.moved(due.local_offset, due.nbytes)
            except BaseException as error:
                with self._changed:
                    self._error = self._error or error  # also for the last piece of all
                raise

    def tend(self) -> None:
        """Interrupts lanes that stand still, and opens those that are due; at most each quarter of a second."""
        now_s = time.monotonic()
        if now_s < self._next_look_s:
            return
        with self._changed:
            self._next_look_s = max(self._stripes.next_look_at_s(now_s), now_s + 0.05)
            if self.is_over or not self._stripes.open_lanes:
                return
            stalled = self._stripes.stalled(now_s)
            for connection, user in self._link.busy.items():
                if isinstance(user, LaneJob) and user.pull is self and user.lane in stalled:
                    connection.interrupt()
            lanes = self._stripes.lanes_to_open(now_s)
        for lane in lanes:
            self._open_in_thread(lane)

    def _is_through(self) -> bool:
        with self._changed:
            return self._error is not None or self._stripes.is_done

    def _lanes_to_open(self) -> tuple[Lane, ...]:
        with self._changed:
            try:
                lanes = self._stripes.lanes_to_open(time.monotonic())
            except PeerLost as error:
                if self._lost is not None:
                    raise self._lost from None
                raise PeerLost(
                    f"{self._link.peer}: {error.message}",
                    hint=error.hint,
                    retry_after_s=error.retry_after_s,
                ) from None
        # The calling thread takes one that need not be tried first.
        return tuple(sorted(lanes, key=lambda lane: not self._link.paths.is_alive(lane.path)))

    def _open_in_thread(self, lane: Lane) -> None:
        if lane.stream and not self._link.has_room():
            with self._changed:
                self._stripes.lost(lane, time.monotonic())
            return
        self._begin(lambda: self._drive_lane(lane))

    def _drive_lane(self, lane: Lane) -> None:
        """Takes stripe after stripe on one connection, until there is nothing to do for it."""
        job = LaneJob(self, lane)
        connection: Connection | None = None
        try:
            if self.is_over:
                return
            connection = self._link.take_idle(lane.path, job) or self._link.connect(
                lane.path, job, is_due=True
            )
            with self._changed:
                if not connection.was_idle:  # one that was kept says nothing of the path yet
                    self._stripes.reached(lane, time.monotonic())
                self._num_active += 1
            try:
                self._take_stripes(connection, job)
            finally:
                self._let_go(connection, job)
        except _LaneOver:
            pass
        except PeerLost as error:
            self._lose(lane, job, connection, error)
        except BaseException as error:  # noqa: BLE001 - `run` raises it in the caller's thread
            self._fail(error)

    def _take_stripes(self, connection: Connection, job: LaneJob) -> None:
        while True:
            with self._changed:
                stripe = self._stripes.take(job.lane, time.monotonic())
            if stripe is None:
                if self._is_through() or not self._stripes.is_open(job.lane):
                    return
                self._wait()
                job.check()
                continue
            job.begin(stripe)
            connection.wait_at_most(job.check())
            for _ in pull(connection, job, stripe.runs):
                connection.wait_at_most(job.check())

    def _let_go(self, connection: Connection, job: LaneJob) -> None:
        """Closes what broke, before anything is said of it."""
        self._link.give_back(connection)
        with self._changed:
            self._num_active -= 1
            self._changed.notify_all()

    def _lose(
        self, lane: Lane, job: LaneJob, connection: Connection | None, error: PeerLost
    ) -> None:
        self._link.look_whether_lost(broke=not self.is_over)
        was_stale = connection is not None and connection.was_idle and not job.heard
        if job.heard and not self._has_resumed and not self._link.has_many_paths:
            # Not blamed for that: the owner says on a new connection why it cut this one, or goes on.
            self._has_resumed = was_stale = True
        with self._changed:
            if not was_stale:
                self._lost = error
            self._stripes.lost(lane, time.monotonic(), was_stale=was_stale)
            self._next_look_s = 0.0
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        """What happens once all has landed is too late to fail the pull."""
        with self._changed:
            if self._error is None and not self._stripes.is_done:
                self._error = error
            self._changed.notify_all()

    def _wait(self) -> None:
        with self._changed:
            if not (self._error or self._stripes.is_done):
                self._changed.wait(WAIT_S)

    def _end(self) -> None:
        """Nothing lands any more when this returns."""
        with self._changed:
            self.is_over = self._error is not None  # lanes see it within `WAIT_S`
            self._changed.notify_all()
            while self._num_active:
                self._changed.wait(WAIT_S)
            self.is_over = True
            self._stripes.close()
