"""What was left for a reader that will not come: freed without being read."""

from __future__ import annotations

import pytest

from snowskin.kvstore.client import machine
from tests.support.client_stage import NUM_BLOCKS, SETTINGS, Stage
from tests.support.node_driver import NAMESPACE, column


@pytest.fixture
def stage() -> Stage:
    return Stage()


def test_discarding_frees_what_is_there_and_reads_nothing(stage):
    stage.run(stage.publish("a b", one_reader=True))
    stage.run(stage.publish("d", first=2, one_reader=True))
    stage.run(stage.publish_tail())
    flow = machine.discard(SETTINGS, namespace=NAMESPACE, keys=column("z a b c d e"), tail_id="r1")
    assert stage.run(flow) == 4
    assert "Move" not in stage.kinds()
    assert stage.node.books() == {"free": NUM_BLOCKS}
    stage.assert_nothing_is_held()


def test_discarding_more_than_a_client_may_lease_at_once_frees_all_of_it():
    stage = Stage(max_client_leased_ratio=0.25)
    stage.run(stage.publish("a b c d e f", one_reader=True))
    flow = machine.discard(SETTINGS, namespace=NAMESPACE, keys=column("a b c d e f"))
    assert stage.run(flow) == 6
    assert stage.node.books() == {"free": NUM_BLOCKS}
    stage.assert_nothing_is_held()


def test_discarding_takes_no_block_that_is_for_everybody(stage):
    stage.run(stage.publish("a b"))
    stage.run(machine.discard(SETTINGS, namespace=NAMESPACE, keys=column("a b")))
    assert stage.node.books() == {"free": NUM_BLOCKS - 2, "committed": 2}
    stage.assert_nothing_is_held()


def test_discarding_what_is_not_there_is_nothing(stage):
    flow = machine.discard(SETTINGS, namespace=NAMESPACE, keys=column("a b"), tail_id="r1")
    assert stage.run(flow) == 0
    assert stage.kinds() == ["Probe", "Match"]
