"""Reads what `topology` wants to know of this host from /sys and /proc, and says nothing it did not read.

Rules kept here: everything is read below one root, so that a test can give it a recorded tree; no
content, missing file, loop of links or binary rubbish raises; every file and folder is read up to
a bound. Nothing is opened but files: no device, no driver, no torch.

Sources: the kernel's `Documentation/ABI` for sysfs-class-net, sysfs-class-infiniband,
sysfs-bus-pci and stable/sysfs-devices-node; proc(5); `Documentation/admin-guide/mm/transhuge`.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from snowskin.transport.topology import (
    Gpu,
    HostFacts,
    HugePages,
    Nic,
    NicAddress,
    NumaNode,
    Place,
    RdmaDevice,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

MAX_FILE_NBYTES = 256 * 1024
MAX_NAMES = 4096
KERNEL_FACTS = (
    "/proc/sys/kernel/osrelease",
    "/proc/sys/net/core/rmem_max",
    "/proc/sys/net/core/wmem_max",
    "/proc/sys/net/core/somaxconn",
    "/proc/sys/net/ipv4/tcp_rmem",
    "/proc/sys/net/ipv4/tcp_wmem",
    "/proc/sys/vm/max_map_count",
    "/proc/sys/kernel/numa_balancing",
    "/proc/sys/kernel/yama/ptrace_scope",
)
MODULES = ("nvidia", "nvidia_peermem", "mlx5_core", "ib_uverbs", "irdma", "efa")

_PCI_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_PCI_ROOT = re.compile(r"pci[0-9a-f]{4,8}:[0-9a-f]{2}")
_DISPLAY_CLASSES = ("0x0300", "0x0302", "0x0380", "0x1200")  # VGA, 3D, display, accelerator
_GPU_VENDORS = ("0x10de", "0x1002", "0x8086")
_ACTIVE_PORT = "4"  # "4: ACTIVE"
_MEGABIT_BYTES = 125_000
_CARRIER_STATES = ("up", "unknown")  # loopback and most virtual ones never say "up"
_OPTION = re.compile(r"(?:^|,)huge=([a-z_]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFiles:
    """Where to read; `root` stands for `/`."""

    root: Path = Path("/")

    def path(self, name: str) -> Path:
        """The place of an absolute path."""
        return self.root / name.lstrip("/")

    def text(self, name: str, max_nbytes: int = MAX_FILE_NBYTES) -> str:
        """A file's beginning without white space around it; empty where it cannot be read."""
        try:
            # Some files of sysfs fail on read, not on open: "speed" of a NIC that is down.
            with open(self.path(name), "rb", opener=_without_waiting) as file:
                return file.read(max_nbytes).decode("utf-8", "replace").strip()
        except (OSError, ValueError):
            return ""

    def number(self, name: str) -> int | None:
        """The whole number in a file; None where there is none, or it is no such number."""
        return _whole(self.text(name))

    def names(self, folder: str) -> list[str]:
        """What is in a folder, sorted, of the first few thousand; nothing where it cannot be read."""
        found = []
        try:
            with os.scandir(self.path(folder)) as entries:
                for entry in entries:
                    found.append(entry.name)
                    if len(found) >= MAX_NAMES:
                        break
        except (OSError, ValueError):
            return []
        return sorted(found)

    def real(self, name: str) -> str:
        """Where a path leads, links followed; as it stands where they lead in a circle."""
        try:
            return os.path.realpath(self.path(name))
        except (OSError, ValueError):
            return ""

    def link(self, name: str) -> str:
        """What a link says; empty where it is none."""
        try:
            return os.readlink(self.path(name))
        except (OSError, ValueError):
            return ""


def _without_waiting(path: str, flags: int) -> int:
    """Opens even a FIFO that nobody writes to at once."""
    return os.open(path, flags | os.O_NONBLOCK)


def read_host(
    files: HostFiles | None = None,
    *,
    addresses: Callable[[], Mapping[str, Sequence[NicAddress]]] | None = None,
) -> HostFacts:
    """Facts of this host, or of the tree below `files.root`.

    Args:
        files: where to read; the real root if None.
        addresses: of each NIC by name; asked of the kernel if None. Sysfs does not know them.
    """
    files = files or HostFiles()
    by_nic = (addresses or kernel_addresses)()
    return HostFacts(
        numa_nodes=_numa_nodes(files),
        nics=tuple(_nic(files, name, by_nic.get(name, ())) for name in _nic_names(files, by_nic)),
        rdma_devices=_rdma_devices(files),
        gpus=_gpus(files),
        huge_pages=_huge_pages(files),
        kernel=_kernel(files),
    )


