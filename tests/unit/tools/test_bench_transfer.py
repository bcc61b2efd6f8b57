"""The transfer benchmark's own rules: what is pulled, who is compared with whom, and that wrong bytes are no result."""

from __future__ import annotations

import asyncio
import itertools
import os
import stat
import sys
from pathlib import Path

import pytest

from snowskin.tools.bench.transfer import calls, peers, schedule, sizes
from snowskin.tools.bench.transfer.backends.api import ContestantMissing
from snowskin.tools.bench.transfer.end import End, EndSpec
from snowskin.tools.bench.transfer.pair import Memory, Taken
from snowskin.tools.bench.transfer.shape import KIB, MIB, SHAPES, contiguous, scattered


def measured(nbytes, **seconds):
    """Rounds of pulls of one size; `name=[seconds]`, underscores for spaces; each takes its seconds of CPU."""
    taken = {
        (name.replace("_", " "), False): [Taken(seconds=each, cpu_s=each) for each in rounds]
        for name, rounds in seconds.items()
    }
    return sizes.Measured(shape=contiguous(nbytes, repeat=1), taken=taken)


def rows(nbytes, **seconds):
    return {row.name: row for row in sizes.rows_of(measured(nbytes, **seconds))}


def test_no_two_runs_of_a_scattered_pull_touch_on_either_side():
    runs = scattered(20, 64 * KIB, repeat=1).runs
    for column in (0, 1):
        starts = [run[column] for run in runs]
        assert all(b - a > 64 * KIB for a, b in itertools.pairwise(starts))


def test_sizes_are_those_that_goals_speak_of():
    assert [shape.name for shape in SHAPES] == [
        "4 KiB",
        "64 KiB",
        "1 MiB",
        "16 MiB",
        "256 MiB",
        "1,000 x 64 KiB",
    ]


def test_the_reference_is_the_best_median_and_not_the_luckiest_round():
    lucky, steady = [0.1, 2.0, 2.0], [1.0, 1.0, 1.0]
    row = rows(MIB, tcp=[1.0] * 3, sockets=lucky, sockets_unpaced=steady)
    assert row["tcp: pull 1 MiB against sockets unpaced"].ratio == 1.0


@pytest.mark.parametrize(
    ("nbytes", "goal"),
    [(4 * KIB, "ratio <= 2"), (64 * KIB, None), (MIB, "ratio >= 1"), (256 * MIB, "ratio >= 1")],
)
def test_tcp_is_judged_against_plain_sockets_by_size(nbytes, goal):
    found = rows(nbytes, tcp=[2.0], sockets=[1.0])
    name = f"tcp: pull {contiguous(nbytes, repeat=1).name}"
    assert found[f"{name} against sockets"].goal == goal
    assert found[f"{name}: CPU of both ends"].goal == ("ratio <= 1.2" if nbytes >= MIB else None)


def test_a_small_pull_is_compared_with_one_stream_and_not_with_several():
    found = rows(4 * KIB, tcp=[2.0], sockets=[1.0], sockets_2_streams=[0.5])
    assert found["tcp: pull 4 KiB against sockets"].ratio == 2.0


def test_a_small_shm_pull_is_judged_by_its_microseconds():
    held = rows(4 * KIB, shm=[2.9e-6], memcpy=[1e-7])[
        "shm: pull 4 KiB under a held lease against memcpy"
    ]
    assert (held.goal, held.holds) == ("value <= 3", True)


@pytest.mark.parametrize(
    ("nbytes", "peer", "bound"),
    [
        (64 * KIB, "nixl_tuned", None),
        (16 * MIB, "nixl_tuned", "ratio >= 1.5"),
        (16 * MIB, "ucx_gets_tuned", "ratio >= 1.5"),
        (256 * MIB, "ucx_gets_tuned", "ratio >= 1"),
        (256 * MIB, "mooncake_engine", "ratio >= 1.3"),
        (16 * MIB, "nixl_as_shipped", None),
    ],
)
def test_peers_are_compared_with_a_tcp_that_may_use_both_cores_as_they_may(nbytes, peer, bound):
    found = rows(nbytes, tcp=[9.0], tcp_on_both_cores=[1.0], sockets=[1.0], **{peer: [2.0]})
    name = f"tcp on both cores: pull {contiguous(nbytes, repeat=1).name} against {peer.replace('_', ' ')}"
    assert (found[name].goal, found[name].ratio) == (bound, 2.0)


