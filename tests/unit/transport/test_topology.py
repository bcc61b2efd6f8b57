"""Facts of recorded machines, and what is near to what on them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from snowskin.transport.host_probe import (
    HostFiles,
    boot_id,
    kernel_addresses,
    namespace_id,
    read_host,
)
from snowskin.transport.topology import (
    HostFacts,
    Level,
    Nic,
    NicAddress,
    NumaNode,
    Place,
    distances,
    ranked_nics,
    ranked_rdma,
    separation,
    shared_network,
)
from tests.support.fake_sysfs import laptop, planted, two_sockets

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def box(tmp_path: Path) -> HostFacts:
    files, addresses = two_sockets()
    planted(tmp_path, files)
    return read_host(HostFiles(root=tmp_path), addresses=lambda: addresses)


def test_two_sockets_are_read_whole(box: HostFacts) -> None:
    assert [(node.index, node.distances) for node in box.numa_nodes] == [
        (0, (10, 21)),
        (1, (21, 10)),
    ]
    assert box.numa_nodes[0].memory_nbytes == 1056467452 * 1024
    assert [nic.name for nic in box.nics] == ["eno1", "ens1", "ens2", "ens3", "ens4", "lo"]
    ens3 = box.nics[3]
    assert ens3.speed_bytes_per_s == 25e9
    assert ens3.is_up
    assert ens3.places[0].numa_node == 1
    assert ens3.places[0].pci_path[0] == "pci0000:97"
    assert [gpu.place.numa_node for gpu in box.gpus] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert {gpu.device for gpu in box.gpus} == {"0x2330"}
    assert [(d.name, d.nics, d.link_layer) for d in box.rdma_devices] == [
        (f"mlx5_{index}", (f"ens{index + 1}",), "Ethernet") for index in range(4)
    ]
    assert box.huge_pages.shmem == "advise"
    assert box.huge_pages.mounts == (("/mnt/kv", "always"), ("/dev/hugepages", "hugetlbfs"))
    assert box.huge_pages.reserved == ((1 << 30, 64, 60),)
    assert dict(box.kernel)["modules"] == "nvidia nvidia_peermem mlx5_core"
    assert dict(box.kernel)["locked memory"] == "unlimited"


def test_nic_below_the_same_switch_as_the_gpu_is_preferred_alone(box: HostFacts) -> None:
    fifth = box.gpus[4]
    ranked = ranked_nics(box, fifth.place)
    assert [(row.nic.name, row.separation.level, row.is_preferred) for row in ranked] == [
        ("ens3", Level.SWITCH, True),
        ("ens4", Level.NODE, False),
        ("ens1", Level.FAR, False),
        ("ens2", Level.FAR, False),
        ("eno1", Level.FAR, False),
    ]
    assert ranked[2].separation.numa_distance == 21


def test_host_memory_prefers_all_fast_nics_of_its_node(box: HostFacts) -> None:
    ranked = ranked_nics(box, Place(numa_node=0))
    assert [row.nic.name for row in ranked if row.is_preferred] == ["ens1", "ens2"]
    assert ranked[-1].nic.name == "eno1", "near, but of 1 Gbit/s"


def test_memory_of_unknown_place_prefers_every_fast_nic(box: HostFacts) -> None:
    ranked = ranked_nics(box, Place())
    assert [row.nic.name for row in ranked if row.is_preferred] == ["ens1", "ens2", "ens3", "ens4"]


def test_rdma_devices_are_ordered_by_distance(box: HostFacts) -> None:
    names = [device.name for device, _ in ranked_rdma(box, box.gpus[6].place)]
    assert names == ["mlx5_3", "mlx5_2", "mlx5_0", "mlx5_1"]


def test_distances_know_switch_node_and_socket(box: HostFacts) -> None:
    far = {(one, other): apart.level for one, other, apart in distances(box)}
    gpus = [gpu.address for gpu in box.gpus]
    assert far[gpus[0], gpus[1]] is Level.SWITCH
    assert far[gpus[0], gpus[2]] is Level.NODE
    assert far[gpus[0], gpus[7]] is Level.FAR
    assert far[gpus[0], "ens1"] is Level.SWITCH
    assert far[gpus[0], "mlx5_0"] is Level.SWITCH


def test_functions_of_one_card_are_the_same_place() -> None:
    path = ("pci0000:15", "0000:15:01.0", "0000:16:00.0")
    other = (*path[:2], "0000:16:00.1")
    facts = HostFacts()
    assert separation(Place(pci_path=path), Place(pci_path=other), facts).level is Level.SAME
    beside = Place(pci_path=("pci0000:15", "0000:15:03.0", "0000:19:00.0"))
    assert separation(Place(pci_path=path), beside, facts).level is Level.ROOT


def test_what_is_unknown_is_farther_than_what_is_known() -> None:
    facts = HostFacts(numa_nodes=(NumaNode(index=0), NumaNode(index=1)))
    unknown = separation(Place(), Place(numa_node=0), facts)
    far = separation(Place(numa_node=1), Place(numa_node=0), facts)
    assert unknown.level is Level.UNKNOWN
    assert far < unknown


def test_laptop_has_one_usable_nic_and_no_server_s_parts(tmp_path: Path) -> None:
    files, addresses = laptop()
    facts = read_host(HostFiles(root=planted(tmp_path, files)), addresses=lambda: addresses)
    assert [row.nic.name for row in ranked_nics(facts, Place())] == ["wlp0s20f3"]
    assert ranked_nics(facts, Place())[0].is_preferred
    assert ranked_nics(facts, Place())[0].nic.speed_bytes_per_s == 0
    assert facts.rdma_devices == ()
    assert [gpu.vendor for gpu in facts.gpus] == ["0x8086"]
    assert facts.gpus[0].place.numa_node is None
    assert facts.huge_pages.shmem == "never"


def test_empty_container_says_nothing_and_does_not_fail(tmp_path: Path) -> None:
    files = HostFiles(root=tmp_path)
    facts = read_host(files, addresses=dict)
    assert facts == HostFacts()
    assert boot_id(files) == bytes(16)
    assert namespace_id("pid", files) == 0
    assert ranked_nics(facts, Place()) == ()


def test_nic_that_sysfs_does_not_show_is_known_by_its_address(tmp_path: Path) -> None:
    addresses = {"eth0": (NicAddress(host="10.1.2.3", prefix=16),)}
    facts = read_host(HostFiles(root=tmp_path), addresses=lambda: addresses)
    assert facts.nics == (Nic(name="eth0", is_up=True, addresses=addresses["eth0"]),)


def test_bond_lies_where_its_cards_lie(tmp_path: Path) -> None:
    files, addresses = two_sockets()
    files["/sys/devices/virtual/net/bond0/operstate"] = "up"
    files["/sys/devices/virtual/net/bond0/speed"] = "400000"
    files["/sys/class/net/bond0"] = "-> ../../devices/virtual/net/bond0"
    for name in ("ens1", "ens2"):
        files[f"/sys/devices/virtual/net/bond0/lower_{name}"] = f"-> ../../../../class/net/{name}"
    addresses["bond0"] = (NicAddress(host="10.9.0.7", prefix=24),)
    facts = read_host(HostFiles(root=planted(tmp_path, files)), addresses=lambda: addresses)
    bond = next(nic for nic in facts.nics if nic.name == "bond0")
    assert {place.pci_path[0] for place in bond.places} == {"pci0000:15", "pci0000:37"}
    assert ranked_nics(facts, facts.gpus[3].place)[0].nic.name in ("bond0", "ens2")


def test_fifo_and_loop_of_links_in_the_tree_stop_nothing(tmp_path: Path) -> None:
    files, addresses = two_sockets()
    planted(tmp_path, files)
    speed = tmp_path / "sys/class/net/ens1/speed"
    speed.unlink()
    os.mkfifo(speed)
    device = tmp_path / "sys/class/net/ens2/device"
    device.unlink()
    device.symlink_to("device")
    facts = read_host(HostFiles(root=tmp_path), addresses=lambda: addresses)
    assert facts.nics[1].speed_bytes_per_s == 0
    assert [nic.name for nic in facts.nics][2] == "ens2"


def test_addresses_in_the_network_of_a_nic_are_found() -> None:
    ours = NicAddress(host="10.0.1.7", prefix=24)
    assert shared_network(ours, ["10.0.1.9", "10.0.2.9", "fd00::1", "store.local"]) == ["10.0.1.9"]
    six = NicAddress(host="fd00:1::7", prefix=64)
    assert shared_network(six, ["fd00:1::9", "fd00:2::9", "10.0.1.9"]) == ["fd00:1::9"]


def test_this_host_can_be_read() -> None:
    facts = read_host()
    assert any(nic.is_loopback for nic in facts.nics)
    assert boot_id() == boot_id() != bytes(16)
    assert namespace_id("pid") > 0
    for addresses in kernel_addresses().values():
        assert not any(address.host.startswith("fe80") for address in addresses)


def test_virtual_machine_s_nic_lies_where_its_pci_function_lies(tmp_path: Path) -> None:
    card = "/sys/devices/pci0000:00/0000:00:03.0"
    files = {
        f"{card}/numa_node": "1",
        f"{card}/virtio2/net/eth0/operstate": "up",
        f"{card}/virtio2/net/eth0/device": "-> ../../../virtio2",
        "/sys/class/net/eth0": "-> ../../devices/pci0000:00/0000:00:03.0/virtio2/net/eth0",
        "/sys/bus/pci/devices/0000:00:03.0": "-> ../../../devices/pci0000:00/0000:00:03.0",
    }
    (nic,) = read_host(HostFiles(root=planted(tmp_path, files)), addresses=dict).nics
    assert nic.places == (Place(numa_node=1, pci_path=("pci0000:00", "0000:00:03.0")),)
