"""What a session on the local door may map: for as long as it lives, and for writing only where it said so."""

from __future__ import annotations

import pytest

from snowskin.kvstore.node.reach import NodeReach
from snowskin.transport.choice import TransportProbe
from snowskin.transport.descriptor import RegionDescriptor
from tests.support.served_node import ServedNode


@pytest.mark.parametrize("may_write", [True, False])
async def test_a_sessions_grants_say_what_it_may_and_end_with_it(may_write):
    node = ServedNode()
    shell = node.shell
    try:
        sessions = [
            shell.open_session("c", lambda *_: None, maps_memory=True, may_write=may_write)
            for _ in range(3)
        ]
        greetings = [shell.greeting(session) for session in sessions]
        for greeting in greetings:
            assert RegionDescriptor.from_bytes(greeting.pools[0].region).writable is may_write
        assert shell._transport.statistics().num_grants == 3
        for session in sessions:
            shell.end_session(session)
        assert shell._transport.statistics().num_grants == 0
    finally:
        shell.close()


async def test_an_operator_sees_on_what_pages_the_pools_lie():
    node = ServedNode(huge_pages="never", dram_nbytes=4 << 20)
    try:
        small = ("pages of pool 0", "pages of 4 KiB")
        assert node.shell.pages() == (small,)
        probe = TransportProbe(scheme="shm", available=True, reason="a memfd was made")
        reach = NodeReach(probes={"shm": probe}, pages=node.shell.pages)
        (shown,) = reach.report(door="").transports
        assert shown.probe.facts == (small,)
    finally:
        node.shell.close()