def boot_id(files: HostFiles | None = None) -> bytes:
    """16 bytes that all processes of this running kernel share, and no others; zeros if unknown.

    A digest: the kernel's own id need not travel.
    """
    text = (files or HostFiles()).text("/proc/sys/kernel/random/boot_id")
    if not text:
        return bytes(16)
    return hashlib.blake2b(text.encode(), digest_size=16, person=b"snowskin host").digest()


def namespace_id(kind: str, files: HostFiles | None = None) -> int:
    """Number of this process's namespace of a kind (`pid`, `net`, `ipc`); 0 if unknown."""
    match = re.fullmatch(
        r"\w+:\[(\d{1,19})\]", (files or HostFiles()).link(f"/proc/self/ns/{kind}")
    )
    return int(match[1]) if match else 0


def kernel_addresses() -> dict[str, tuple[NicAddress, ...]]:
    """Addresses of each NIC as the kernel has them now."""
    found: dict[str, tuple[NicAddress, ...]] = {}
    for name, rows in psutil.net_if_addrs().items():
        made = [_nic_address(row.address, row.netmask) for row in rows]
        addresses = [address for address in made if address is not None]
        found[name] = tuple(sorted(addresses, key=lambda address: address.is_ipv6))
    return found


def _nic_address(text: str, netmask: str | None) -> NicAddress | None:
    """None for what is no IP address, and for link-local ones, which mean nothing to a peer."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if address.is_link_local or address.is_unspecified or address.is_multicast:
        return None
    prefix: int = address.max_prefixlen
    try:
        # psutil gives IPv6 masks as addresses too: ffff:ffff:ffff:ffff::
        prefix = int(ipaddress.ip_address(netmask or "")).bit_count() if netmask else prefix
    except ValueError:
        prefix = address.max_prefixlen
    return NicAddress(host=str(address), prefix=min(prefix, address.max_prefixlen))


def _whole(text: str) -> int | None:
    if re.fullmatch(r"-?\d{1,19}", text, re.ASCII) is None:
        return None
    return int(text)


def _pci_path(real: str) -> tuple[str, ...]:
    """The root complex and the devices below it, of a resolved path below /sys/devices."""
    parts = real.split("/")
    for index, part in enumerate(parts):
        if _PCI_ROOT.fullmatch(part):
            path = [part]
            for below in parts[index + 1 :]:
                if not _PCI_ADDRESS.fullmatch(below):
                    break
                path.append(below)
            return tuple(path) if len(path) > 1 else ()
    return ()


def _place(files: HostFiles, name: str) -> Place:
    """Of a device's folder: its PCI path, and the NUMA node that the nearest folder above tells."""
    real = files.real(name)
    node = files.number(f"{name}/numa_node")
    path = _pci_path(real)
    if node is None and path:
        node = files.number(f"/sys/bus/pci/devices/{path[-1]}/numa_node")
    return Place(numa_node=node if node is not None and node >= 0 else None, pci_path=path)


def _numa_nodes(files: HostFiles) -> tuple[NumaNode, ...]:
    nodes = []
    for name in files.names("/sys/devices/system/node"):
        index = _whole(name.removeprefix("node")) if name.startswith("node") else None
        if index is None or index < 0:
            continue
        folder = f"/sys/devices/system/node/{name}"
        distances = [_whole(word) for word in files.text(f"{folder}/distance").split()]
        memory = re.search(r"MemTotal:\s+(\d{1,15}) kB", files.text(f"{folder}/meminfo"))
        nodes.append(
            NumaNode(
                index=index,
                cpus=files.text(f"{folder}/cpulist"),
                distances=tuple(far for far in distances if far is not None),
                memory_nbytes=int(memory[1]) * 1024 if memory else 0,
            )
        )
    return tuple(sorted(nodes, key=lambda node: node.index))


def _nic_names(files: HostFiles, addresses: Mapping[str, object]) -> list[str]:
    """Those of sysfs and those with addresses: in a container, sysfs may be another's or absent."""
    return sorted({*files.names("/sys/class/net"), *addresses} - {"bonding_masters"})


def _nic(files: HostFiles, name: str, addresses: Sequence[NicAddress]) -> Nic:
    folder = f"/sys/class/net/{name}"
    megabits = files.number(f"{folder}/speed") or 0
    state = files.text(f"{folder}/operstate")
    lower = [other for other in files.names(folder) if other.startswith("lower_")]
    cards = [f"{folder}/{other}/device" for other in lower] or [f"{folder}/device"]
    places = [_place(files, card) for card in cards]
    loops = any(_is_loopback(address) for address in addresses)
    return Nic(
        name=name,
        speed_bytes_per_s=float(max(megabits, 0) * _MEGABIT_BYTES),
        is_up=state in _CARRIER_STATES if state else bool(addresses),
        is_loopback=loops or files.number(f"{folder}/type") == 772,  # ARPHRD_LOOPBACK
        addresses=tuple(addresses),
        places=tuple(place for place in places if place.pci_path),
    )


