"""Asking nodes: within the budget, without a loop of attempts, and nothing left open."""

from __future__ import annotations

import asyncio

import pytest

from snowskin.engines.conductor.nodes import MIN_PAUSE_S, NodeHit, Nodes
from snowskin.kvstore.blocks import KeyColumn
from snowskin.kvstore.clock import ManualClock
from snowskin.kvstore.errors import DeadlineExceeded, NodeUnavailable
from snowskin.kvstore.messages import Probed

KEYS = KeyColumn.of([bytes([at]) * 32 for at in range(10)])
NAMESPACES = (b"n" * 32,)


class FakeNode:
    def __init__(self) -> None:
        self.connected = True
        self.num_closed = 0
        self.error: NodeUnavailable | None = None
        self.hangs = False
        self.num_probes = 0

    async def probe(self, *, namespaces, keys):
        self.num_probes += 1
        if self.hangs:
            await asyncio.Event().wait()
        if self.error:
            raise self.error
        return Probed(num_blocks=2, present_bitmap=b"\x83\x01", node_epoch=1)

    async def stat(self):
        await asyncio.Event().wait()

    async def close(self):
        self.num_closed += 1


class FakeNet:
    """Connects to `nodes`; what is not there cannot be reached."""

    def __init__(self) -> None:
        self.nodes: dict[str, FakeNode] = {}
        self.attempts: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def connect(self, address):
        self.attempts.append(address)
        await self.gate.wait()
        if address not in self.nodes:
            raise NodeUnavailable(f"nobody at {address}")
        return self.nodes[address]


@pytest.fixture
def net():
    return FakeNet()


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
async def nodes(net, clock):
    made = Nodes(net.connect, clock)
    yield made
    await made.close()


async def probed(nodes, *addresses, timeout_s=5.0):
    return await nodes.probe(addresses, namespaces=NAMESPACES, keys=KEYS, timeout_s=timeout_s)


async def test_a_node_says_its_run_and_all_that_is_present(net, nodes):
    net.nodes["a"] = FakeNode()
    (hit,) = await probed(nodes, "a")
    assert hit == NodeHit(address="a", num_blocks=2, bitmap=0b1_1000_0011)
    assert hit.num_blocks_present == 4


async def test_one_dead_node_does_not_hide_the_others(net, nodes):
    net.nodes["a"] = FakeNode()
    dead, alive = await probed(nodes, "dead", "a")
    assert "nobody at dead" in dead.error
    assert alive.num_blocks == 2


async def test_a_silent_node_costs_the_budget_and_no_more(net, nodes):
    net.nodes["a"] = FakeNode()
    net.nodes["a"].hangs = True
    (hit,) = await probed(nodes, "a", timeout_s=0.01)
    assert "no answer within 0.01 s" in hit.error


async def test_connecting_outlives_the_question_that_began_it(net, nodes):
    net.nodes["a"] = FakeNode()
    net.gate.clear()
    (hit,) = await probed(nodes, "a", timeout_s=0.01)
    assert hit.error
    net.gate.set()
    assert (await probed(nodes, "a"))[0].num_blocks == 2
    assert net.attempts == ["a"]


