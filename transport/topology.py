"""Where things are in a host: NUMA nodes, NICs, RDMA devices, GPUs; and how far from each other.

Rules kept here: what the host does not say is unknown and never guessed; unknown is farther than
anything known; pure, facts in and order out. `host_probe` reads the facts.

A place is a PCI path from the root complex down, e.g. `("pci0000:80", "0000:80:01.0",
"0000:81:00.0")`, and a NUMA node. Two places are the nearer the more of their paths they share; this
is the order of NVIDIA's `nvidia-smi topo -m` (PIX/PXB, PHB, NODE, SYS) with the same meaning.
"""

from __future__ import annotations

import enum
import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

# A NIC with less than this share of the fastest one's speed is no peer of it: a 1 Gbit/s
# management port beside four of 200 Gbit/s carries data only when all of those are gone.
SLOW_RATIO = 0.25


class Level(enum.IntEnum):
    """How two places are connected; smaller is nearer."""

    SAME = 0  # one card
    SWITCH = 1  # below one PCI bridge
    ROOT = 2  # one PCI root complex
    NODE = 3  # one NUMA node
    FAR = 4  # two NUMA nodes
    UNKNOWN = 5


class Separation(NamedTuple):
    """Level first, then the firmware's distance of the two NUMA nodes (10 = local; 0 = unknown)."""

    level: Level
    numa_distance: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A position in the host: `numa_node` None and `pci_path` empty where unknown."""

    numa_node: int | None = None
    pci_path: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NumaNode:
    """Memory and cores that are near to each other; `distances` by index, as the firmware says."""

    index: int
    cpus: str = ""
    distances: tuple[int, ...] = ()
    memory_nbytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class NicAddress:
    """An address of a NIC, without its port or scope; `prefix` counts the bits of its network."""

    host: str
    prefix: int

    @property
    def is_ipv6(self) -> bool:
        """Whether it is written with colons."""
        return ":" in self.host


@dataclass(frozen=True, slots=True, kw_only=True)
class Nic:
    """A network interface.

    Attributes:
        speed_bytes_per_s: 0 where the driver does not say.
        is_up: it has a carrier, or is of a kind that needs none.
        is_loopback: it leads nowhere but to this host.
        addresses: IPv4 first, link-local ones left out.
        places: of the cards behind it: one, several for a bond, none for a virtual one.
    """

    name: str
    speed_bytes_per_s: float = 0.0
    is_up: bool = False
    is_loopback: bool = False
    addresses: tuple[NicAddress, ...] = ()
    places: tuple[Place, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RdmaDevice:
    """A device of the verbs; one entry for each of its ports.

    Attributes:
        link_layer: `InfiniBand` or `Ethernet` (RoCE).
        is_active: the port's state.
        nics: network interfaces of the same card.
    """

    name: str
    port: int = 1
    link_layer: str = ""
    is_active: bool = False
    speed_bytes_per_s: float = 0.0
    place: Place = Place()
    nics: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU as the PCI bus shows it; `address` is like `0000:81:00.0`, `vendor` like `0x10de`."""

    address: str
    vendor: str = ""
    device: str = ""
    place: Place = Place()


