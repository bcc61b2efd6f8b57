"""Two hosts on one machine: network namespaces joined by one or two cables (veth pairs), shaped, cut and healed.

Rules kept here: names carry the pid of the process that made them and of no other, so that what a killed test left is
found and removed by the next; a process inside a host dies with the test that started it; nothing of the machine's own
network is touched. Needs root, iproute2 and a kernel that lets us: `why_not` says what is missing, and a test that
cannot run says so loudly (`hosts_or_skip`).

Rate is the kernel's `tbf`. Delay is the kernel's `netem` where it has one; where not, a relay process of ours
(tests/support/relay.py): `delayed` says which it took.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.relay import RelayProcess

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parents[2]
PREFIX = "snowskin-test"
NAME = re.compile(rf"{PREFIX}-(?P<pid>\d+)-(?P<began>\d+)-\d+-[ab]$")
TOOL_S = 10.0
END_S = 5.0
_numbers = itertools.count()


class HostsUnavailable(Exception):
    """This machine does not let us make network namespaces."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """One namespace; addresses are by cable."""

    name: str
    side: int  # 1 or 2, the last figure of its addresses

    def address(self, cable: int = 0, *, version: int = 4) -> str:
        """Its address on a cable."""
        if version == 6:
            return f"fd77:{cable}::{self.side}"
        return f"10.77.{cable}.{self.side}"

    def command(self, *arguments: str, own_pids: bool = False) -> list[str]:
        """`arguments` as a command line that runs in this host; `own_pids`: in another PID namespace, too."""
        inside = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"] if own_pids else []
        return ["ip", "netns", "exec", self.name, *inside, *arguments]

    def pids(self) -> list[int]:
        """Processes that run in it."""
        return [int(pid) for pid in _tool("ip", "netns", "pids", self.name).split()]


@dataclass
class Cable:
    """One veth pair; its ends have the same name in both hosts."""

    number: int
    hosts: tuple[Host, Host]
    rate_mbit: int = 0  # 0: as fast as the machine can
    delay_s: float = 0.0
    is_cut: bool = False

    @property
    def name(self) -> str:
        return f"cable{self.number}"

    def shape(self, *, rate_mbit: int | None = None, delay_s: float | None = None) -> None:
        """Limits what either end sends; a delay needs netem (`has_netem`)."""
        self.rate_mbit = self.rate_mbit if rate_mbit is None else rate_mbit
        self.delay_s = self.delay_s if delay_s is None else delay_s
        for host in self.hosts:
            self._tell(host, self._discipline())

    def cut(self, *, silently: bool = False) -> None:
        """Nothing passes any more.

        Pulled out (the default): the end of the first host is down, the other has no carrier. Silently: both links
        look well and every packet is dropped, as behind a switch that died.
        """
        self.is_cut = True
        if silently:
            for host in self.hosts:
                self._tell(host, ("blackhole",))
        else:
            _tool("ip", "-n", self.hosts[0].name, "link", "set", self.name, "down")

    def heal(self) -> None:
        """As before the cut, shaped as it was; idempotent."""
        for host in self.hosts:
            self._tell(host, self._discipline())
            _batch(host, self._bring_up(host))
        self.is_cut = False

    def plug_in(self) -> None:
        """Makes it."""
        first, second = self.hosts
        peer = f"peer name {self.name} netns {second.name}"
        _tool(*f"ip -n {first.name} link add {self.name} type veth {peer}".split())
        for host in self.hosts:
            _batch(host, self._bring_up(host))

    def _bring_up(self, host: Host) -> list[str]:
        # A link that went down forgets its IPv6 address; both are said again.
        return [
            f"link set {self.name} up",
            f"address replace {host.address(self.number)}/24 dev {self.name}",
            f"address replace {host.address(self.number, version=6)}/64 dev {self.name} nodad",
        ]

    def _discipline(self) -> tuple[str, ...]:
        if self.delay_s:
            rate = ("rate", f"{self.rate_mbit}mbit") if self.rate_mbit else ()
            return ("netem", "limit", "100000", "delay", f"{self.delay_s * 1000:.3f}ms", *rate)
        if self.rate_mbit:
            burst_nbytes = max(128 * 1024, self.rate_mbit * 125)  # at least 1 ms worth
            return (
                "tbf",
                "rate",
                f"{self.rate_mbit}mbit",
                "burst",
                str(burst_nbytes),
                "latency",
                "50ms",
            )
        return ("pfifo",)

    def _tell(self, host: Host, discipline: Sequence[str]) -> None:
        _tool("tc", "-n", host.name, "qdisc", "replace", "dev", self.name, "root", *discipline)


@dataclass
class Hosts:
    """Two hosts and the cables between them; `with` makes and removes them."""

    num_cables: int = 1
    rate_mbit: int = 0
    a: Host = field(init=False)
    b: Host = field(init=False)
    cables: list[Cable] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        pid = os.getpid()
        stem = f"{PREFIX}-{pid}-{_began(pid)}-{next(_numbers)}"
        self.a = Host(name=f"{stem}-a", side=1)
        self.b = Host(name=f"{stem}-b", side=2)

    def __enter__(self) -> Hosts:
        remove_stale()
        try:
            for host in (self.a, self.b):
                _tool("ip", "netns", "add", host.name)
                _tool("ip", "-n", host.name, "link", "set", "lo", "up")
            for number in range(self.num_cables):
                cable = Cable(number, (self.a, self.b))
                cable.plug_in()
                if self.rate_mbit:
                    cable.shape(rate_mbit=self.rate_mbit)
                self.cables.append(cable)
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Ends what runs in them and takes them away; idempotent."""
        for host in (self.a, self.b):
            _remove(host.name)

    @contextlib.contextmanager
    def delayed(
        self, target: tuple[str, int], delay_s: float, *, cable: int = 0
    ) -> Iterator[tuple[tuple[str, int], str]]:
        """Where `target`, in host b, is `delay_s` away for host a, each way; and by what: `netem` or `relay`."""
        if has_netem():
            self.cables[cable].shape(delay_s=delay_s)
            try:
                yield target, "netem"
            finally:
                self.cables[cable].shape(delay_s=0.0)
            return
        with RelayProcess(target, (self.a.address(cable), 0), self.a.command) as relay:
            relay.command("shape", delay_s=delay_s)
            yield relay.address, "relay"

    def heal(self) -> None:
        """All cables as new: unshaped but for the rate that the hosts were made with."""
        for cable in self.cables:
            cable.rate_mbit, cable.delay_s = self.rate_mbit, 0.0
            cable.heal()


