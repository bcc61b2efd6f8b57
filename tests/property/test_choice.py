"""Whatever two ends know of each other: one scheme that can carry it, or an error with every reason."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from snowskin.transport.addresses import Address
from snowskin.transport.advertisement import (
    AdvertisedAddress,
    Advertisement,
    HostIdentity,
    SchemeAdvertisement,
)
from snowskin.transport.choice import (
    AUTO,
    SCHEMES,
    Encounter,
    MemoryEnd,
    OwnSide,
    TransportProbe,
    choose,
)
from snowskin.transport.errors import TransportUnavailable
from snowskin.transport.topology import Gpu, HostFacts, Nic, NicAddress, Place, RdmaDevice

kinds = st.lists(
    st.sampled_from(["rdma:Ethernet", "rdma:InfiniBand", "gpudirect", "cuda_ipc"]), unique=True
).map(tuple)
ids = st.sampled_from([bytes(16), b"a" * 16, b"b" * 16])
identities = st.builds(
    HostIdentity,
    host=ids,
    process=ids,
    pid_namespace=st.integers(0, 2),
    net_namespace=st.integers(0, 2),
)
hosts = st.sampled_from(["10.0.0.9", "fd00::9", "127.0.0.1", "::1", "store-1", "10.9.9.9", "0"])
facts = st.builds(
    HostFacts,
    nics=st.lists(
        st.builds(
            Nic,
            name=st.sampled_from(["a", "b", "c"]),
            is_up=st.booleans(),
            addresses=st.lists(
                st.builds(NicAddress, host=hosts, prefix=st.integers(0, 130)), max_size=2
            ).map(tuple),
        ),
        max_size=3,
        unique_by=lambda nic: nic.name,
    ).map(tuple),
    rdma_devices=st.just((RdmaDevice(name="m", link_layer="Ethernet", is_active=True),)),
    gpus=st.just((Gpu(address="0000:19:00.0"),)),
)
advertised = st.builds(
    AdvertisedAddress,
    address=st.builds(Address, hosts, st.just(7200)),
    is_preferred=st.booleans(),
)
peers = st.none() | st.builds(
    Advertisement,
    identity=identities,
    schemes=st.lists(
        st.builds(
            SchemeAdvertisement,
            scheme=st.sampled_from(["shm", "ucx", "tcp"]),
            kinds=kinds,
            addresses=st.lists(advertised, max_size=3).map(tuple),
        ),
        unique_by=lambda scheme: scheme.scheme,
    ).map(tuple),
)
ends = st.builds(
    MemoryEnd,
    gpu=st.sampled_from(["", "", "0000:19:00.0"]),
    place=st.builds(Place, numa_node=st.sampled_from([None, 0, 1])),
    is_shareable=st.booleans(),
)


@st.composite
def encounters(draw: st.DrawFn) -> Encounter:
    tried = draw(st.sets(st.sampled_from(SCHEMES)))
    own = OwnSide(
        identity=draw(identities),
        facts=draw(facts),
        probes={
            scheme: TransportProbe(
                scheme=scheme, available=draw(st.booleans()), reason="tried", kinds=draw(kinds)
            )
            for scheme in tried
        },
        trusted_network=draw(st.booleans()),
    )
    return Encounter(
        own=own,
        peer=draw(peers),
        local=draw(ends),
        remote=draw(ends),
        has_local_door=draw(st.booleans()),
        has_grpc=draw(st.booleans()),
    )


@given(meeting=encounters(), wanted=st.sampled_from([AUTO, *SCHEMES]))
def test_choice_keeps_its_rules(meeting: Encounter, wanted: str) -> None:
    try:
        choice = choose(meeting, wanted)
    except TransportUnavailable:
        return
    assert wanted in (AUTO, choice.scheme)
    assert sorted([choice.scheme, *(one.scheme for one in choice.not_taken)]) == sorted(SCHEMES)
    assert all(one.reason for one in choice.not_taken)
    assert choice.reason
    has_gpu = bool(meeting.local.gpu or meeting.remote.gpu)
    assert choice.scheme == "ucx" or not has_gpu
    match choice.scheme:
        case "loopback":
            assert meeting.own.identity.same_process(meeting.peer_identity)
        case "shm":
            assert meeting.has_local_door
            assert meeting.remote.is_shareable
        case "ucx":
            assert meeting.peer is not None
            assert (
                choice.via == "messages"
                or meeting.own.trusted_network
                or choice.via in ("rdma", "gpudirect", "cuda_ipc")
            )
        case "tcp":
            assert choice.paths
            assert choice.paths[0].is_preferred
            order = [path.is_preferred for path in choice.paths]
            assert order == sorted(order, reverse=True)
            assert len({path.name for path in choice.paths}) == len(choice.paths)
    if choice.scheme in ("shm", "ucx", "tcp"):
        assert meeting.own.probes[choice.scheme].available


@given(encounters())
def test_auto_takes_the_first_that_a_demand_by_name_could_have(meeting: Encounter) -> None:
    could = []
    for scheme in SCHEMES:
        try:
            choice = choose(meeting, scheme)
        except TransportUnavailable:
            continue
        if choice.via not in ("messages", "emulated"):
            could.append(scheme)
    try:
        assert choose(meeting).scheme == could[0]
    except TransportUnavailable:
        assert not could
