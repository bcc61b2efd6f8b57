"""The laws of `Transport` on which bytes move (1 to 4, 9, 10), on every backend.

The number in a test's name is the law's.
"""

from __future__ import annotations

import asyncio
import mmap
from dataclasses import replace
from typing import TYPE_CHECKING

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from snowskin.transport.api import Run, TrafficClass
from snowskin.transport.descriptor import RegionDescriptor
from snowskin.transport.errors import (
    BadDescriptor,
    OutOfBounds,
    RegionReadOnly,
    TransportClosed,
    TransportError,
)
from tests.support.transport_rigs import FAR_S, LARGE_NBYTES, NBYTES, Rig

if TYPE_CHECKING:
    from collections.abc import Callable

    from snowskin.transport.memory import MemoryRegion


def test_1_registered_memory_is_the_callers_own(rig: Rig) -> None:
    remote = rig.attach()
    rig.reader.pull(remote, rig.local, [Run(0, 0, 4096)], deadline_s=FAR_S)
    assert np.array_equal(rig.target[:4096], rig.owned.buffer[:4096])
    rig.owned.buffer[0] ^= 255
    rig.reader.pull(remote, rig.local, [Run(0, 1, 1)], deadline_s=FAR_S)
    assert rig.target[1] == rig.owned.buffer[0]


LANDINGS: dict[str, Callable[[], object]] = {
    "numpy": lambda: np.zeros((64, 32), dtype=np.float16),
    "tensor": lambda: torch.zeros((64, 32), dtype=torch.bfloat16),
    "part of a tensor": lambda: torch.zeros((3, 64, 32), dtype=torch.float16)[1],
    "mmap": lambda: mmap.mmap(-1, 4096),
    "bytearray": lambda: bytearray(4096),
}


@pytest.mark.parametrize("kind", LANDINGS)
def test_1_lands_in_and_leaves_from_memory_of_any_kind(rig: Rig, kind: str) -> None:
    remote = rig.attach()
    memory = LANDINGS[kind]()
    with rig.reader.register(memory) as local:
        rig.reader.pull(remote, local, [Run(100, 0, 4096)], deadline_s=FAR_S)
        plain = memory.view(torch.int8).numpy() if isinstance(memory, torch.Tensor) else memory
        assert bytes(memoryview(plain).cast("B")) == rig.owned.buffer[100:4196].tobytes()  # type: ignore[arg-type]
        rig.reader.push(local, remote, [Run(8192, 0, 4096)], deadline_s=FAR_S)
        assert np.array_equal(rig.owned.buffer[8192:12288], rig.owned.buffer[100:4196])


runs_strategy = st.lists(
    st.builds(
        Run, st.integers(0, NBYTES - 1), st.integers(0, NBYTES - 1), st.integers(1, 20_000)
    ).map(lambda run: run._replace(nbytes=min(run.nbytes, NBYTES - max(run[0], run[1])))),
    max_size=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    runs=runs_strategy, piece_nbytes=st.sampled_from([1000, 16_384, 1 << 20]), pulls=st.booleans()
)
def test_2_exactly_the_bytes_of_all_runs_move(
    rig: Rig, runs: list[Run], piece_nbytes: int, pulls: bool
) -> None:
    remote = rig.attach()
    rig.target[:] = np.arange(NBYTES) % 251
    expected = (rig.target if pulls else rig.owned.buffer).copy()
    for remote_offset, local_offset, nbytes in runs:
        if pulls:
            source = rig.owned.buffer[remote_offset : remote_offset + nbytes]
            expected[local_offset : local_offset + nbytes] = source
        else:
            source = rig.target[local_offset : local_offset + nbytes]
            expected[remote_offset : remote_offset + nbytes] = source
    if pulls:
        report = rig.reader.pull(
            remote, rig.local, runs, deadline_s=FAR_S, piece_nbytes=piece_nbytes
        )
    else:
        report = rig.reader.push(
            rig.local, remote, runs, deadline_s=FAR_S, piece_nbytes=piece_nbytes
        )
    assert np.array_equal(rig.target if pulls else rig.owned.buffer, expected)
    assert report.nbytes == sum(run.nbytes for run in runs)
    remote.close()


@pytest.mark.parametrize(
    "bad",
    [
        Run(-1, 0, 10),
        Run(0, -1, 10),
        Run(0, 0, 0),
        Run(0, 0, -5),
        Run(NBYTES, 0, 1),
        Run(0, NBYTES - 5, 6),
        Run(1 << 64, 0, 1),
        Run(0, 0, 1 << 64),
    ],
)
def test_3_one_run_out_of_bounds_moves_nothing(rig: Rig, bad: Run) -> None:
    remote = rig.attach()
    before = rig.owned.buffer.copy()
    with pytest.raises(OutOfBounds, match="run 1 of 2"):
        rig.reader.pull(remote, rig.local, [Run(0, 0, 10), bad], deadline_s=FAR_S)
    with pytest.raises(OutOfBounds):
        rig.reader.push(rig.local, remote, [bad], deadline_s=FAR_S)
    assert not rig.target.any()
    assert np.array_equal(rig.owned.buffer, before)
    assert rig.reader.statistics().num_refused == 2


def test_3_what_is_read_only_takes_no_bytes(rig: Rig) -> None:
    remote = rig.attach(writable=False)
    with pytest.raises(RegionReadOnly):
        rig.reader.push(rig.local, remote, [Run(0, 0, 10)], deadline_s=FAR_S)
    fixed = rig.reader.register(bytes(10))
    with pytest.raises(RegionReadOnly):
        rig.reader.pull(remote, fixed, [Run(0, 0, 10)], deadline_s=FAR_S)
    fixed.close()