@dataclass(frozen=True, slots=True, kw_only=True)
class HugePages:
    """What of huge pages a pool could get.

    Attributes:
        shmem: setting for memfds: always, within_size, advise, never, deny, force; empty if absent.
        anonymous: setting for other memory: always, madvise or never.
        page_nbytes: of a transparent huge page.
        mounts: tmpfs mounted with `huge=`, and hugetlbfs: path and option.
        reserved: (page size, pages, free pages) of hugetlb.
    """

    shmem: str = ""
    anonymous: str = ""
    page_nbytes: int = 0
    mounts: tuple[tuple[str, str], ...] = ()
    reserved: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """All that transports care for of one host, as it was when it was read."""

    numa_nodes: tuple[NumaNode, ...] = ()
    nics: tuple[Nic, ...] = ()
    rdma_devices: tuple[RdmaDevice, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    huge_pages: HugePages = HugePages()
    kernel: tuple[tuple[str, str], ...] = ()

    def gpu(self, address: str) -> Gpu | None:
        """The GPU at a PCI address, or None."""
        return next((gpu for gpu in self.gpus if gpu.address == address), None)


class RankedNic(NamedTuple):
    """A NIC, how far it is from the memory, and whether it is one of the nearest."""

    nic: Nic
    separation: Separation
    is_preferred: bool


def separation(one: Place, other: Place, facts: HostFacts) -> Separation:
    """How far two places of a host are from each other."""
    shared = 0
    for left, right in zip(one.pci_path, other.pci_path, strict=False):
        if left != right:
            break
        shared += 1
    if shared and _card(one) == _card(other):
        return Separation(Level.SAME, 10)
    if shared > 1:
        return Separation(Level.SWITCH, 10)
    if shared == 1:
        return Separation(Level.ROOT, 10)
    if len(facts.numa_nodes) < 2:
        return Separation(Level.NODE, 10)
    if one.numa_node is None or other.numa_node is None:
        return Separation(Level.UNKNOWN, 0)
    if one.numa_node == other.numa_node:
        return Separation(Level.NODE, 10)
    return Separation(Level.FAR, _numa_distance(one.numa_node, other.numa_node, facts))


def ranked_nics(facts: HostFacts, memory: Place) -> tuple[RankedNic, ...]:
    """NICs that can carry data, the nearest to the memory first; then the faster, then by name.

    Preferred are those that are as near as the nearest among the fast ones. Loopback is left out,
    and so is what is down or has no address.
    """
    usable = [nic for nic in facts.nics if nic.is_up and nic.addresses and not nic.is_loopback]
    fastest = max((nic.speed_bytes_per_s for nic in usable), default=0.0)

    def is_slow(nic: Nic) -> bool:
        return 0 < nic.speed_bytes_per_s < SLOW_RATIO * fastest

    def rank(nic: Nic) -> tuple[bool, Separation, float, str]:
        return is_slow(nic), nic_separation(nic, memory, facts), -nic.speed_bytes_per_s, nic.name

    usable.sort(key=rank)
    if not usable:
        return ()
    nearest = nic_separation(usable[0], memory, facts)
    return tuple(
        RankedNic(nic, far, not is_slow(nic) and far == nearest)
        for nic in usable
        for far in [nic_separation(nic, memory, facts)]
    )


def nic_separation(nic: Nic, memory: Place, facts: HostFacts) -> Separation:
    """From the nearest of the cards behind a NIC; unknown for one without a card."""
    places = nic.places or (Place(),)
    return min(separation(place, memory, facts) for place in places)


def ranked_rdma(facts: HostFacts, memory: Place) -> tuple[tuple[RdmaDevice, Separation], ...]:
    """Active ports, the nearest to the memory first; then the faster, then by name."""
    active = [device for device in facts.rdma_devices if device.is_active]
    ranked = [(device, separation(device.place, memory, facts)) for device in active]
    ranked.sort(key=lambda row: (row[1], -row[0].speed_bytes_per_s, row[0].name, row[0].port))
    return tuple(ranked)


def distances(facts: HostFacts) -> tuple[tuple[str, str, Separation], ...]:
    """Each GPU to each other GPU, NIC and active RDMA port; for people."""
    rows: list[tuple[str, str, Separation]] = []
    for index, gpu in enumerate(facts.gpus):
        rows += [
            (gpu.address, other.address, separation(gpu.place, other.place, facts))
            for other in facts.gpus[index + 1 :]
        ]
        rows += [
            (gpu.address, nic.name, nic_separation(nic, gpu.place, facts))
            for nic in facts.nics
            if nic.places
        ]
        rows += [(gpu.address, row.name, far) for row, far in ranked_rdma(facts, gpu.place)]
    return tuple(rows)


def shared_network(address: NicAddress, others: Sequence[str]) -> list[str]:
    """Those of `others` (host addresses) that lie in the network of `address`."""
    try:
        network = ipaddress.ip_network(f"{address.host}/{address.prefix}", strict=False)
    except ValueError:
        return []
    found = []
    for other in others:
        try:
            if ipaddress.ip_address(other) in network:
                found.append(other)
        except ValueError:
            continue  # a name
    return found


def _card(place: Place) -> str:
    """The device without its function: the ports of one card differ in that only."""
    return place.pci_path[-1].rpartition(".")[0] if place.pci_path else ""


def _numa_distance(one: int, other: int, facts: HostFacts) -> int:
    for node in facts.numa_nodes:
        if node.index == one and other < len(node.distances):
            return node.distances[other]
    return 0
