"""One request over several paths that die, stall, come back and are slow: each byte lands once."""

from __future__ import annotations

from dataclasses import dataclass, field

import hypothesis.strategies as st
from hypothesis import given

from snowskin.transport.errors import PeerLost
from snowskin.transport.paths import Path, PathSet
from snowskin.transport.runs import Run, joined
from snowskin.transport.stripes import Lane, Stripe, Stripes

PIECE_NBYTES = 16
TICK_S = 0.05
MAX_TICKS = 20_000


@dataclass(frozen=True)
class FakePath:
    """How one path behaves: bytes a tick (0: it stalls), and in which ticks it is cut."""

    nbytes_per_tick: int
    cuts: tuple[tuple[int, int], ...]
    is_preferred: bool

    def is_cut(self, tick: int) -> bool:
        return any(first <= tick < end for first, end in self.cuts)


@dataclass
class FakeReader:
    """Carries stripes over fake paths, as the reader in the docstring of `stripes` does."""

    stripes: Stripes
    paths: PathSet
    behaviours: list[FakePath]
    depth: int
    times_landed: bytearray
    waiting: dict[Lane, list[Stripe]] = field(default_factory=dict)
    moved: dict[int, int] = field(default_factory=dict)
    ticks: int = 0

    def tick(self, tick: int) -> None:
        self.ticks += 1
        now_s = tick * TICK_S
        for lane in self.stripes.lanes_to_open(now_s):
            assert lane not in self.waiting, "told twice"
            self.waiting[lane] = []
        for lane in list(self.waiting):
            behaviour = self.behaviours[int(lane.path)]
            if behaviour.is_cut(tick):
                self.close(lane, now_s)
                continue
            if behaviour.nbytes_per_tick:
                self.stripes.reached(lane, now_s)
            while len(self.waiting[lane]) < self.depth:
                stripe = self.stripes.take(lane, now_s)
                if stripe is None:
                    break
                assert stripe.nbytes == sum(run.nbytes for run in stripe.runs) > 0
                self.waiting[lane].append(stripe)
            self.move(lane, behaviour.nbytes_per_tick, now_s)
        for lane in self.stripes.stalled(now_s):
            self.close(lane, now_s)

    def move(self, lane: Lane, nbytes: int, now_s: float) -> None:
        while nbytes and self.waiting[lane]:
            stripe = self.waiting[lane][0]
            done = self.moved.get(stripe.index, 0)
            step = min(nbytes, stripe.nbytes - done)
            assert self.stripes.landed(stripe, step, now_s)
            offsets = [run.local_offset + at for run in stripe.runs for at in range(run.nbytes)][
                done : done + step
            ]
            for offset in offsets:
                self.times_landed[offset] += 1
            self.moved[stripe.index] = done + step
            if done + step == stripe.nbytes:
                self.waiting[lane].pop(0)
            nbytes -= step

    def close(self, lane: Lane, now_s: float) -> None:
        given_up = self.waiting.pop(lane)
        self.stripes.lost(lane, now_s)
        assert not any(self.stripes.landed(stripe, 1, now_s) for stripe in given_up)