def test_4_landed_is_told_each_piece_once_in_order_within_its_run(rig: Rig) -> None:
    remote = rig.attach()
    runs = [Run(0, 0, 2500), Run(2500, 2500, 500), Run(9000, 8000, 1000)]
    pieces: list[tuple[int, int]] = []

    def landed(offset: int, nbytes: int) -> None:
        pieces.append((offset, nbytes))
        here = rig.target[offset : offset + nbytes]
        assert here.any(), "told before it landed"
        assert not rig.target[offset + nbytes : 8000].any(), "a later piece had landed already"

    rig.reader.pull(remote, rig.local, runs, deadline_s=FAR_S, piece_nbytes=1000, landed=landed)
    assert pieces == [(0, 1000), (1000, 1000), (2000, 500), (2500, 500), (8000, 1000)]
    pieces.clear()
    rig.reader.push(
        rig.local,
        remote,
        runs,
        deadline_s=FAR_S,
        piece_nbytes=2000,
        landed=lambda offset, nbytes: pieces.append((offset, nbytes)),
    )
    assert pieces == [(0, 2000), (2000, 500), (2500, 500), (8000, 1000)]


def test_4_adjacent_runs_count_as_one(rig: Rig) -> None:
    remote = rig.attach()
    runs = [Run(0, 50, 10), Run(10, 60, 5), Run(15, 70, 5)]
    report = rig.reader.pull(remote, rig.local, runs, deadline_s=FAR_S)
    assert (report.num_runs, report.nbytes) == (2, 20)


def test_4_error_in_landed_stops_the_transfer(rig: Rig) -> None:
    remote = rig.attach()

    def landed(offset: int, nbytes: int) -> None:
        raise ArithmeticError("bad checksum")

    with pytest.raises(ArithmeticError, match="bad checksum"):
        rig.reader.pull(
            remote, rig.local, [Run(0, 0, 3000)], deadline_s=FAR_S, piece_nbytes=1000, landed=landed
        )
    assert not rig.target[1000:].any()


def test_9_descriptor_of_another_size_or_scheme_is_refused(rig: Rig) -> None:
    descriptor = rig.describe(writable=True, epoch=3, generation=9)
    with pytest.raises(BadDescriptor):
        rig.attach(replace(descriptor, scheme="carrier-pigeon"))
    for wrong_nbytes in (NBYTES - 1, 2 * NBYTES):
        wrong = replace(descriptor, nbytes=wrong_nbytes)
        if rig.backend.knows_memory:
            with pytest.raises(BadDescriptor):
                rig.attach(wrong)
            continue
        try:
            remote = rig.attach(wrong)
        except BadDescriptor:
            continue
        # The owner alone knows the size; it refuses what is not there.
        with pytest.raises(OutOfBounds):
            rig.reader.pull(remote, rig.local, [Run(NBYTES - 9, 0, 10)], deadline_s=FAR_S)
        remote.close()
    assert rig.reader.statistics().num_attached == 0
    remote = rig.attach(RegionDescriptor.from_bytes(descriptor.to_bytes()))
    assert remote.descriptor == descriptor
    assert remote.nbytes == NBYTES


def test_9_regions_of_another_transport_are_refused(rig: Rig) -> None:
    class Foreign:
        closed = False

    with pytest.raises(BadDescriptor):
        rig.reader.pull(Foreign(), rig.local, [], deadline_s=FAR_S)  # type: ignore[arg-type]


async def test_10_transfers_from_many_threads_move_the_right_bytes(large: Rig) -> None:
    remote = large.attach()
    share = LARGE_NBYTES // 4
    await asyncio.gather(
        *(
            large.reader.pull_async(
                remote,
                large.local,
                [Run(part * share, part * share, share)],
                deadline_s=FAR_S,
                piece_nbytes=1000,
                traffic=TrafficClass(part % 3),
            )
            for part in range(4)
        )
    )
    assert np.array_equal(large.target, large.owned.buffer)
    statistics = large.reader.statistics()
    assert (statistics.num_pulls, statistics.pulled_nbytes) == (4, LARGE_NBYTES)
    assert statistics.nbytes_by_traffic == (2 * share, share, share)


async def test_small_async_transfers_move_the_same_bytes(rig: Rig) -> None:
    remote = rig.attach()
    report = await rig.reader.pull_async(remote, rig.local, [Run(5, 0, 77)], deadline_s=FAR_S)
    assert report.nbytes == 77
    assert np.array_equal(rig.target[:77], rig.owned.buffer[5:82])
    rig.target[:77] = 9
    await rig.reader.push_async(rig.local, remote, [Run(0, 0, 77)], deadline_s=FAR_S)
    assert (rig.owned.buffer[:77] == 9).all()


def test_populated_region_moves_the_same_bytes(rig: Rig) -> None:
    remote = rig.attach(populate=True)
    rig.reader.pull(remote, rig.local, [Run(0, 0, NBYTES)], deadline_s=FAR_S)
    assert np.array_equal(rig.target, rig.owned.buffer)


def test_every_refusal_is_a_transport_error_with_a_region_left_usable(rig: Rig) -> None:
    remote = rig.attach()
    for runs in ([Run(0, 0, 0)], [Run(0, NBYTES, 1)]):
        with pytest.raises(TransportError):
            rig.reader.pull(remote, rig.local, runs, deadline_s=FAR_S)
    rig.reader.pull(remote, rig.local, [Run(0, 0, NBYTES)], deadline_s=FAR_S)
    assert np.array_equal(rig.target, rig.owned.buffer)


def test_closed_region_cannot_be_described(rig: Rig) -> None:
    region: MemoryRegion = rig.owner.register(bytearray(4096))
    region.close()
    with pytest.raises(TransportClosed):
        rig.owner.describe(region)
