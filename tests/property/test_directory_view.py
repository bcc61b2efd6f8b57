"""The directory view against a plain set: streams that lose, double and reorder messages never make it lie.

The node's side is played here: a set of blocks, a ring of changes, and for each subscription the messages of a stream,
snapshot pages and changes mixed. What the view says it knows must be the node's set as it was at the view's sequence.
"""

from __future__ import annotations

import hashlib
from collections import deque

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from snowskin.kvstore.blocks import KeyColumn, digest_number, digest_part
from snowskin.kvstore.directory.presence import Presence
from snowskin.kvstore.directory.view import DOUBT_S, DirectoryView, Sync
from snowskin.kvstore.errors import WatchAstray
from snowskin.kvstore.messages import BlockChange, Watched, WatchRequest
from snowskin.kvstore.wire import watch_request_from, watch_request_to, watched_from, watched_to
from snowskin.v1 import store_pb2

NAMESPACES = (b"a" * 32, b"b" * 32)
KEYS = [hashlib.sha256(b"%d" % at).digest() for at in range(8)]
RING = 6  # changes that a node remembers

some_keys = st.lists(st.sampled_from(KEYS), min_size=1, max_size=4, unique=True)
namespaces = st.sampled_from(NAMESPACES)


class Stream:
    """One subscription as the node sees it: what was written to it and has not arrived."""

    def __init__(self, node, request):
        self.node = node
        self.messages = deque()
        self.sequence = node.sequence
        self.begins = False
        self.pages = []
        known = request.node_epoch == node.epoch
        behind = node.sequence - request.sequence
        if known and 0 <= behind <= len(node.ring):
            missed = list(node.ring)[len(node.ring) - behind :]
            self.write(*missed, in_sync=True)
        else:
            self.begins = True
            self.pages = list(NAMESPACES)

    def write(self, *changes, in_sync):
        self.messages.append(
            Watched(
                node_epoch=self.node.epoch,
                sequence=self.node.sequence,
                changes=changes,
                snapshot_begins=self.begins,
                in_sync=in_sync,
                num_blocks=len(self.node.blocks) if in_sync else 0,
                digest=self.node.digest() if in_sync else 0,
            )
        )
        self.begins = False

    def write_page(self):
        """A namespace as it is at this place in the stream; behind the last one the subscriber is in sync."""
        namespace = self.pages.pop(0)
        keys = sorted(key for of, key in self.node.blocks if of == namespace)
        change = [BlockChange(namespace=namespace, keys=KeyColumn.of(keys))] if keys else []
        self.write(*change, in_sync=not self.pages)


class Node:
    """A set of blocks, and who watches it."""

    def __init__(self, epoch):
        self.epoch = epoch
        self.sequence = 0
        self.blocks = set()
        self.ring = deque(maxlen=RING)
        self.history = {0: frozenset()}
        self.stream = None

    def digest(self):
        total = 0
        for namespace, key in self.blocks:
            total ^= digest_part(digest_number(namespace), key)
        return total

    def change(self, namespace, keys, *, removed):
        changed = [key for key in keys if ((namespace, key) in self.blocks) == removed]
        if not changed:
            return
        for key in changed:
            (self.blocks.discard if removed else self.blocks.add)((namespace, key))
        record = BlockChange(namespace=namespace, keys=KeyColumn.of(changed), removed=removed)
        self.sequence += 1
        self.ring.append(record)
        self.history[self.sequence] = frozenset(self.blocks)
        if self.stream is not None:
            self.stream.write(record, in_sync=not self.stream.pages)