async def test_a_node_that_is_let_go_while_it_is_asked_is_an_answer_and_no_cancellation(net, nodes):
    net.gate.clear()
    asking = asyncio.create_task(probed(nodes, "a"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await nodes.keep_only(())
    (hit,) = await asking
    assert "not connected" in hit.error


async def test_an_error_of_connecting_that_nobody_foresaw_is_an_answer_too(net, clock):
    async def broken(address):
        raise OSError("no more files")

    nodes = Nodes(broken, clock)
    (hit,) = await probed(nodes, "a")
    assert "OSError" in hit.error
    await nodes.close()


async def test_a_node_that_cannot_be_reached_is_tried_again_with_a_growing_pause(net, nodes, clock):
    for wanted in (1, 1):
        assert (await probed(nodes, "a"))[0].error
        assert len(net.attempts) == wanted
    clock.advance(MIN_PAUSE_S)
    await probed(nodes, "a")
    assert len(net.attempts) == 2
    clock.advance(MIN_PAUSE_S)
    await probed(nodes, "a")
    assert len(net.attempts) == 2, "the second pause is longer"
    clock.advance(MIN_PAUSE_S)
    net.nodes["a"] = FakeNode()
    assert (await probed(nodes, "a"))[0].num_blocks == 2


async def test_a_lost_node_is_closed_and_connected_anew(net, nodes, clock):
    first = net.nodes["a"] = FakeNode()
    await probed(nodes, "a")
    first.error = NodeUnavailable("gone")
    assert "gone" in (await probed(nodes, "a"))[0].error
    net.nodes["a"] = FakeNode()
    clock.advance(MIN_PAUSE_S)
    await asyncio.sleep(0)
    assert (await probed(nodes, "a"))[0].num_blocks == 2
    assert first.num_closed == 1


async def test_a_connection_that_broke_by_itself_is_noticed(net, nodes, clock):
    first = net.nodes["a"] = FakeNode()
    await probed(nodes, "a")
    first.connected = False
    net.nodes["a"] = FakeNode()
    assert (await probed(nodes, "a"))[0].error
    clock.advance(MIN_PAUSE_S)
    assert (await probed(nodes, "a"))[0].num_blocks == 2
    assert first.num_closed == 1


async def test_a_stat_without_an_answer_has_a_deadline(net, nodes):
    net.nodes["a"] = FakeNode()
    with pytest.raises(DeadlineExceeded):
        await nodes.stat("a", timeout_s=0.01)


async def test_nodes_that_nobody_names_are_let_go(net, nodes):
    net.nodes = {"a": FakeNode(), "b": FakeNode()}
    await probed(nodes, "a", "b")
    await nodes.keep_only({"b"})
    assert (net.nodes["a"].num_closed, net.nodes["b"].num_closed) == (1, 0)
    await nodes.close()
    assert net.nodes["b"].num_closed == 1
    assert "stopping" in (await probed(nodes, "b"))[0].error


async def test_closing_ends_an_attempt_to_connect(net, nodes):
    net.gate.clear()
    nodes.want("a")
    await asyncio.sleep(0)
    assert net.attempts == ["a"]
    await nodes.close()


# --- what a request may lose


async def asked(nodes, *addresses):
    """As for a request: no time is given."""
    return await nodes.probe(addresses, namespaces=NAMESPACES, keys=KEYS)


async def test_a_silent_node_costs_a_request_its_budget_and_is_then_left_alone(net, nodes):
    node = net.nodes["a"] = FakeNode()
    assert (await probed(nodes, "a"))[0].num_blocks == 2
    node.hangs = True
    (hit,) = await asked(nodes, "a")
    assert "did not answer within" in hit.error
    guard = nodes._nodes["a"].guard
    async with asyncio.timeout(10):
        while guard.usable:  # noqa: ASYNC110  the guard has no event for it
            await asyncio.sleep(0.001)
    num_probes = node.num_probes
    (hit,) = await asked(nodes, "a")
    assert "left alone" in hit.error
    assert node.num_probes == num_probes
    node.hangs = False
    async with asyncio.timeout(10):
        while not guard.usable:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert (await asked(nodes, "a"))[0].num_blocks == 2


async def test_a_silent_node_does_not_hide_what_another_has(net, nodes):
    net.nodes = {"a": FakeNode(), "b": FakeNode()}
    await probed(nodes, "a", "b")
    net.nodes["a"].hangs = True
    silent, other = await asked(nodes, "a", "b")
    assert silent.error
    assert other.num_blocks == 2


async def test_a_request_waits_for_a_first_connection_once_and_never_again(net, nodes):
    net.nodes["a"] = FakeNode()
    net.gate.clear()
    (hit,) = await asked(nodes, "a")
    assert "not connected yet" in hit.error
    task = asyncio.create_task(asked(nodes, "a"))
    for _ in range(5):  # turns of the loop: no timer has a part in it
        await asyncio.sleep(0)
    assert task.done()
    net.gate.set()
    assert (await probed(nodes, "a"))[0].num_blocks == 2
    assert (await asked(nodes, "a"))[0].num_blocks == 2
    assert net.attempts == ["a"]


async def test_a_request_does_not_wait_for_a_node_that_was_lost(net, nodes):
    node = net.nodes["a"] = FakeNode()
    assert (await asked(nodes, "a"))[0].num_blocks == 2
    node.error = NodeUnavailable("gone")
    assert "gone" in (await asked(nodes, "a"))[0].error
    net.gate.clear()
    task = asyncio.create_task(asked(nodes, "a"))
    for _ in range(5):
        await asyncio.sleep(0)
    assert task.done()
    net.gate.set()


async def test_a_node_that_a_look_finds_gone_is_lost_before_the_next_request(net, nodes):
    node = net.nodes["a"] = FakeNode()
    await probed(nodes, "a")
    node.hangs = True
    await asked(nodes, "a")
    node.error, node.hangs = NodeUnavailable("gone"), False
    async with asyncio.timeout(10):
        while nodes._nodes["a"].client is not None:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert not nodes.is_usable("a")
