"""The node's state against a memory (tests/support/node_machine.py), and the machine against planted bugs.

With the node's own books unchecked, the memory alone must find each bug of `PLANTED`.
"""

from __future__ import annotations

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.support import node_plants
from tests.support.node_machine import NodeMachine

NodeMachine.TestCase.settings = settings(stateful_step_count=60, deadline=None)
TestNodeMachine = NodeMachine.TestCase


# --- the machine finds what it is for


class ModelOnly(NodeMachine):
    """Does not look into the node's books."""

    checks_books = False


PLANTED = [
    node_plants.lost_release,
    node_plants.double_free,
    node_plants.commit_after_expiry,
    node_plants.eviction_under_a_lease,
    node_plants.no_grace,
    node_plants.stale_generation,
    node_plants.no_quarantine,
    node_plants.quarantine_for_ever,
    node_plants.no_deadline,
    node_plants.no_shares,
    node_plants.no_share_for_anybody,
]


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_machine_finds_planted_bug(plant, monkeypatch, capsys):
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            ModelOnly,
            settings=settings(
                max_examples=300,
                stateful_step_count=60,
                derandomize=True,
                database=None,
                deadline=None,
                phases=[Phase.generate],
                report_multiple_bugs=False,
                print_blob=False,
            ),
        )
    capsys.readouterr()