cuts = st.lists(
    st.tuples(st.integers(0, 200), st.integers(1, 60)).map(lambda cut: (cut[0], sum(cut))),
    max_size=3,
).map(tuple)
behaviours = st.builds(
    FakePath, nbytes_per_tick=st.integers(0, 40), cuts=cuts, is_preferred=st.booleans()
)
steady = st.builds(
    FakePath, nbytes_per_tick=st.integers(1, 40), cuts=st.just(()), is_preferred=st.booleans()
)
scattered_runs = st.lists(
    st.tuples(st.integers(1, 70), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12
)


def runs_of(sizes: list[tuple[int, int, int]]) -> list[Run]:
    remote = local = 0
    runs = []
    for nbytes, remote_gap, local_gap in sizes:
        runs.append(Run(remote + remote_gap, local + local_gap, nbytes))
        remote, local = remote + remote_gap + nbytes, local + local_gap + nbytes
    return joined(runs)


def carried(
    fakes: list[FakePath], runs: list[Run], depth: int, *, max_runs: int
) -> tuple[FakeReader, PeerLost | None]:
    paths = PathSet(
        [
            Path(name=str(index), remote_address=f"peer:{index}", is_preferred=fake.is_preferred)
            for index, fake in enumerate(fakes)
        ]
    )
    stripes = Stripes(
        runs,
        paths,
        stripe_nbytes=4 * PIECE_NBYTES,
        piece_nbytes=PIECE_NBYTES,
        max_stripe_runs=max_runs,
        striped_from_nbytes=2 * PIECE_NBYTES,
    )
    reader = FakeReader(
        stripes, paths, fakes, depth, bytearray(max(run.local_offset + run.nbytes for run in runs))
    )
    failure = None
    for tick in range(MAX_TICKS):
        try:
            reader.tick(tick)
        except PeerLost as error:
            failure = error
            break
        if stripes.is_done:
            break
        if tick * TICK_S > 300:  # as the deadline of a pull: only stalled lanes are left
            break
    stripes.close()
    return reader, failure


def check_bytes(reader: FakeReader, runs: list[Run]) -> None:
    wanted = bytearray(len(reader.times_landed))
    for run in runs:
        wanted[run.local_offset : run.local_offset + run.nbytes] = b"\1" * run.nbytes
    if reader.stripes.is_done:
        assert reader.times_landed == wanted
    assert all(times <= once for times, once in zip(reader.times_landed, wanted, strict=True))
    assert sum(reader.times_landed) == reader.stripes.landed_nbytes
    for state in reader.paths._states.values():
        assert state.in_flight_nbytes == 0


@given(
    fakes=st.lists(behaviours, min_size=1, max_size=4),
    sizes=scattered_runs,
    depth=st.integers(1, 3),
    max_runs=st.integers(1, 6),
)
def test_no_byte_lands_twice_and_none_is_missing(
    fakes: list[FakePath], sizes: list[tuple[int, int, int]], depth: int, max_runs: int
) -> None:
    runs = runs_of(sizes)
    reader, failure = carried(fakes, runs, depth, max_runs=max_runs)
    check_bytes(reader, runs)
    if failure is not None:
        assert not reader.stripes.is_done
        assert not reader.waiting, "no path left, while a lane was open"


@given(
    fakes=st.lists(behaviours, max_size=3),
    living=steady,
    sizes=scattered_runs,
    depth=st.integers(1, 3),
    at=st.integers(0, 3),
)
def test_request_ends_where_one_path_lives(
    fakes: list[FakePath],
    living: FakePath,
    sizes: list[tuple[int, int, int]],
    depth: int,
    at: int,
) -> None:
    runs = runs_of(sizes)
    all_paths = [*fakes]
    all_paths.insert(at, living)
    reader, failure = carried(all_paths, runs, depth, max_runs=1024)
    check_bytes(reader, runs)
    assert failure is None
    assert reader.stripes.is_done


def ticks_needed(fakes: list[FakePath], nbytes: int) -> int:
    runs = [Run(0, 0, nbytes)]
    reader, _ = carried(fakes, runs, 2, max_runs=1024)
    check_bytes(reader, runs)
    assert reader.stripes.is_done
    return reader.ticks


def test_two_paths_are_twice_as_fast_and_the_survivor_of_a_cut_goes_on_at_its_rate() -> None:
    whole = FakePath(nbytes_per_tick=40, cuts=(), is_preferred=True)
    cut_at, nbytes = 100, 32_000
    cut = FakePath(nbytes_per_tick=40, cuts=((cut_at, MAX_TICKS),), is_preferred=True)
    alone = ticks_needed([whole], nbytes)
    assert ticks_needed([whole, whole], nbytes) <= 0.55 * alone
    best = cut_at + (nbytes - cut_at * 80) / 40  # nothing lost, and the survivor never idle
    assert ticks_needed([whole, cut], nbytes) <= best / 0.9
    slow = FakePath(nbytes_per_tick=10, cuts=(), is_preferred=True)
    assert ticks_needed([whole, slow], nbytes) <= 0.85 * alone
