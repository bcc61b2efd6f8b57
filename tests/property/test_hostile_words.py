"""Any bytes at all, where a peer may say them: refused or understood, never anything else. See tests/fuzz."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given

from tests.fuzz import conversations
from tests.fuzz.targets import SEEDS, TARGETS

ALL = sorted(TARGETS)


@st.composite
def damaged(draw, target):
    """A well-formed input with some bytes changed, and cut."""
    data = bytearray(draw(st.sampled_from(SEEDS[target])))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data) - 1))
        data[at] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))])


@pytest.mark.timeout(600)  # by night ten thousand examples
@pytest.mark.parametrize("target", ALL)
@given(data=st.data())
def test_any_bytes_are_refused_or_understood(target, data):
    TARGETS[target](data.draw(st.binary(max_size=300) | damaged(target)))


@pytest.mark.parametrize("target", ALL)
def test_what_the_fuzzer_begins_with_is_understood(target):
    for seed in SEEDS[target]:
        TARGETS[target](seed)


def test_the_fuzzer_begins_with_conversations_that_go_through_to_the_end():
    counts = sum((conversations.owner(seed) for seed in SEEDS["owner"]), Counter())
    assert {"served", "failed", "GRANT_REFUSED", "OUT_OF_BOUNDS", "BAD_FRAME"} <= counts.keys()
    outcomes = {conversations.reader_pulls(seed) for seed in SEEDS["reader_pulls"]}
    assert (
        {"", "GRANT_REFUSED", "BAD_FRAME", "PEER_LOST"}
        >= outcomes
        >= {"", "GRANT_REFUSED", "BAD_FRAME"}
    )
    assert "" in {conversations.reader_pushes(seed) for seed in SEEDS["reader_pushes"]}