class ViewMachine(RuleBasedStateMachine):
    """Two nodes, one view; every stream may misbehave."""

    def __init__(self):
        super().__init__()
        self.view = DirectoryView()
        self.nodes = {}
        self.histories = {}
        self.num_epochs = 0
        self.now_s = 0.0
        self.doubts = {}  # (address, namespace, key) -> until when

    @initialize()
    def start(self):
        for address in ("n:1", "n:2"):
            self.restart(address)

    addresses = st.sampled_from(["n:1", "n:2"])

    @rule(address=addresses)
    def restart(self, address):
        self.num_epochs += 1
        self.nodes[address] = node = Node(self.num_epochs)
        self.histories[self.num_epochs] = node.history
        self.view.suspect(address)

    @rule(address=addresses, namespace=namespaces, keys=some_keys, removed=st.booleans())
    def change(self, address, namespace, keys, removed):
        self.nodes[address].change(namespace, keys, removed=removed)

    @rule(address=addresses)
    def subscribe(self, address):
        node = self.nodes[address]
        node.stream = Stream(node, self.view.request(address))

    @rule(address=addresses)
    def settle(self, address):
        """The stream comes through to the last message, as streams mostly do."""
        node = self.nodes[address]
        if node.stream is None:
            self.subscribe(address)
        while node.stream is not None and (node.stream.pages or node.stream.messages):
            if node.stream.pages:
                node.stream.write_page()
            else:
                self.arrives(address, "")

    @rule(address=addresses)
    def breaks(self, address):
        self.nodes[address].stream = None
        self.view.suspect(address)

    @rule(address=addresses)
    def page(self, address):
        stream = self.nodes[address].stream
        if stream is not None and stream.pages:
            stream.write_page()

    @rule(address=addresses)
    def beat(self, address):
        stream = self.nodes[address].stream
        if stream is not None and not stream.pages:
            stream.write(in_sync=True)

    @rule(address=addresses, fault=st.sampled_from(["", "", "", "lost", "doubled", "swapped"]))
    def arrives(self, address, fault):
        node = self.nodes[address]
        messages = node.stream.messages if node.stream is not None else None
        if not messages:
            return
        if fault == "swapped" and len(messages) > 1:
            messages[0], messages[1] = messages[1], messages[0]
        message = messages.popleft()
        if fault == "lost":
            return
        if fault == "doubled":
            messages.appendleft(message)
        try:
            self.view.take(address, message, self.now_s)
        except WatchAstray as error:
            note(str(error))
            node.stream = None
            assert not self.view.is_in_sync(address)
        for change in message.changes:
            for key in change.keys:
                self.doubts.pop((address, change.namespace, key), None)

    @rule(address=addresses, namespace=namespaces, keys=some_keys)
    def doubt(self, address, namespace, keys):
        known = self.view.blocks(address) if self.view.is_in_sync(address) else set()
        wrong = [key for key in keys if (namespace, key) in known]
        column = KeyColumn.of(keys)
        assert self.view.doubt(address, [namespace], column, self.now_s) == len(wrong)
        for key in wrong:
            self.doubts[address, namespace, key] = self.now_s + DOUBT_S

    @rule(seconds=st.sampled_from([1.0, DOUBT_S]))
    def time_passes(self, seconds):
        self.now_s += seconds

    @rule(address=addresses)
    def forget(self, address):
        self.nodes[address].stream = None
        self.view.forget(address)
        assert self.view.blocks(address) == set()

    @rule(max_entries=st.integers(1, 3))
    def sweep(self, max_entries):
        self.view.sweep(max_entries)

    @precondition(lambda self: self.nodes)
    @invariant()
    def what_is_said_was_so(self):
        self.view.check()
        for address in self.nodes:
            about = self.view.knowledge(address, self.now_s)
            if about.sync in (Sync.IN_SYNC, Sync.SUSPECT):
                then = self.histories[about.node_epoch][about.sequence]
                assert self.view.blocks(address) == then
            if about.sync is not Sync.IN_SYNC:  # what was doubted may be dropped meanwhile
                self.doubts = {
                    hint: until
                    for hint, until in self.doubts.items()
                    if hint[0] != address or about.sync is Sync.SUSPECT
                }

    @precondition(lambda self: self.nodes)
    @invariant()
    def a_look_up_tells_what_the_nodes_in_sync_told(self):
        keys = KeyColumn.of(KEYS)
        for wanted in ([NAMESPACES[0]], list(NAMESPACES)):
            presence = self.view.locate(wanted, keys, self.now_s)
            bitmaps = {}
            for address in self.nodes:
                if not self.view.is_in_sync(address):
                    continue
                held = self.view.blocks(address)
                bitmap = sum(
                    1 << index
                    for index, key in enumerate(KEYS)
                    if all(
                        (each, key) in held
                        and self.doubts.get((address, each, key), -1.0) <= self.now_s
                        for each in wanted
                    )
                )
                if bitmap:
                    bitmaps[address] = bitmap
            assert presence == Presence(bitmaps=bitmaps)

    def teardown(self):
        """However it went: streams that behave bring every view to the node's own set."""
        for address, node in self.nodes.items():
            node.stream = Stream(node, self.view.request(address))
            while node.stream.pages:
                node.stream.write_page()
            for message in node.stream.messages:
                self.view.take(address, message, self.now_s)
            assert self.view.is_in_sync(address)
            assert self.view.blocks(address) == node.blocks
        while self.view.sweep(3):
            pass
        self.view.check()


