"""Stripes and paths: who carries what, what a loss does, and when a dead path is tried again."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest

from snowskin.transport.errors import PeerLost
from snowskin.transport.paths import MANY_STREAMS_FROM_NBYTES, Path, PathSet, StreamChoice
from snowskin.transport.runs import Run
from snowskin.transport.stripes import Lane, Stripes

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20


def two_paths(*, fallback: bool = False) -> PathSet:
    return PathSet(
        [
            Path(name="a", remote_address="10.0.0.2:7", speed_bytes_per_s=1e9),
            Path(
                name="b",
                remote_address="10.0.1.2:7",
                speed_bytes_per_s=1e9,
                is_preferred=not fallback,
            ),
        ]
    )


def one_run(nbytes: int) -> list[Run]:
    return [Run(0, 0, nbytes)]


def carry_all(stripes: Stripes, lane: Lane, now_s: float) -> int:
    carried_nbytes = 0
    while (stripe := stripes.take(lane, now_s)) is not None:
        assert stripes.landed(stripe, stripe.nbytes, now_s)
        carried_nbytes += stripe.nbytes
    return carried_nbytes


def test_small_request_uses_one_lane_of_the_least_busy_path() -> None:
    paths = two_paths()
    first = Stripes(one_run(64 << 10), paths)
    assert first.lanes_to_open(0.0) == (Lane("a", 0),)
    first.take(Lane("a", 0), 0.0)
    assert Stripes(one_run(64 << 10), paths).lanes_to_open(0.0) == (Lane("b", 0),)


def test_large_request_opens_a_lane_on_every_preferred_path() -> None:
    assert set(Stripes(one_run(8 * MIB), two_paths()).lanes_to_open(0.0)) == {
        Lane("a", 0),
        Lane("b", 0),
    }


def test_fall_back_path_is_opened_only_when_the_preferred_one_is_lost() -> None:
    stripes = Stripes(one_run(8 * MIB), two_paths(fallback=True))
    assert stripes.lanes_to_open(0.0) == (Lane("a", 0),)
    assert stripes.lanes_to_open(0.0) == ()
    stripes.lost(Lane("a", 0), 0.01)
    assert stripes.lanes_to_open(0.01) == (Lane("b", 0),)


def test_stripes_keep_the_order_of_runs_and_are_cut_at_pieces() -> None:
    runs = [Run(0, 0, 3 * MIB + 5), Run(8 * MIB, 4 * MIB, 2 * MIB)]
    stripes = Stripes(runs, two_paths(), stripe_nbytes=2 * MIB)
    stripes.lanes_to_open(0.0)
    taken = []
    while (stripe := stripes.take(Lane("a", 0), 0.0)) is not None:
        taken += stripe.runs
    assert [run.local_offset for run in taken] == sorted(run.local_offset for run in taken)
    starts = {0: 0, 1: 4 * MIB}
    for run in taken:
        within = run.local_offset - starts[int(run.local_offset >= 4 * MIB)]
        assert within % MIB == 0
    assert sum(run.nbytes for run in taken) == 5 * MIB + 5


def test_faster_path_is_given_larger_stripes_and_the_last_ones_are_small() -> None:
    paths = two_paths()
    paths.measured("a", 100 * MIB, num_streams=1, seconds=1.0)
    paths.measured("b", 100 * MIB, num_streams=1, seconds=3.0)
    stripes = Stripes(one_run(64 * MIB), paths)
    stripes.lanes_to_open(0.0)
    fast = stripes.take(Lane("a", 0), 0.0)
    slow = stripes.take(Lane("b", 0), 0.0)
    assert fast is not None
    assert slow is not None
    assert fast.nbytes > 2 * slow.nbytes
    sizes = [fast.nbytes]
    while (stripe := stripes.take(Lane("a", 0), 0.0)) is not None:
        sizes.append(stripe.nbytes)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == MIB


def test_lost_lane_s_rest_is_taken_next_and_what_it_landed_is_not() -> None:
    stripes = Stripes(one_run(8 * MIB), two_paths())
    stripes.lanes_to_open(0.0)
    stripe = stripes.take(Lane("a", 0), 0.0)
    assert stripe is not None
    assert stripes.landed(stripe, MIB, 0.1)
    stripes.lost(Lane("a", 0), 0.2)
    assert not stripes.landed(stripe, MIB, 0.2)
    again = stripes.take(Lane("b", 0), 0.2)
    assert again is not None
    assert again.runs[0].local_offset == MIB
    assert carry_all(stripes, Lane("b", 0), 0.3) + again.nbytes == 7 * MIB


def test_no_path_left_names_the_paths_and_when_to_try_again() -> None:
    stripes = Stripes(one_run(MIB), two_paths())
    for lane in ("a", "b"):
        assert stripes.lanes_to_open(0.0) == (Lane(lane, 0),)
        stripes.lost(Lane(lane, 0), 0.0)
    with pytest.raises(PeerLost, match=r"0 of 1048576 bytes.*a failed 1 times, b failed 1") as lost:
        stripes.lanes_to_open(0.0)
    assert lost.value.retry_after_s == pytest.approx(0.1)


def test_stale_connection_is_opened_anew_once_without_blame() -> None:
    paths = PathSet([Path(name="a", remote_address="10.0.0.2:7")])
    stripes = Stripes(one_run(MIB), paths)
    lane = Lane("a", 0)
    assert stripes.lanes_to_open(0.0) == (lane,)
    stripes.lost(lane, 0.0, was_stale=True)
    assert paths.is_alive("a")
    assert stripes.lanes_to_open(0.0) == (lane,)
    stripes.lost(lane, 0.0, was_stale=True)
    assert not paths.is_alive("a")


def test_path_with_another_open_lane_is_not_blamed_for_one() -> None:
    paths = PathSet([Path(name="a", remote_address="10.0.0.2:7")])
    choose_streams(paths, "a", 2)
    stripes = Stripes(one_run(32 * MIB), paths)
    assert stripes.lanes_to_open(0.0) == (Lane("a", 0), Lane("a", 1))
    stripes.lost(Lane("a", 1), 0.0)
    assert paths.is_alive("a")
    assert stripes.lanes_to_open(0.0) == ()
    stripes.lost(Lane("a", 0), 0.0)
    assert not paths.is_alive("a")


def choose_streams(paths: PathSet, name: str, num_streams: int) -> None:
    for _ in range(2):
        paths.measured(name, 32 * MIB, num_streams=1, seconds=1.0)
        paths.measured(name, 32 * MIB, num_streams=num_streams, seconds=0.5)


def test_failed_path_is_tried_again_by_one_request_after_a_growing_time() -> None:
    paths = two_paths()
    paths.failed("a", 0.0)
    paths.failed("a", 0.05)  # the same break, told by another lane
    assert paths.alive() == (paths.path("b"),)
    assert paths.due(0.09) == ()
    assert paths.due(0.1) == (paths.path("a"),)
    paths.tried("a", 0.1)
    assert paths.due(0.2) == ()
    paths.failed("a", 0.2)
    assert paths.due(0.39) == ()
    assert paths.due(0.4) == (paths.path("a"),)
    paths.tried("a", 0.4)
    paths.landed("a", 1)
    assert paths.alive() == paths.paths
    paths.failed("a", 1.0)
    assert paths.due(1.1) == (paths.path("a"),)


def test_back_off_is_bounded() -> None:
    paths = two_paths()
    now_s = 0.0
    for _ in range(40):
        paths.tried("a", now_s)
        paths.failed("a", now_s)
        assert paths.retry_at_s() - now_s <= 10.001
        now_s = paths.retry_at_s()


def test_fall_back_paths_are_the_living_ones_only_without_a_preferred_one() -> None:
    paths = two_paths(fallback=True)
    assert [path.name for path in paths.alive()] == ["a"]
    paths.failed("a", 0.0)
    assert [path.name for path in paths.alive()] == ["b"]
    paths.failed("b", 0.0)
    assert paths.alive() == ()
    assert paths.least_busy() is None


def test_dead_fall_back_path_is_tried_only_while_nothing_lives() -> None:
    paths = two_paths(fallback=True)
    paths.failed("b", 0.0)
    assert paths.due(5.0) == ()
    paths.failed("a", 5.0)
    assert paths.due(5.0) == (paths.path("b"),)


def test_path_that_returned_carries_again_in_the_same_request() -> None:
    stripes = Stripes(one_run(64 * MIB), paths := two_paths())
    stripes.lanes_to_open(0.0)
    stripes.lost(Lane("a", 0), 0.0)
    assert stripes.lanes_to_open(0.05) == ()
    assert stripes.next_look_at_s(0.05) == pytest.approx(0.1)
    assert stripes.lanes_to_open(0.1) == (Lane("a", 0),)
    stripes.reached(Lane("a", 0), 0.1)
    assert paths.is_alive("a")
    assert stripes.take(Lane("a", 0), 0.1) is not None


def test_lane_that_stands_still_while_another_moves_is_stalled() -> None:
    stripes = Stripes(one_run(64 * MIB), two_paths(), stall_s=1.0)
    stripes.lanes_to_open(0.0)
    stripes.take(Lane("a", 0), 0.0)
    other = stripes.take(Lane("b", 0), 0.0)
    assert other is not None
    assert stripes.next_look_at_s(0.0) == pytest.approx(1.0)
    assert stripes.stalled(1.0) == ()  # nobody moved: it is the peer
    stripes.landed(other, MIB, 1.0)
    assert stripes.stalled(1.0) == (Lane("a", 0),)


def test_lane_that_had_nothing_to_do_is_not_stalled_when_it_gets_work() -> None:
    stripes = Stripes(one_run(64 * MIB), two_paths(), stall_s=1.0)
    stripes.lanes_to_open(0.0)
    stripes.take(Lane("b", 0), 5.0)
    other = stripes.take(Lane("a", 0), 5.0)
    assert other is not None
    stripes.landed(other, MIB, 5.5)
    assert stripes.stalled(5.9) == ()
    assert stripes.stalled(6.0) == (Lane("b", 0),)


def test_lane_that_stands_still_while_a_proven_one_is_idle_is_stalled() -> None:
    stripes = Stripes(one_run(4 * MIB), two_paths(), stall_s=1.0)
    stripes.lanes_to_open(0.0)
    held = stripes.take(Lane("a", 0), 0.0)
    carry_all(stripes, Lane("b", 0), 0.1)
    assert held is not None
    stripes.landed(held, 1, 0.2)
    assert stripes.stalled(1.1) == ()
    assert stripes.stalled(1.2) == (Lane("a", 0),)


def test_request_that_stands_still_tries_the_paths_it_did_not_use() -> None:
    stripes = Stripes(one_run(4 * MIB), two_paths(fallback=True), stall_s=1.0)
    stripes.lanes_to_open(0.0)
    stripes.take(Lane("a", 0), 0.0)
    assert stripes.lanes_to_open(0.9) == ()
    assert stripes.lanes_to_open(1.0) == (Lane("b", 0),)
    assert stripes.stalled(1.0) == ()
    stripes.reached(Lane("b", 0), 1.1)
    assert stripes.stalled(1.1) == (Lane("a", 0),)


def test_closed_request_leaves_nothing_in_flight() -> None:
    paths = two_paths()
    stripes = Stripes(one_run(64 * MIB), paths)
    stripes.lanes_to_open(0.0)
    stripe = stripes.take(Lane("a", 0), 0.0)
    assert stripe is not None
    stripes.landed(stripe, MIB, 0.1)
    stripes.close()
    stripes.close()
    assert not stripes.landed(stripe, MIB, 0.2)
    assert stripes.lanes_to_open(0.2) == ()
    assert paths.least_busy() == paths.path("a")
    assert [row.num_failures for row in paths.statistics(0.2)] == [0, 0]


def test_rate_is_measured_by_finished_requests_only_of_a_size() -> None:
    paths = PathSet([Path(name="a", remote_address="10.0.0.2:7", speed_bytes_per_s=5.0)])
    for nbytes, rate in ((4096, 5.0), (8 * MIB, 4 * MIB)):
        stripes = Stripes(one_run(nbytes), paths)
        (lane,) = stripes.lanes_to_open(0.0)
        stripe = stripes.take(lane, 0.0)
        assert stripe is not None
        stripes.landed(stripe, nbytes, 2.0)
        assert paths.bytes_per_s("a") == pytest.approx(rate)


def test_one_stream_until_more_are_measured_to_be_better() -> None:
    choice = StreamChoice()
    rates = {1: 1.0, 2: 1.5, 4: 1.55}
    asked = []
    for _ in range(100):
        count = choice.num_streams(64 * MIB)
        asked.append(count)
        choice.measured(64 * MIB, num_streams=count, seconds=64 * MIB / rates[count])
    assert asked[:7] == [1] * 7
    assert asked[-1] == 2  # 4 is not a tenth better than 2
    assert asked.count(4) < 10
    assert StreamChoice().num_streams(MANY_STREAMS_FROM_NBYTES - 1) == 1


def test_streams_that_stopped_being_better_are_given_up() -> None:
    choice = StreamChoice()
    for rates in ({1: 1.0, 2: 2.0, 4: 1.0}, {1: 1.0, 2: 0.4, 4: 0.5}):
        for _ in range(400):
            count = choice.num_streams(64 * MIB)
            choice.measured(64 * MIB, num_streams=count, seconds=64 * MIB / rates[count])
        best = max(rates, key=lambda count: rates[count])
        assert choice.num_streams(64 * MIB) == best


def test_streams_that_are_not_better_are_tried_ever_more_rarely() -> None:
    choice = StreamChoice()
    tried = []
    for number in range(1, 3001):
        count = choice.num_streams(64 * MIB)
        if count != 1:
            tried.append((number, count))
        choice.measured(64 * MIB, num_streams=count, seconds=1.0 if count == 1 else 2.0)
    assert tried[:4] == [(8, 2), (24, 4), (56, 2), (120, 4)]
    assert len(tried) < 10


def test_streams_are_kept_only_once_they_were_better_twice_in_a_row() -> None:
    choice = StreamChoice()
    choice.measured(64 * MIB, num_streams=1, seconds=1.0)
    for seconds in (0.5, 1.5, 0.5):
        choice.measured(64 * MIB, num_streams=2, seconds=seconds)
        assert choice.num_streams(64 * MIB) == 1
    choice.measured(64 * MIB, num_streams=2, seconds=0.5)
    assert choice.num_streams(64 * MIB) == 2


def tries(choice: StreamChoice, seconds_of: Callable[[int, int], float], number: int) -> list[int]:
    """Counts that were tried beside the kept one 1, where request `n` over `count` takes `seconds_of(n, count)`."""
    counts = []
    for request in range(number):
        counts.append(choice.num_streams(64 * MIB))
        choice.measured(64 * MIB, num_streams=counts[-1], seconds=seconds_of(request, counts[-1]))
    return [count for count in counts if count != 1]


def test_single_slow_requests_bring_no_tries_back() -> None:
    slow = tries(StreamChoice(), lambda n, count: 2.0 if count > 1 or n % 3 == 0 else 1.0, 3000)
    assert len(slow) < 10


def test_a_way_that_became_slow_is_looked_at_anew_soon() -> None:
    choice = StreamChoice()
    tries(choice, lambda n, count: float(count), 3000)
    assert 2 in tries(choice, lambda n, count: 4.0 / count, 20)


@pytest.mark.parametrize(("most", "tried"), [(1, set()), (2, {2}), (3, {2}), (4, {2, 4})])
def test_never_more_streams_are_tried_than_may_be_used(most: int, tried: set[int]) -> None:
    assert set(tries(StreamChoice(most), lambda n, count: float(count), 3000)) == tried


def test_two_counts_that_were_better_once_each_are_not_one_that_was_twice() -> None:
    choice = StreamChoice()
    for count, seconds in ((1, 1.0), (2, 0.5), (4, 0.5)):
        choice.measured(64 * MIB, num_streams=count, seconds=seconds)
    assert choice.num_streams(64 * MIB) == 1


def test_sizes_are_judged_apart() -> None:
    choice = StreamChoice()
    for _ in range(2):
        choice.measured(512 * MIB, num_streams=1, seconds=2.0)
        choice.measured(512 * MIB, num_streams=4, seconds=1.0)
    assert choice.num_streams(512 * MIB) == 4
    assert choice.num_streams(32 * MIB) == 1


def test_paths_without_a_name_of_their_own_are_refused() -> None:
    with pytest.raises(ValueError, match="one name"):
        PathSet([Path(name="a", remote_address="x:1"), Path(name="a", remote_address="y:1")])
    with pytest.raises(ValueError, match="at least one"):
        PathSet([])
    assert two_paths().retry_at_s() == math.inf