def _tool(*command: str, given: str | None = None) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=TOOL_S, check=False, input=given
    )
    if done.returncode:
        raise HostsUnavailable(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def _batch(host: Host, lines: Sequence[str]) -> None:
    _tool("ip", "-n", host.name, "-batch", "-", given="\n".join(lines))


def _began(pid: int) -> int:
    """When the process was started, in clock ticks since boot: a pid alone is used again; 0 if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(text.rpartition(")")[2].split()[19])


def _names() -> list[str]:
    folder = Path("/run/netns")
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def remove_stale() -> list[str]:
    """Removes the hosts of processes that are gone; their names."""
    stale = [
        name
        for name in _names()
        if (match := NAME.match(name)) and _began(int(match["pid"])) != int(match["began"])
    ]
    for name in stale:
        _remove(name)
    return stale


def _remove(name: str) -> None:
    if name not in _names():
        return
    with contextlib.suppress(HostsUnavailable):
        for pid in Host(name=name, side=0).pids():  # ours: nobody else enters a host of this name
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    _tool("ip", "netns", "delete", name)


@functools.cache
def why_not() -> str:
    """What keeps this machine from having two hosts; empty where nothing does."""
    if sys.platform != "linux":
        return "not Linux"
    if os.geteuid() != 0:
        return "not root"
    missing = [tool for tool in ("ip", "tc", "unshare") if shutil.which(tool) is None]
    if missing:
        return f"no {', '.join(missing)} (iproute2, util-linux)"
    try:
        with Hosts(rate_mbit=1000) as hosts:
            _tool(*hosts.a.command("true", own_pids=True))
    except (HostsUnavailable, subprocess.TimeoutExpired, OSError) as error:
        return str(error)
    return ""


@functools.cache
def has_netem() -> bool:
    """Whether this kernel delays packets by itself."""
    if why_not():
        return False
    with Hosts() as hosts:
        try:
            hosts.cables[0].shape(delay_s=0.001)
        except HostsUnavailable:
            return False
    return True


@contextlib.contextmanager
def hosts_or_skip(*, num_cables: int = 1, rate_mbit: int = 0) -> Iterator[Hosts]:
    """The hosts; where they cannot be had, the test is skipped and says why in capitals."""
    if reason := why_not():
        pytest.skip(f"NO NETWORK NAMESPACES HERE, TWO HOSTS NOT TESTED: {reason}")
    with Hosts(num_cables=num_cables, rate_mbit=rate_mbit) as hosts:
        yield hosts