ViewMachine.TestCase.settings = settings(stateful_step_count=40)
test_a_view_never_says_what_was_not_so = ViewMachine.TestCase


# --- what crosses the wire

U64 = st.integers(0, 2**64 - 1)
columns = st.lists(st.sampled_from(KEYS), max_size=4).map(KeyColumn.of)
messages = st.builds(
    Watched,
    node_epoch=U64,
    sequence=U64,
    changes=st.lists(
        st.builds(BlockChange, namespace=namespaces, keys=columns, removed=st.booleans()),
        max_size=3,
    ).map(tuple),
    snapshot_begins=st.booleans(),
    in_sync=st.booleans(),
    num_blocks=U64,
    digest=U64,
)


@given(messages)
def test_a_message_arrives_as_it_was_made(message):
    data = watched_to(message).SerializeToString()
    assert watched_from(store_pb2.WatchResponse.FromString(data)) == message


@given(U64, U64)
def test_where_a_subscriber_stands_arrives_as_it_was_said(epoch, sequence):
    request = WatchRequest(node_epoch=epoch, sequence=sequence)
    data = watch_request_to(request).SerializeToString()
    assert watch_request_from(store_pb2.WatchRequest.FromString(data)) == request


# --- the arithmetic of presence

bitmaps = st.dictionaries(st.sampled_from(["a", "b", "c"]), st.integers(0, 2**12 - 1))


@given(bitmaps, st.sampled_from(["a", "b", "x"]), st.integers(0, 14))
def test_pulls_bring_the_longest_prefix_that_anybody_has(bitmaps, own, limit):
    presence = Presence(bitmaps={address: bits for address, bits in bitmaps.items() if bits})
    pulls = presence.pulls(own=own, limit=limit)
    at = 0
    for pull in pulls:
        assert pull.first_block == at
        assert pull.num_blocks > 0
        wanted = ((1 << pull.num_blocks) - 1) << at
        assert presence.bitmaps[pull.address] & wanted == wanted
        mine = presence.bitmaps.get(own, 0) >> at & 1
        assert pull.address == own or not mine, "the own node had it"
        at += pull.num_blocks
    assert at == min(limit, presence.num_blocks)
    whole = [any(bits >> index & 1 for bits in bitmaps.values()) for index in range(12)]
    assert presence.num_blocks == (whole.index(False) if False in whole else 12)


@given(bitmaps)
def test_a_run_ends_before_the_first_block_that_is_not_there(bitmaps):
    presence = Presence(bitmaps=bitmaps)
    for address, bits in bitmaps.items():
        run = presence.run(address)
        assert bits & ((1 << run) - 1) == (1 << run) - 1
        assert not bits >> run & 1


def test_holders_are_those_of_the_prefix_who_holds_most_first():
    presence = Presence(bitmaps={"a": 0b100, "b": 0b11, "c": 0b11, "d": 0b1000, "e": 0b1101})
    assert presence.holders(3) == ["b", "c", "e", "a"]
    assert presence.holders(0) == []


# --- single steps


def told(*keys, sequence, removed=False, **fields):
    column = KeyColumn.of(keys)
    change = BlockChange(namespace=NAMESPACES[0], keys=column, removed=removed)
    return Watched(node_epoch=1, sequence=sequence, changes=(change,) if keys else (), **fields)


def digest_of(*keys):
    total = 0
    for key in keys:
        total ^= digest_part(digest_number(NAMESPACES[0]), key)
    return total


