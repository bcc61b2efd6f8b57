"""Trees of /sys and /proc as machines have them: two sockets with four NICs and eight GPUs, a laptop, a container.

Rules kept here: folders, links and contents are laid out as the kernel's ABI pages say; which
devices there are is invented, after machines of that class.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from snowskin.transport.topology import NicAddress

if TYPE_CHECKING:
    from pathlib import Path

LINK = "-> "


def planted(root: Path, files: dict[str, str]) -> Path:
    """Makes the tree below `root`; a value that begins with `-> ` is a link, relative as in sysfs."""
    for name, content in files.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        if content.startswith(LINK):
            path.symlink_to(content.removeprefix(LINK))
        else:
            path.write_text(f"{content}\n")
    return root


def linked(files: dict[str, str], link: str, target: str) -> None:
    """`link` leads to `target`, both absolute in the tree."""
    files[link] = LINK + os.path.relpath(target, os.path.dirname(link))


# Two sockets. Below each: two PCIe switches, and below each of those one NIC and two GPUs.
BUSES = {0: ("pci0000:15", "pci0000:37"), 1: ("pci0000:97", "pci0000:b7")}
NICS = ("ens1", "ens2", "ens3", "ens4")


def two_sockets() -> tuple[dict[str, str], dict[str, tuple[NicAddress, ...]]]:
    """Files, and the addresses of the NICs: 4 of 200 Gbit/s, and a port of 1 Gbit/s for management."""
    files = {
        "/proc/sys/kernel/random/boot_id": "5f0c0a52-0ad1-4a22-9c8a-1f2d3c4b5a69",
        "/proc/sys/kernel/osrelease": "6.8.0-60-generic",
        "/proc/self/mounts": "tmpfs /dev/shm tmpfs rw,nosuid,nodev,inode64 0 0\n"
        "tmpfs /mnt/kv tmpfs rw,relatime,size=536870912k,huge=always,mpol=bind:0 0 0\n"
        "hugetlbfs /dev/hugepages hugetlbfs rw,relatime,pagesize=1024M 0 0",
        "/proc/self/limits": "Limit                     Soft Limit           Hard Limit           Units\n"
        "Max locked memory         unlimited            unlimited            bytes",
        "/sys/kernel/mm/transparent_hugepage/shmem_enabled": "always within_size [advise] never deny force",
        "/sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never",
        "/sys/kernel/mm/transparent_hugepage/hpage_pmd_size": "2097152",
        "/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages": "64",
        "/sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages": "60",
        "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages": "0",
        "/sys/module/nvidia/version": "570.133.20",
        "/sys/module/nvidia_peermem/version": "570.133.20",
        "/sys/module/mlx5_core/version": "24.10",
        "/sys/class/net/bonding_masters": "",
    }
    addresses: dict[str, tuple[NicAddress, ...]] = {
        "lo": (NicAddress(host="127.0.0.1", prefix=8), NicAddress(host="::1", prefix=128))
    }
    for node, distance in ((0, "10 21"), (1, "21 10")):
        folder = f"/sys/devices/system/node/node{node}"
        files[f"{folder}/distance"] = distance
        files[f"{folder}/cpulist"] = ("0-47,96-143", "48-95,144-191")[node]
        files[f"{folder}/meminfo"] = f"Node {node} MemTotal:       1056467452 kB\n"
    number = 0
    for node, roots in BUSES.items():
        for root in roots:
            bus = int(root[-2:], 16)
            bridge = f"/sys/devices/{root}/0000:{bus:02x}:01.0/0000:{bus + 1:02x}:00.0"
            slots = [f"{bridge}/0000:{bus + 2:02x}:{slot:02x}.0" for slot in (0, 1, 2)]
            _nic_card(files, f"{slots[0]}/0000:{bus + 3:02x}:00.0", number, node)
            for index, slot in enumerate(slots[1:]):
                _gpu(files, f"{slot}/0000:{bus + 4 + index:02x}:00.0", node)
            addresses[NICS[number]] = (
                NicAddress(host=f"10.0.{number}.7", prefix=24),
                NicAddress(host=f"fd00:{number}::7", prefix=64),
            )
            number += 1
    _ethernet(files, "/sys/devices/pci0000:00/0000:00:1f.6", "eno1", 0, "1000", "up")
    addresses["eno1"] = (NicAddress(host="192.168.4.7", prefix=24),)
    files["/sys/devices/virtual/net/lo/operstate"] = "unknown"
    files["/sys/devices/virtual/net/lo/type"] = "772"
    linked(files, "/sys/class/net/lo", "/sys/devices/virtual/net/lo")
    return files, addresses


def _ethernet(
    files: dict[str, str], card: str, name: str, node: int, speed: str, state: str
) -> None:
    files[f"{card}/numa_node"] = str(node)
    files[f"{card}/vendor"] = "0x15b3"
    files[f"{card}/class"] = "0x020000"
    files[f"{card}/net/{name}/speed"] = speed
    files[f"{card}/net/{name}/operstate"] = state
    files[f"{card}/net/{name}/type"] = "1"
    linked(files, f"{card}/net/{name}/device", card)
    linked(files, f"/sys/class/net/{name}", f"{card}/net/{name}")
    linked(files, f"/sys/bus/pci/devices/{os.path.basename(card)}", card)


def _nic_card(files: dict[str, str], card: str, number: int, node: int) -> None:
    _ethernet(files, card, NICS[number], node, "200000", "up")
    device = f"{card}/infiniband/mlx5_{number}"
    files[f"{device}/ports/1/state"] = "4: ACTIVE"
    files[f"{device}/ports/1/rate"] = "200 Gb/sec (4X HDR)"
    files[f"{device}/ports/1/link_layer"] = "Ethernet"
    linked(files, f"{device}/device", card)
    linked(files, f"/sys/class/infiniband/mlx5_{number}", device)


def _gpu(files: dict[str, str], card: str, node: int) -> None:
    files[f"{card}/numa_node"] = str(node)
    files[f"{card}/vendor"] = "0x10de"
    files[f"{card}/device"] = "0x2330"
    files[f"{card}/class"] = "0x030200"
    linked(files, f"/sys/bus/pci/devices/{os.path.basename(card)}", card)


def laptop() -> tuple[dict[str, str], dict[str, tuple[NicAddress, ...]]]:
    """Wireless up without a speed, the Ethernet port without a cable, one GPU of the processor's."""
    files = {
        "/proc/sys/kernel/random/boot_id": "0b5c9f1e-7c11-4d2e-8a54-9f7e6d5c4b3a",
        "/sys/devices/system/node/node0/distance": "10",
        "/sys/devices/system/node/node0/cpulist": "0-15",
        "/sys/kernel/mm/transparent_hugepage/shmem_enabled": "always within_size advise [never] deny force",
        "/sys/devices/virtual/net/docker0/operstate": "down",
        "/sys/devices/virtual/net/docker0/speed": "-1",
        "/sys/devices/pci0000:00/0000:00:02.0/vendor": "0x8086",
        "/sys/devices/pci0000:00/0000:00:02.0/class": "0x030000",
        "/sys/devices/pci0000:00/0000:00:02.0/numa_node": "-1",
    }
    linked(files, "/sys/class/net/docker0", "/sys/devices/virtual/net/docker0")
    linked(files, "/sys/bus/pci/devices/0000:00:02.0", "/sys/devices/pci0000:00/0000:00:02.0")
    _ethernet(files, "/sys/devices/pci0000:00/0000:00:1f.6", "enp0s31f6", -1, "-1", "down")
    card = "/sys/devices/pci0000:00/0000:00:14.3"
    _ethernet(files, card, "wlp0s20f3", -1, "", "up")
    del files[f"{card}/net/wlp0s20f3/speed"]  # wireless: EINVAL
    addresses: dict[str, tuple[NicAddress, ...]] = {
        "wlp0s20f3": (NicAddress(host="192.168.1.23", prefix=24),),
        "docker0": (NicAddress(host="172.17.0.1", prefix=16),),
        "lo": (NicAddress(host="127.0.0.1", prefix=8),),
    }
    return files, addresses
