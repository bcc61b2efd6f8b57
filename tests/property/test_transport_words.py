"""Descriptors survive any input; runs are joined and cut without losing a byte."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

from snowskin.transport.descriptor import MAX_DESCRIPTOR_NBYTES, RegionDescriptor, new_capability
from snowskin.transport.errors import BadDescriptor
from snowskin.transport.runs import Run, joined, num_joined, pieces

uint64s = st.integers(0, 2**64 - 1)
descriptors = st.builds(
    RegionDescriptor,
    scheme=st.text(st.characters(codec="ascii"), min_size=1, max_size=32),
    capability=st.binary(min_size=16, max_size=16),
    nbytes=st.integers(1, 2**64 - 1),
    epoch=uint64s,
    generation=uint64s,
    expires_in_s=st.floats(min_value=0, allow_nan=False),
    extra=st.binary(max_size=100),
)
VALID = RegionDescriptor(scheme="shm", capability=bytes(16), nbytes=4096).to_bytes()


@given(descriptors)
def test_descriptor_comes_back_as_it_was(descriptor: RegionDescriptor) -> None:
    data = descriptor.to_bytes()
    assert len(data) <= MAX_DESCRIPTOR_NBYTES
    assert RegionDescriptor.from_bytes(data) == descriptor


@given(st.binary(max_size=200))
def test_any_bytes_are_a_descriptor_or_refused(data: bytes) -> None:
    try:
        descriptor = RegionDescriptor.from_bytes(data)
    except BadDescriptor:
        return
    assert descriptor.to_bytes() == data


@given(
    edits=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=4),
    end=st.integers(0, len(VALID)),
    behind=st.binary(max_size=3),
)
@example(edits=[], end=len(VALID), behind=b"x")
def test_damaged_descriptor_is_another_or_refused(
    edits: list[tuple[int, int]], end: int, behind: bytes
) -> None:
    data = bytearray(VALID)
    for at, value in edits:
        data[at] = value
    damaged = bytes(data[:end]) + behind
    try:
        descriptor = RegionDescriptor.from_bytes(damaged)
    except BadDescriptor:
        return
    assert descriptor.to_bytes() == damaged


@pytest.mark.parametrize(
    "change",
    [
        {"scheme": ""},
        {"scheme": "x" * 33},
        {"scheme": "größe"},
        {"capability": bytes(15)},
        {"nbytes": 0},
        {"nbytes": 2**64},
        {"epoch": -1},
        {"expires_in_s": math.nan},
        {"expires_in_s": -1.0},
        {"extra": bytes(MAX_DESCRIPTOR_NBYTES)},
    ],
    ids=lambda change: str(*change),
)
def test_descriptor_that_cannot_travel_is_refused(change: dict[str, object]) -> None:
    fields = {"scheme": "shm", "capability": bytes(16), "nbytes": 1} | change
    with pytest.raises(BadDescriptor):
        RegionDescriptor(**fields)  # type: ignore[arg-type]


def test_capabilities_differ_and_are_not_printed() -> None:
    one, other = new_capability(), new_capability()
    assert one != other
    described = RegionDescriptor(scheme="shm", capability=one, nbytes=1, extra=other)
    assert one.hex() not in repr(described)
    assert repr(one) not in repr(described)


@given(
    st.lists(st.builds(Run, st.integers(0, 40), st.integers(0, 40), st.integers(1, 9)), max_size=8),
    st.integers(1, 5),
)
def test_joined_and_cut_runs_name_the_same_bytes_in_order(
    runs: list[Run], piece_nbytes: int
) -> None:
    def byte_pairs(batch: list[Run]) -> list[tuple[int, int]]:
        return [
            (remote + at, local + at) for remote, local, nbytes in batch for at in range(nbytes)
        ]

    assert byte_pairs(joined(runs)) == byte_pairs(runs)
    assert num_joined(runs) == len(joined(runs))
    cut = list(pieces(runs, piece_nbytes))
    assert byte_pairs(cut) == byte_pairs(runs)
    assert all(1 <= piece.nbytes <= piece_nbytes for piece in cut)


def test_runs_adjacent_on_both_sides_are_joined() -> None:
    assert joined([Run(0, 8, 4), Run(4, 12, 4), Run(8, 20, 4)]) == [Run(0, 8, 8), Run(8, 20, 4)]