def _is_loopback(address: NicAddress) -> bool:
    try:
        return ipaddress.ip_address(address.host).is_loopback
    except ValueError:
        return False


def _rdma_devices(files: HostFiles) -> tuple[RdmaDevice, ...]:
    found = []
    for name in files.names("/sys/class/infiniband"):
        folder = f"/sys/class/infiniband/{name}"
        place = _place(files, f"{folder}/device")
        nics = tuple(files.names(f"{folder}/device/net"))
        for text in files.names(f"{folder}/ports"):
            port = _whole(text)
            if port is None:
                continue
            found.append(
                RdmaDevice(
                    name=name,
                    port=port,
                    link_layer=files.text(f"{folder}/ports/{text}/link_layer"),
                    is_active=files.text(f"{folder}/ports/{text}/state")[:1] == _ACTIVE_PORT,
                    speed_bytes_per_s=_rate(files.text(f"{folder}/ports/{text}/rate")),
                    place=place,
                    nics=nics,
                )
            )
    return tuple(found)


def _rate(text: str) -> float:
    """Of `200 Gb/sec (4X HDR)`; 0 where it says something else."""
    match = re.match(r"(\d{1,6}(?:\.\d{1,3})?) Gb/sec", text)
    return float(match[1]) * 125e6 if match else 0.0


def _gpus(files: HostFiles) -> tuple[Gpu, ...]:
    found = []
    for address in files.names("/sys/bus/pci/devices"):
        folder = f"/sys/bus/pci/devices/{address}"
        vendor = files.text(f"{folder}/vendor")
        is_display = files.text(f"{folder}/class")[:6] in _DISPLAY_CLASSES
        if is_display and vendor in _GPU_VENDORS:
            found.append(
                Gpu(
                    address=address,
                    vendor=vendor,
                    device=files.text(f"{folder}/device"),
                    place=_place(files, folder),
                )
            )
    return tuple(found)


def _chosen(text: str) -> str:
    """Of `always [madvise] never`, what stands in brackets."""
    match = re.search(r"\[(\w+)\]", text)
    return match[1] if match else ""


def _huge_pages(files: HostFiles) -> HugePages:
    mounts = []
    for line in files.text("/proc/self/mounts").splitlines():
        words = line.split(" ")
        if len(words) < 4:
            continue
        option = _OPTION.search(words[3])
        if words[2] == "hugetlbfs" or (words[2] == "tmpfs" and option and option[1] != "never"):
            mounts.append((words[1], option[1] if option else "hugetlbfs"))
    reserved = []
    for name in files.names("/sys/kernel/mm/hugepages"):
        match = re.fullmatch(r"hugepages-(\d{1,12})kB", name)
        num_pages = files.number(f"/sys/kernel/mm/hugepages/{name}/nr_hugepages")
        num_free = files.number(f"/sys/kernel/mm/hugepages/{name}/free_hugepages")
        if match and num_pages:
            reserved.append((int(match[1]) * 1024, num_pages, num_free or 0))
    folder = "/sys/kernel/mm/transparent_hugepage"
    return HugePages(
        shmem=_chosen(files.text(f"{folder}/shmem_enabled")),
        anonymous=_chosen(files.text(f"{folder}/enabled")),
        page_nbytes=max(files.number(f"{folder}/hpage_pmd_size") or 0, 0),
        mounts=tuple(mounts),
        reserved=tuple(sorted(reserved)),
    )


def _kernel(files: HostFiles) -> tuple[tuple[str, str], ...]:
    """Settings by the name that sysctl has for them, loaded modules, and what may be locked."""
    facts = [
        (
            name.removeprefix("/proc/sys/").replace("/", "."),
            " ".join(files.text(name).split())[:200],
        )
        for name in KERNEL_FACTS
    ]
    loaded = [module for module in MODULES if files.names(f"/sys/module/{module}")]
    limit = re.search(r"^Max locked memory\s+(\S+)", files.text("/proc/self/limits"), re.MULTILINE)
    facts += [
        ("modules", " ".join(loaded)),
        ("locked memory", limit[1] if limit else ""),
    ]
    return tuple((name, value) for name, value in facts if value)