@pytest.fixture
def view():
    """In sync with one block of n:1, as of change 3."""
    made = DirectoryView()
    made.take(
        "n:1",
        told(
            KEYS[0], sequence=3, snapshot_begins=True, in_sync=True, num_blocks=1,
            digest=digest_of(KEYS[0]),
        ),
        0.0,
    )  # fmt: skip
    return made


def found(view, *keys):
    return view.locate(NAMESPACES[:1], KeyColumn.of(keys), 0.0).bitmaps


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (told(KEYS[1], sequence=5), "1 records came between changes 3 and 5"),
        (told(KEYS[1], sequence=3), "1 records came between changes 3 and 3"),
        (told(KEYS[1], sequence=2), "1 records came between changes 3 and 2"),
        (told(sequence=4), "0 records came between changes 3 and 4"),
        (Watched(node_epoch=2, sequence=3), "started anew"),
        (told(sequence=3, in_sync=True, num_blocks=2, digest=0), "1 blocks with digest"),
        (told(sequence=3, in_sync=True, num_blocks=1, digest=0), "1 blocks with digest"),
    ],
    ids=["gap", "doubled", "earlier", "without its record", "epoch", "count", "digest"],
)
def test_what_does_not_follow_drops_the_node_until_a_snapshot(view, message, why):
    with pytest.raises(WatchAstray, match=why):
        view.take("n:1", message, 1.0)
    assert found(view, KEYS[0]) == {}
    assert view.request("n:1") == WatchRequest()
    assert view.knowledge("n:1", 1.0).num_astray == 1


def test_a_broken_stream_goes_on_behind_the_last_change(view):
    view.suspect("n:1")
    assert found(view, KEYS[0]) == {}, "a suspect node is left out"
    assert view.request("n:1") == WatchRequest(node_epoch=1, sequence=3)
    both = digest_of(KEYS[0], KEYS[1])
    view.take("n:1", told(KEYS[1], sequence=4, in_sync=True, num_blocks=2, digest=both), 1.0)
    assert found(view, KEYS[0], KEYS[1]) == {"n:1": 3}


def test_a_snapshot_forgets_what_was_known_before(view):
    begins = told(
        KEYS[1],
        sequence=9,
        snapshot_begins=True,
        in_sync=True,
        num_blocks=1,
        digest=digest_of(KEYS[1]),
    )
    view.take("n:1", begins, 1.0)
    assert view.blocks("n:1") == {(NAMESPACES[0], KEYS[1])}


def test_a_doubt_ends_with_its_time(view):
    column = KeyColumn.of(KEYS[:1])
    view.doubt("n:1", NAMESPACES[:1], column, 0.0)
    assert view.locate(NAMESPACES[:1], column, DOUBT_S - 0.01).bitmaps == {}
    assert view.locate(NAMESPACES[:1], column, DOUBT_S).bitmaps == {"n:1": 1}


def test_half_a_snapshot_is_nothing_to_go_on_from(view):
    view.take("n:1", told(KEYS[1], sequence=9, snapshot_begins=True), 1.0)
    view.suspect("n:1")
    assert view.request("n:1") == WatchRequest()
    assert view.blocks("n:1") == set()


def test_a_doubted_hint_comes_back_with_news_of_it(view):
    view.doubt("n:1", NAMESPACES[:1], KeyColumn.of(KEYS[:1]), 0.0)
    assert found(view, KEYS[0]) == {}
    assert view.blocks("n:1") == {(NAMESPACES[0], KEYS[0])}, "the node's books stand"
    view.take("n:1", told(KEYS[0], sequence=4, removed=True), 0.0)
    view.take("n:1", told(KEYS[0], sequence=5), 0.0)
    assert found(view, KEYS[0]) == {"n:1": 1}


def test_a_key_in_an_even_number_of_shards_leaves_a_trace_in_the_digest():
    numbers = [digest_number(bytes([shard]) * 32) for shard in range(4)]
    digests = set()
    for key in KEYS:
        total = 0
        for number in numbers:
            total ^= digest_part(number, key)
        digests.add(total)
    assert len(digests) == len(KEYS)
