"""What `ucx` puts on the wire and into descriptors, how streams are cut, and its settings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from snowskin.transport.errors import BadDescriptor, TransportUnavailable
from snowskin.transport.ucx.conversation import Cursor, FairQueue
from snowskin.transport.ucx.settings import UcxSettings, is_hardware
from snowskin.transport.ucx.wire import MessageHead, MessageKind, Reach
from tests.fuzz.ucx_conversations import HELLO, SEALED


def vectors() -> dict[str, Any]:
    """The examples of docs/wire.md §6, as this side says them."""
    told = {
        kind.name: MessageHead(bytes(range(16)), kind, 7, 1 << 40, kind is MessageKind.DATA)
        .encode()
        .hex()
        for kind in MessageKind
    }
    return {
        "heads": told,
        "hello": HELLO.encode().hex(),
        "descriptor": SEALED.to_bytes().hex(),
    }


def test_bytes_are_those_of_the_vectors() -> None:
    """Whoever means to change them raises the version in `ucx/wire.py`."""
    path = Path(__file__).parents[2] / "vectors" / "ucx.json"
    assert json.loads(path.read_text()) == vectors()


@pytest.mark.parametrize("at", range(len(SEALED.extra)))
def test_descriptor_with_any_byte_changed_is_refused_before_ucx_sees_it(at: int) -> None:
    extra = bytearray(SEALED.extra)
    extra[at] ^= 1
    with pytest.raises(BadDescriptor):
        Reach.open(replace(SEALED, extra=bytes(extra)))


def test_extra_part_belongs_to_one_descriptor_alone() -> None:
    Reach.open(SEALED)
    for other in (
        {"capability": b"another one, yes"},
        {"nbytes": SEALED.nbytes + 1},
        {"epoch": 8},
        {"generation": 4},
        {"writable": True},
    ):
        with pytest.raises(BadDescriptor):
            Reach.open(replace(SEALED, **other))


def test_cursor_takes_all_bytes_once_in_spans_and_parts() -> None:
    cursor = Cursor([(0, 10), (50, 3), (20, 7)], base=1000)
    taken = [cursor.take(6), cursor.take(100, max_spans=2), cursor.take(100), cursor.take(100)]
    assert taken == [[(1000, 6)], [(1006, 4), (1050, 3)], [(1020, 7)], []]
    assert cursor.position == cursor.nbytes == 20


def test_fair_queue_gives_the_more_urgent_first_and_a_class_in_turns() -> None:
    queue = FairQueue(3)
    for one, urgency in (("a", 2), ("b", 1), ("c", 1), ("d", 0)):
        queue.add(one, urgency)
    assert list(queue) == ["d", "b", "c", "a"]


@pytest.mark.parametrize(
    ("tls", "hardware_only"),
    [
        ("", False),
        ("rc,cuda_copy,cuda_ipc", True),
        ("rc_x, dc_x ,self", True),
        ("rc,tcp", False),
        ("all", False),
        ("ib", False),
        ("self", False),
        ("^tcp", False),
        ("ud", False),
        ("cuda_copy", False),
    ],
)
def test_one_sided_is_offered_only_where_hardware_checks_keys(
    tls: str, hardware_only: bool
) -> None:
    settings = UcxSettings(tls=tls)
    assert settings.hardware_only is hardware_only
    assert settings.offers_one_sided is hardware_only
    assert UcxSettings(tls=tls, trusted_network=True).offers_one_sided


def test_hardware_is_known_by_the_names_that_ucx_uses() -> None:
    assert is_hardware("rc_mlx5/mlx5_0:1")
    assert is_hardware("cuda_ipc/cuda")
    assert not is_hardware("tcp/eth0")
    assert not is_hardware("ud_mlx5/mlx5_0:1")
    assert not is_hardware("rcx")


@pytest.mark.parametrize(
    "bad",
    [
        {"silence_s": 1.0},
        {"get_nbytes": 0},
        {"stall_s": -1.0},
        {"heartbeat_s": 21.0, "silence_s": 99.0},
        {"name": ""},
        {"name": "x" * 200},
    ],
)
def test_settings_that_cannot_work_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(TransportUnavailable):
        UcxSettings(**bad)


def test_settings_go_to_ucx_by_name() -> None:
    settings = UcxSettings(net_devices="eth1", tls="rc", more=(("IB_GID_INDEX", "3"),))
    config = settings.config()
    assert (config["NET_DEVICES"], config["TLS"], config["IB_GID_INDEX"]) == ("eth1", "rc", "3")
    assert config["TCP_PUT_ENABLE"] == "n"
    assert not any(name.startswith("UCX_") for name in config)
