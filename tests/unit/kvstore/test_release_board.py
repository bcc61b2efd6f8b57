"""Release boards: what the reader leaves, the node takes, once, in order, and no more than fits."""

from __future__ import annotations

import os

import pytest

from snowskin.kvstore.release_board import NUM_SLOTS, ReleaseBoard, make_descriptor


@pytest.fixture
def sides():
    descriptor = make_descriptor()
    reader, node = ReleaseBoard(descriptor), ReleaseBoard(descriptor)
    os.close(descriptor)
    yield reader, node
    reader.close()
    node.close()


def test_what_is_posted_is_taken_once_and_in_order(sides):
    reader, node = sides
    assert all(reader.post(lease_id) for lease_id in (7, 3, 2**64 - 1))
    assert node.take() == [7, 3, 2**64 - 1]
    assert node.take() == []


def test_a_full_board_refuses_and_takes_again_when_it_was_read(sides):
    reader, node = sides
    assert all(reader.post(lease_id) for lease_id in range(1, NUM_SLOTS + 1))
    assert not reader.post(9999)
    assert node.take() == list(range(1, NUM_SLOTS + 1))
    assert reader.post(9999)
    assert node.take() == [9999]


def test_the_circle_goes_on_for_ever(sides):
    reader, node = sides
    for lease_id in range(1, 3 * NUM_SLOTS):
        assert reader.post(lease_id)
        assert node.take() == [lease_id]


def test_a_reader_that_scribbles_all_over_costs_at_most_one_board_a_look(sides):
    reader, node = sides
    for _ in range(3):
        for _ in range(NUM_SLOTS):
            reader.post(5)
        assert len(node.take()) == NUM_SLOTS


def test_the_board_cannot_be_made_smaller_under_the_node():
    descriptor = make_descriptor()
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, 0)
    os.close(descriptor)
