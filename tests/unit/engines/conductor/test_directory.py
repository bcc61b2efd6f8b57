"""Watching nodes: one stream each, opened again from where the view stands, and nothing left open."""

from __future__ import annotations

import asyncio

import pytest

from snowskin.engines.conductor import directory as directory_module
from snowskin.engines.conductor.directory import Directory
from snowskin.kvstore.blocks import KeyColumn, digest_number, digest_part
from snowskin.kvstore.clock import ManualClock
from snowskin.kvstore.directory.view import Sync
from snowskin.kvstore.errors import NodeUnavailable
from snowskin.kvstore.messages import BlockChange, Watched, WatchRequest

NAMESPACE = b"n" * 32
KEYS = [bytes([at]) * 32 for at in range(8)]


class FakeNode:
    """Streams of one node; `say` puts a message, an error, or "silence" into the one that is open."""

    def __init__(self):
        self.requests: list[WatchRequest] = []
        self.said: asyncio.Queue = asyncio.Queue()
        self.num_open = 0
        self.opened = asyncio.Event()

    async def watch(self, address, request):
        self.requests.append(request)
        self.num_open += 1
        self.opened.set()
        try:
            while True:
                what = await self.said.get()
                if isinstance(what, Exception):
                    raise what
                if what is None:
                    return
                yield what
        finally:
            self.num_open -= 1

    def say(self, *what):
        for each in what:
            self.said.put_nowait(each)

    async def is_asked(self, times):
        async with asyncio.timeout(5):
            while len(self.requests) < times:
                self.opened.clear()
                await self.opened.wait()


def message(*keys, sequence, held=(), **fields):
    """In sync, holding `held`."""
    digest = 0
    for key in held:
        digest ^= digest_part(digest_number(NAMESPACE), key)
    change = BlockChange(namespace=NAMESPACE, keys=KeyColumn.of(keys))
    return Watched(
        node_epoch=1,
        sequence=sequence,
        changes=(change,) if keys else (),
        in_sync=True,
        num_blocks=len(held),
        digest=digest,
        **fields,
    )


FIRST = message(*KEYS[:2], sequence=5, held=KEYS[:2], snapshot_begins=True)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(directory_module, "MIN_PAUSE_S", 0.001)


@pytest.fixture
def node():
    return FakeNode()


@pytest.fixture
async def directory(node):
    made = Directory(node.watch, ManualClock(), silence_s=5.0)
    yield made
    await made.close()
    assert node.num_open == 0


async def in_sync(directory, address="a"):
    async with asyncio.timeout(5):
        await directory.wait_in_sync(address)


def located(directory, *keys):
    return directory.locate([NAMESPACE], KeyColumn.of(keys)).bitmaps


async def test_a_wanted_node_is_watched_once_and_located_by_when_in_sync(directory, node):
    directory.want("a")
    directory.want("a")
    directory.want("")
    assert located(directory, KEYS[0]) == {}
    node.say(FIRST)
    await in_sync(directory)
    assert located(directory, *KEYS[:3]) == {"a": 0b11}
    assert node.requests == [WatchRequest()]
    assert directory.knowledge("a").num_blocks == 2


@pytest.mark.parametrize(
    "end", [None, NodeUnavailable("gone"), OSError("odd")], ids=["ends", "breaks", "crashes"]
)
async def test_a_stream_that_is_over_is_opened_again_where_the_view_stands(directory, node, end):
    directory.want("a")
    node.say(FIRST)
    await in_sync(directory)
    node.say(end)
    await node.is_asked(2)
    assert located(directory, KEYS[0]) == {}, "a node without a stream is not spoken of"
    assert node.requests[1] == WatchRequest(node_epoch=1, sequence=5)
    node.say(message(KEYS[2], sequence=6, held=KEYS[:3]))
    await in_sync(directory)
    assert located(directory, *KEYS[:3]) == {"a": 0b111}


async def test_what_does_not_follow_is_asked_anew_from_nothing(directory, node):
    directory.want("a")
    node.say(FIRST, message(KEYS[2], sequence=9, held=KEYS[:3]))
    await node.is_asked(2)
    assert node.requests[1] == WatchRequest()
    assert directory.knowledge("a").num_astray == 1
    node.say(FIRST)
    await in_sync(directory)


async def test_silence_is_trouble(node):
    directory = Directory(node.watch, ManualClock(), silence_s=0.01)
    directory.want("a")
    node.say(FIRST)
    await node.is_asked(2)
    assert directory.knowledge("a").sync is Sync.SUSPECT
    await directory.close()


async def test_a_node_that_nobody_names_is_let_go_and_forgotten(directory, node):
    directory.want("a")
    node.say(FIRST)
    await in_sync(directory)
    await directory.keep_only({"a"})
    assert node.num_open == 1
    await directory.keep_only(())
    assert node.num_open == 0
    assert directory.knowledge("a").sync is Sync.UNKNOWN
    assert directory.view.blocks("a") == set()
    directory.view.check()


async def test_a_node_that_is_named_again_while_it_is_let_go_goes_on_from_there(directory, node):
    directory.want("a")
    node.say(FIRST)
    await in_sync(directory)
    letting_go = asyncio.create_task(directory.keep_only(()))
    await asyncio.sleep(0)
    directory.want("a")
    await letting_go
    await node.is_asked(2)
    node.say(message(KEYS[2], sequence=6, held=KEYS[:3]))
    await in_sync(directory)
    assert directory.knowledge("a").num_astray == 0
    directory.view.check()


async def test_a_closed_directory_watches_nobody(directory, node):
    directory.want("a")
    await node.is_asked(1)
    await directory.close()
    directory.want("b")
    await asyncio.sleep(0)
    assert len(node.requests) == 1
