"""Pulls of more than a client may lease at once: whole, in pieces, and good as far as they came."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from snowskin.kvstore.client.machine import Call, PullBounds
from snowskin.kvstore.errors import DeadlineExceeded, LeaseShareExceeded, NodeUnavailable
from snowskin.kvstore.messages import WakeReason
from tests.support.client_stage import SETTINGS, Stage
from tests.support.node_driver import BLOCK, lease_of

QUARTER = {"max_leased_ratio": 0.5, "max_client_leased_ratio": 0.25}
RUN = "a b c d e f"


@pytest.fixture
def stage() -> Stage:
    stage = Stage(**QUARTER)
    stage.run(stage.publish(RUN))
    return stage


def landed(stage: Stage) -> int:
    """Blocks that lie where they belong."""
    wrong = np.flatnonzero(stage.landing != stage.memory)
    return int(wrong[0]) // BLOCK if len(wrong) else len(stage.landing) // BLOCK


def test_a_run_of_three_shares_comes_whole_in_three_pieces(stage):
    pulled = stage.run(stage.pull(RUN))
    assert (pulled.num_blocks, pulled.nbytes, pulled.num_extents) == (6, 6 * BLOCK, 3)
    assert (pulled.num_blocks_withheld, pulled.broken_by) == (0, None)
    assert pulled.wake_reason is WakeReason.SATISFIED
    assert landed(stage) == 6
    piece = ["Match", "Move", "Release", "Release"]
    assert stage.kinds() == [*piece, *piece, *piece[:3]]
    stage.assert_nothing_is_held()


def test_the_look_up_is_told_of_once(stage):
    found = []
    bounds = PullBounds(on_found=lambda: found.append(stage.node.now_s))
    assert stage.run(stage.pull(RUN, bounds=bounds)).num_blocks == 6
    assert len(found) == 1


def test_blocks_for_one_reader_come_in_pieces_too():
    stage = Stage(**QUARTER)
    stage.run(stage.publish(RUN, one_reader=True))
    assert stage.run(stage.pull(RUN)).num_blocks == 6
    assert stage.node.state.stat().num_blocks == 0


def test_leases_of_others_end_a_pull_where_they_begin(stage):
    others = [stage.node.session(name) for name in ("first", "second")]
    lease = lease_of(stage.node.match(others[0], "a b"))
    stage.node.match(others[1], "c d")
    pulled = stage.run(stage.pull(RUN))
    assert (pulled.num_blocks, pulled.num_blocks_withheld, pulled.broken_by) == (4, 2, None)
    assert landed(stage) == 4
    with pytest.raises(LeaseShareExceeded):
        stage.run(stage.pull("e f"))
    stage.node.release(others[0], lease)
    assert stage.run(stage.pull("e f")).num_blocks == 2


@pytest.mark.parametrize("kind", ["Match", "Move"])
def test_what_came_before_a_piece_failed_is_good(stage, kind):
    stage.fail_at = {"Match": 4, "Move": 5}[kind]
    stage.fail_with = NodeUnavailable("cut")
    pulled = stage.run(stage.pull(RUN))
    assert (pulled.num_blocks, pulled.broken_by) == (2, stage.fail_with)
    assert landed(stage) == 2
    assert stage.kinds()[stage.fail_at] == kind


def test_a_release_that_nobody_heard_ends_a_pull_and_loses_nothing(stage):
    stage.fail_at, stage.fail_with = 3, DeadlineExceeded("late")
    pulled = stage.run(stage.pull(RUN))
    assert (pulled.num_blocks, pulled.num_blocks_withheld) == (2, 0)
    assert pulled.broken_by is stage.fail_with


def test_no_question_of_a_pull_waits_for_longer_than_its_look_up_may(stage):
    assert stage.run(stage.pull(RUN, bounds=PullBounds(lookup_timeout_s=0.02))).num_blocks == 6
    waits_s = [step.timeout_s for step in stage.steps if isinstance(step, Call)]
    assert waits_s == [0.02] * 5  # three look-ups, and two releases that must be heard


def test_a_corrupt_block_of_a_later_piece_is_counted_from_the_first(stage):
    place = stage.node.match(stage.node.session(), "d").runs[0].extent.offset
    stage.pool[place] ^= 1
    stage.node.wait(100)
    pulled = stage.run(stage.pull(RUN))
    assert (pulled.num_blocks, pulled.corrupt_blocks) == (3, (3,))
    assert stage.node.probe(stage.session, RUN) == "xxx.xx"


def test_a_pull_that_does_not_verify_comes_in_pieces_too(stage):
    pulled = stage.run(stage.pull(RUN, replace(SETTINGS, verify=False)))
    assert (pulled.num_blocks, landed(stage)) == (6, 6)
