"""Pulls of every size by every contestant, in rounds, and what our transports must reach there.

Rules kept here: all contestants in every round, in an order that turns; a ratio is the median of the rounds' own; the
best plain baseline of a size is the one with the best median of the run, not the luckiest of each round; CPU is that of
both ends.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from snowskin.tools.bench.report import Goal, Row, make_paired_row, make_row
from snowskin.tools.bench.transfer import peers
from snowskin.tools.bench.transfer.pair import Contestant, Pair, Taken
from snowskin.tools.bench.transfer.shape import KIB, MIB, WORD, Shape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from snowskin.tools.bench.transfer.backends.api import Option

SMALL_NBYTES = 4 * KIB
GOAL_HELD_LEASE_US = 3.0
MEMCPY, RANGES, UNPACED, UNIX = "memcpy", "sockets", "sockets unpaced", "unix sockets"
SENDFILE = "sockets sendfile"


def _limit(name: str, backend: str = "sockets", **options: Option) -> Contestant:
    return Contestant(name=name, backend=backend, pair="limits", options=options)


LIMITS = (
    _limit(MEMCPY, "memcpy"),
    _limit(RANGES),
    _limit(UNPACED, congestion=peers.UNPACED),
    _limit(SENDFILE, call="sendfile", congestion=peers.UNPACED),
    _limit("sockets 2 streams", streams=2, congestion=peers.UNPACED),
    _limit("sockets 4 streams", streams=4, congestion=peers.UNPACED),
    _limit(UNIX, family="unix"),
)
PLAIN = tuple(each.name for each in LIMITS if each.name.startswith("sockets"))
LENT = json.dumps({"lend_to_this_host": True})
TCP_FREE = Contestant(
    name="tcp on both cores",
    backend="ours",
    pair="tcp free",
    options={"scheme": "tcp", "settings": LENT},
    is_free=True,
)
"""What peers are compared with: their ends have threads that poll, and may use both cores, too."""
COPYING = "tcp copying"
TCP = ("tcp", COPYING)
NOTE = (
    "tcp: large pulls go by reference, as a node serves readers that a hardware NIC leads to; "
    f"{COPYING}: as it serves those on its own host, unless it was told to trust them"
)
OURS: tuple[Contestant, ...] = (
    Contestant(name="shm", backend="ours", pair="shm", options={"scheme": "shm"}),
    Contestant(
        name="tcp",
        backend="ours",
        pair="tcp",
        options={"scheme": "tcp", "settings": LENT},
    ),
    Contestant(name=COPYING, backend="ours", pair="tcp copying", options={"scheme": "tcp"}),
    Contestant(name="ucx", backend="ours", pair="ucx", options={"scheme": "ucx"}),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """All rounds of one shape.

    Attributes:
        taken: by (contestant, checked), a sample per round.
    """

    shape: Shape
    taken: dict[tuple[str, bool], list[Taken]] = field(default_factory=dict)

    def names(self, *, checked: bool) -> list[str]:
        """Who took part."""
        return [name for name, was_checked in self.taken if was_checked is checked]

    def seconds(self, name: str, *, checked: bool = False) -> list[float]:
        """Of one pull, by round."""
        return [taken.seconds for taken in self.taken[name, checked]]

    def speeds(self, name: str, *, checked: bool = False) -> list[float]:
        """As `unit` says, by round."""
        if self.is_small:
            return [second * 1e6 for second in self.seconds(name, checked=checked)]
        return [self.shape.nbytes / second / 1e9 for second in self.seconds(name, checked=checked)]

    def cpu(self, name: str, *, checked: bool = False) -> list[float]:
        """CPU seconds of both ends per GB, by round."""
        return [taken.cpu_s / self.shape.nbytes * 1e9 for taken in self.taken[name, checked]]

    @property
    def is_small(self) -> bool:
        """Whether it is a matter of microseconds and not of bytes."""
        return self.shape.nbytes <= SMALL_NBYTES

    @property
    def unit(self) -> str:
        """Of `speeds`."""
        return "us" if self.is_small else "GB/s"

    def best(self, names: Iterable[str], *, checked: bool = False) -> str | None:
        """Who of them has the best median; None where none took part."""
        present = [name for name in names if (name, checked) in self.taken]
        return min(
            present,
            key=lambda name: statistics.median(self.seconds(name, checked=checked)),
            default=None,
        )


def measure_shape(
    contestants: Sequence[Contestant], pairs: Mapping[str, Pair], shape: Shape, rounds: int
) -> Measured:
    """Verifies each contestant's bytes, then all of them in every round; those that cannot are left out."""
    cases: list[tuple[str, bool, Pair]] = []
    for contestant in contestants:
        pair = pairs[contestant.pair]
        if contestant.name in pair.missing:
            continue
        pair.resume()
        cases += [
            (contestant.name, checked, pair)
            for checked in ((False,) if contestant.is_peer or contestant.is_free else (False, True))
            if pair.prepare(contestant.name, shape, checked=checked)
        ]
        pair.suspend()
    measured = Measured(shape=shape, taken={(name, checked): [] for name, checked, _ in cases})
    for round_index in range(rounds):
        first = round_index % len(cases)
        for name, checked, pair in cases[first:] + cases[:first]:
            pair.resume()
            measured.taken[name, checked].append(pair.pull(name, shape, checked=checked))
            pair.suspend()
    return measured


