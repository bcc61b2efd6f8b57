"""What a copy promises its caller when it ends early, and how its errors are said."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from snowskin.kvstore.client.region_moves import until_settled
from snowskin.transport.memory import region_of


async def test_a_cancelled_copy_is_over_when_nothing_of_it_can_land_any_more():
    with region_of(np.zeros(100, np.uint8)) as target:
        target.quarantine("piece", [(0, 100)])
        task = asyncio.create_task(until_settled(asyncio.Event().wait(), target))
        for _ in range(3):  # however often it is cancelled
            await asyncio.sleep(0)
            task.cancel()
        done, _ = await asyncio.wait([task], timeout=0.02)
        assert not done
        target.lift_quarantine("piece")
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_copy_that_ended_well_is_not_waited_for():
    with region_of(np.zeros(100, np.uint8)) as target:
        done = asyncio.get_running_loop().create_future()
        done.set_result(None)
        await asyncio.wait_for(until_settled(done, target), 5)