def test_who_is_missing_has_no_row():
    assert not [name for name in rows(MIB, shm=[1.0], memcpy=[1.0]) if "tcp" in name]


def test_layouts_hold_the_same_bytes_in_ever_fewer_calls():
    geometry = calls.Geometry()
    shapes = [calls.layer_major(geometry), calls.block_major(geometry), calls.segment(geometry)]
    assert {shape.nbytes for shape in shapes} == {8 * MIB}
    assert [len(shape.runs) for shape in shapes] == [2048, 64, 1]
    for shape in shapes:
        for column in (0, 1):
            assert len({run[column] for run in shape.runs}) == len(shape.runs)


QUICK = schedule.Load(
    num_requests=6, num_slots=2, arrival_s=0.0, prefill_s=0.01, num_prefills=3, decode_s=0.0
)


def hold(*, is_pull):
    landing = set()

    async def move(_source, target):
        assert target not in landing, "two requests in one slot"
        landing.add(target)
        await asyncio.sleep(0.003)
        landing.remove(target)

    return asyncio.run(schedule.run(QUICK, move, is_pull=is_pull))


def test_push_holds_its_memory_through_the_whole_prefill_and_pull_does_not():
    pushed, pulled = hold(is_pull=False), hold(is_pull=True)
    assert len(pushed) == len(pulled) == QUICK.num_requests
    for index, held in enumerate(pushed):
        assert held.landed_at_s - held.reserved_at_s >= QUICK.prefill_of(index) * 0.99
    for index, held in enumerate(pulled):
        assert held.reserved_at_s - held.arrived_at_s >= QUICK.prefill_of(index) * 0.99


def test_the_packages_of_this_python_are_found():
    assert peers.package_folders(None) == ()
    assert any("site-packages" in folder for folder in peers.package_folders(Path(sys.executable)))


@pytest.mark.parametrize(
    ("says", "why"),
    [("echo '[[3, 2], \"/nowhere\"]'", "is Python 3.2"), ("exit 3", "does not answer")],
)
def test_an_environment_that_cannot_be_used_is_refused(tmp_path, says, why):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{says}\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(peers.PeersUnusable, match=why):
        peers.package_folders(python)


def test_the_missing_are_named_with_their_reason():
    assert peers.told({"nixl tuned": "cannot be imported"}) == [
        "MISSING: nixl tuned: cannot be imported"
    ]


class Reader:
    """Moves what `moves` says; as a reader of another process's bytes might get it wrong."""

    def __init__(self, pool, landing, moves):
        self.pool, self.landing, self.moves = pool, landing, moves

    def prepare(self, runs, begin):
        if self.moves is None:
            raise ContestantMissing("not this one")

        def pull():
            for remote, local, nbytes in runs:
                self.moves(
                    self.pool[remote : remote + nbytes], self.landing[local : local + nbytes]
                )
            if begin:
                begin()(0, runs[0].nbytes // 2)

        return pull

    def close(self):
        pass


def copy(source, target):
    target[:] = source


def copy_but_one(source, target):
    target[:-1] = source[:-1]


def prepare(moves, *, checked=False):
    with Memory(64 * KIB) as memory:
        spec = EndSpec(
            is_owner=False,
            backends={},
            pool_fd=memory.pool_fd,
            landing_fd=memory.landing_fd,
            control_fd=-1,
            cores=tuple(os.sched_getaffinity(0)),
        )
        end = End(spec)
        end._opened["x"] = Reader(end._pool.bytes, end._landing.bytes, moves)
        order = {"do": "prepare", "name": "x", "shape": "s", "checked": checked}
        return end.carry_out(order | {"runs": [(0, 0, 32 * KIB)], "block_nbytes": 4 * KIB})


def test_bytes_are_verified_before_anything_is_measured():
    assert prepare(copy) == {}
    with pytest.raises(AssertionError, match="other bytes than the pool's"):
        prepare(copy_but_one)


def test_a_checked_pull_that_leaves_bytes_out_of_its_checksums_is_found():
    with pytest.raises(AssertionError, match="checksums of other bytes"):
        prepare(copy, checked=True)


def test_a_contestant_without_such_a_pull_is_left_out():
    assert "missing" in prepare(None)
