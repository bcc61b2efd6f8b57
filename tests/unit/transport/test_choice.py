"""Which transport is taken between which ends, with the reasons; and what a demand by name gets."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from snowskin.transport.addresses import Address
from snowskin.transport.advertisement import (
    AdvertisedAddress,
    Advertisement,
    HostIdentity,
    SchemeAdvertisement,
)
from snowskin.transport.choice import (
    SCHEMES,
    Choice,
    Encounter,
    MemoryEnd,
    OwnSide,
    TransportProbe,
    choose,
)
from snowskin.transport.errors import TransportUnavailable
from snowskin.transport.host_probe import HostFiles, read_host
from tests.support.fake_sysfs import planted, two_sockets

if TYPE_CHECKING:
    from pathlib import Path

    from snowskin.transport.topology import HostFacts

HERE = HostIdentity(host=b"a" * 16, process=b"1" * 16, pid_namespace=10, net_namespace=20)
BESIDE = replace(HERE, process=b"2" * 16)
IN_CONTAINER = HostIdentity(host=b"a" * 16, process=b"3" * 16, pid_namespace=11, net_namespace=21)
FAR = HostIdentity(host=b"b" * 16, process=b"4" * 16, pid_namespace=10, net_namespace=20)
GPU_0, GPU_7 = "0000:19:00.0", "0000:bc:00.0"
ALL_KINDS = ("rdma:Ethernet", "gpudirect", "cuda_ipc")


@pytest.fixture
def box(tmp_path: Path) -> HostFacts:
    files, addresses = two_sockets()
    planted(tmp_path, files)
    return read_host(HostFiles(root=tmp_path), addresses=lambda: addresses)


@pytest.fixture
def own(box: HostFacts) -> OwnSide:
    return OwnSide(identity=HERE, facts=box, probes=probes())


def probes(*missing: str, kinds: tuple[str, ...] = ALL_KINDS) -> dict[str, TransportProbe]:
    return {
        scheme: TransportProbe(
            scheme=scheme,
            available=scheme not in missing,
            reason=f"{scheme} tried",
            remedy=f"install {scheme}",
            kinds=kinds if scheme == "ucx" else (),
        )
        for scheme in SCHEMES
    }


def peer(
    identity: HostIdentity,
    *,
    without: str = "",
    kinds: tuple[str, ...] = ALL_KINDS,
    host: str = "10.0.2.9",
) -> Advertisement:
    tcp = AdvertisedAddress(address=Address(host, 7200), speed_bytes_per_s=25 * 10**9)
    schemes = (
        SchemeAdvertisement(scheme="shm"),
        SchemeAdvertisement(scheme="ucx", kinds=kinds, extra=b"worker"),
        SchemeAdvertisement(scheme="tcp", addresses=(tcp,)),
    )
    return Advertisement(
        identity=identity, schemes=tuple(one for one in schemes if one.scheme != without)
    )


def gpu_end(box: HostFacts, address: str) -> MemoryEnd:
    found = box.gpu(address)
    assert found is not None
    return MemoryEnd(gpu=address, place=found.place)


def refused(choice: Choice) -> dict[str, str]:
    return {one.scheme: one.reason for one in choice.not_taken}


def test_same_process_is_served_by_loopback(own: OwnSide) -> None:
    choice = choose(Encounter(own=own, peer=peer(HERE), has_local_door=True))
    assert choice.scheme == "loopback"
    assert refused(choice)["shm"] == "loopback comes before it"


def test_same_host_is_served_by_shm_and_says_why_not_the_others(own: OwnSide) -> None:
    choice = choose(Encounter(own=own, peer=peer(BESIDE), has_local_door=True))
    assert (choice.scheme, choice.paths) == ("shm", ())
    assert list(refused(choice)) == ["loopback", "ucx", "tcp", "grpc"]
    assert refused(choice)["loopback"] == "another process"


def test_same_host_without_a_door_says_that_the_door_is_missing(own: OwnSide) -> None:
    meeting = Encounter(own=own, peer=peer(IN_CONTAINER, kinds=()))
    choice = choose(meeting)
    assert choice.scheme == "tcp"
    assert "no local door" in refused(choice)["shm"]
    with pytest.raises(TransportUnavailable, match=r"shm was asked for.*--door"):
        choose(meeting, "shm")


def test_memory_that_cannot_be_passed_is_not_for_shm(own: OwnSide) -> None:
    meeting = Encounter(
        own=own, peer=peer(BESIDE, kinds=()), remote=MemoryEnd(), has_local_door=True
    )
    assert choose(meeting).scheme == "tcp"


def test_rdma_on_both_sides_comes_before_tcp_with_the_nearest_device_first(
    own: OwnSide, box: HostFacts
) -> None:
    place = replace(box.gpus[6].place, pci_path=())
    choice = choose(Encounter(own=own, peer=peer(FAR), local=MemoryEnd(place=place)))
    assert (choice.scheme, choice.via) == ("ucx", "rdma")
    assert choice.devices[:2] == ("mlx5_2:1", "mlx5_3:1")
    assert refused(choice)["shm"] == "another host"


def test_other_link_layer_is_not_reached_by_rdma(own: OwnSide) -> None:
    choice = choose(Encounter(own=own, peer=peer(FAR, kinds=("rdma:InfiniBand",))))
    assert choice.scheme == "tcp"
    assert "RDMA is Ethernet here, InfiniBand there" in refused(choice)["ucx"]


def test_two_gpus_of_one_host_use_cuda_ipc(own: OwnSide, box: HostFacts) -> None:
    here, there = gpu_end(box, GPU_0), gpu_end(box, GPU_7)
    choice = choose(
        Encounter(own=own, peer=peer(BESIDE), has_local_door=True, local=here, remote=there)
    )
    assert (choice.scheme, choice.via) == ("ucx", "cuda_ipc")
    assert "moves host memory" in refused(choice)["shm"]


def test_cuda_ipc_does_not_cross_pid_namespaces(own: OwnSide, box: HostFacts) -> None:
    here, there = gpu_end(box, GPU_0), gpu_end(box, GPU_7)
    choice = choose(Encounter(own=own, peer=peer(IN_CONTAINER), local=here, remote=there))
    assert (choice.scheme, choice.via) == ("ucx", "gpudirect")
    with pytest.raises(TransportUnavailable, match="does not cross PID namespaces"):
        choose(
            Encounter(
                own=own, peer=peer(IN_CONTAINER, kinds=("cuda_ipc",)), local=here, remote=there
            )
        )


def test_gpus_of_two_hosts_use_gpudirect_by_the_gpu_s_own_nic(own: OwnSide, box: HostFacts) -> None:
    choice = choose(
        Encounter(own=own, peer=peer(FAR), local=gpu_end(box, GPU_7), remote=MemoryEnd(gpu="x"))
    )
    assert (choice.scheme, choice.via) == ("ucx", "gpudirect")
    assert choice.devices[0] == "mlx5_3:1"


def test_gpu_memory_that_nothing_carries_is_an_error_with_all_reasons(
    own: OwnSide, box: HostFacts
) -> None:
    own = replace(own, probes=probes("ucx"))
    with pytest.raises(TransportUnavailable) as error:
        choose(Encounter(own=own, peer=peer(FAR), local=gpu_end(box, GPU_0)))
    for scheme in SCHEMES:
        assert f"{scheme}: " in error.value.message
    assert error.value.hint


def test_tcp_is_taken_over_the_nearest_nic(own: OwnSide) -> None:
    choice = choose(Encounter(own=own, peer=peer(FAR, kinds=())))
    assert choice.scheme == "tcp"
    assert choice.paths[0].local_address == "10.0.2.7"
    assert "no RDMA there" in refused(choice)["ucx"]


def test_peer_that_advertises_its_loopback_to_others_is_told_apart(own: OwnSide) -> None:
    meeting = Encounter(own=own, peer=peer(FAR, kinds=(), host="127.0.0.1"))
    choice = choose(meeting)
    assert choice.scheme == "grpc"
    assert "127.0.0.1:7200, which does not lead there" in refused(choice)["tcp"]
    with pytest.raises(TransportUnavailable, match="advertise an address"):
        choose(meeting, "tcp")


def test_peer_that_says_nothing_is_read_by_grpc(own: OwnSide) -> None:
    choice = choose(Encounter(own=own, peer=None))
    assert choice.scheme == "grpc"
    assert refused(choice)["tcp"] == "the peer says nothing of its transports"
    assert choose(Encounter(own=own, peer=None, has_local_door=True)).scheme == "shm"


def test_scheme_demanded_by_name_is_taken_though_another_comes_before_it(own: OwnSide) -> None:
    meeting = Encounter(own=own, peer=peer(BESIDE), has_local_door=True)
    choice = choose(meeting, "tcp")
    assert choice.scheme == "tcp"
    assert choice.reason.startswith("asked for by name")
    assert refused(choice)["shm"] == "tcp was asked for by name"


def test_scheme_demanded_by_name_that_is_not_installed_says_what_to_do(own: OwnSide) -> None:
    own = replace(own, probes=probes("ucx"))
    with pytest.raises(TransportUnavailable, match=r"cannot be had: ucx tried\. install ucx"):
        choose(Encounter(own=own, peer=peer(FAR)), "ucx")


def test_scheme_that_the_peer_does_not_offer_is_no_silent_fallback(own: OwnSide) -> None:
    with pytest.raises(TransportUnavailable, match="the peer does not offer tcp"):
        choose(Encounter(own=own, peer=peer(FAR, without="tcp")), "tcp")


def test_ucx_demanded_without_rdma_lets_the_owner_validate_unless_the_network_is_trusted(
    own: OwnSide,
) -> None:
    meeting = Encounter(own=own, peer=peer(FAR, kinds=()))
    assert choose(meeting, "ucx").via == "messages"
    trusting = replace(meeting, own=replace(own, trusted_network=True))
    assert choose(trusting, "ucx").via == "emulated"
    assert choose(trusting).scheme == "tcp"


def test_unknown_name_lists_the_known_ones(own: OwnSide) -> None:
    with pytest.raises(TransportUnavailable, match="loopback, shm, ucx, tcp, grpc, auto"):
        choose(Encounter(own=own, peer=None), "nixl")


def test_scheme_that_was_never_tried_is_not_taken(own: OwnSide) -> None:
    own = replace(own, probes={})
    choice = choose(Encounter(own=own, peer=peer(FAR), has_local_door=True))
    assert choice.scheme == "grpc"
    assert "not tried" in refused(choice)["shm"]