def rows_of(measured: Measured) -> list[Row]:
    """What the table says of one shape."""
    rows: list[Row] = []
    for contestant in OURS:
        for checked in (False, True):
            if (contestant.name, checked) in measured.taken:
                rows += _rows_of_ours(measured, contestant.name, checked=checked)
    return rows + _rows_of_others(measured)


def round_trip_row(limits: Pair, rounds: int) -> Row:
    """What asking the owner would cost: a small round trip over a Unix socket, blocking."""
    limits.prepare(UNIX, WORD, checked=False)
    samples = [limits.pull(UNIX, WORD, checked=False).seconds * 1e6 for _ in range(rounds)]
    return make_row("control round trip beside it: Unix socket, blocking, 64 B", samples, "us")


def _rows_of_ours(measured: Measured, name: str, *, checked: bool) -> list[Row]:
    """One of our transports against the limit of its path, CPU included, and the others against it."""
    local = name == "shm"
    plain = (RANGES, UNPACED) if measured.is_small else PLAIN  # a raw round trip is of one stream
    reference = MEMCPY if local else measured.best(plain, checked=checked)
    if reference is None:
        return []
    what = _what(measured, name, checked=checked)
    rows = [
        _paired(
            f"{what} against {_called(reference, checked=checked)}",
            lambda each: measured.speeds(each, checked=checked),
            (name, reference),
            measured.unit,
            _goal(measured, name, checked=checked),
        )
    ]
    if measured.shape.is_scattered and not local and (RANGES, checked) in measured.taken:
        bound = Goal(of="ratio", relation=">=", bound=1.2) if name in TCP else None
        by_range = measured.best((RANGES, UNPACED), checked=checked) or RANGES
        rows[0] = _paired(
            f"{what} against {_called(by_range, checked=checked)}, range by range",
            lambda each: measured.speeds(each, checked=checked),
            (name, by_range),
            measured.unit,
            bound,
        )
    rows.append(
        _paired(
            f"{what}: CPU of both ends",
            lambda each: measured.cpu(each, checked=checked),
            (name, reference),
            "s/GB",
            _cpu_goal(measured, name),
        )
    )
    return rows


def _goal(measured: Measured, name: str, *, checked: bool) -> Goal | None:
    """What a pull of this size must reach against the limit of its path."""
    if measured.is_small:
        if name == "shm":
            return None if checked else Goal(of="value", relation="<=", bound=GOAL_HELD_LEASE_US)
        return Goal(of="ratio", relation="<=", bound=2.0) if name == "tcp" else None
    if measured.shape.nbytes < MIB or measured.shape.is_scattered or name == "ucx":
        return None
    return Goal(of="ratio", relation=">=", bound=0.95 if name == "shm" else 1.0)


def _cpu_goal(measured: Measured, name: str) -> Goal | None:
    judged = name in TCP and measured.shape.nbytes >= MIB
    return Goal(of="ratio", relation="<=", bound=1.2) if judged else None


def _rows_of_others(measured: Measured) -> list[Row]:
    """Ours over TCP against each peer, and every limit and peer against the best plain sockets."""
    ahead = [
        _paired(
            f"{_what(measured, TCP_FREE.name, checked=False)} against {peer.name}",
            measured.speeds,
            (TCP_FREE.name, peer.name),
            measured.unit,
            _goal_over(peer, measured),
        )
        for peer in peers.PEERS
        if (peer.name, False) in measured.taken and (TCP_FREE.name, False) in measured.taken
    ]
    best = measured.best(PLAIN)
    ours = {each.name for each in (*OURS, TCP_FREE)}
    others = [each for each in measured.names(checked=False) if each not in ours | {best}]
    if best is None:
        return ahead
    speeds = [
        _paired(
            f"{_what(measured, name, checked=False)} against {best}",
            measured.speeds,
            (name, best),
            measured.unit,
            None,
        )
        for name in others
    ]
    cpu = [
        _paired(
            f"{_what(measured, name, checked=False)}: CPU of both ends",
            measured.cpu,
            (name, best),
            "s/GB",
            None,
        )
        for name in others
    ]
    return ahead + speeds + cpu


def _goal_over(peer: Contestant, measured: Measured) -> Goal | None:
    """By how much `tcp` must be ahead of this peer; nothing is promised below 1 MiB, nor for scattered pulls."""
    if measured.shape.nbytes < MIB or measured.shape.is_scattered:
        return None
    if peer is peers.MOONCAKE:
        return Goal(of="ratio", relation=">=", bound=1.3)
    if peer is peers.NIXL:
        return None
    return Goal(of="ratio", relation=">=", bound=1.5 if measured.shape.nbytes <= 16 * MIB else 1.0)


def _paired(
    name: str,
    numbers: Callable[[str], list[float]],
    sides: tuple[str, str],
    unit: str,
    goal: Goal | None,
) -> Row:
    ours, reference = sides
    return make_paired_row(
        name, numbers(ours), unit, reference=(reference, numbers(reference)), goal=goal
    )


def _what(measured: Measured, name: str, *, checked: bool) -> str:
    verified = ", verified" if checked else ""
    held = " under a held lease" if name == "shm" and measured.is_small else ""
    return f"{name}: pull {measured.shape.name}{held}{verified}"


def _called(reference: str, *, checked: bool) -> str:
    return f"{reference} + checksum" if checked else reference
