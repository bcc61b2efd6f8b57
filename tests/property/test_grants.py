"""Granted ranges against bytes: a range is granted exactly when all its bytes are, and those that touch are one."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
from hypothesis import given

from snowskin.transport.grants import GrantedRanges
from snowskin.transport.words import Range

REGION_NBYTES = 40


@st.composite
def ranges(draw):
    offset = draw(st.integers(0, REGION_NBYTES - 1))
    return Range(offset, draw(st.integers(1, REGION_NBYTES - offset)))


@given(
    granted=st.lists(ranges(), min_size=1, max_size=6),
    offset=st.integers(0, REGION_NBYTES + 2),
    nbytes=st.integers(0, REGION_NBYTES + 2),
)
def test_a_range_is_granted_exactly_when_all_its_bytes_are(granted, offset, nbytes):
    bytes_granted = set(itertools.chain(*(range(at, at + size) for at, size in granted)))
    expected = nbytes > 0 and bytes_granted.issuperset(range(offset, offset + nbytes))
    assert GrantedRanges(granted, REGION_NBYTES).contain(offset, nbytes) == expected


@given(
    granted=st.lists(ranges(), min_size=1, max_size=6),
    asked=st.lists(
        st.tuples(st.integers(0, REGION_NBYTES + 2), st.integers(0, REGION_NBYTES + 2)), max_size=8
    ),
)
def test_of_many_ranges_the_first_that_was_not_granted_is_found(granted, asked):
    held = GrantedRanges(granted, REGION_NBYTES)
    outside = [index for index, each in enumerate(asked) if not held.contain(*each)]
    assert held.first_outside(asked) == (outside[0] if outside else None)


@given(granted=st.lists(ranges(), min_size=1, max_size=6))
def test_granted_ranges_are_in_order_apart_and_the_same_bytes(granted):
    joined = list(GrantedRanges(granted, REGION_NBYTES))
    for before, after in itertools.pairwise(joined):
        assert before.offset + before.nbytes < after.offset
    of = lambda each: set(itertools.chain(*(range(at, at + size) for at, size in each)))  # noqa: E731
    assert of(joined) == of(granted)
