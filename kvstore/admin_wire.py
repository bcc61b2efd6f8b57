"""What a node tells its operator, between protobuf and our own values, in both directions.

Rules kept here: as in `wire`: what cannot be understood raises; a value of a newer peer that is not known becomes an
error of the protocol, never another value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from snowskin.kvstore.admin_messages import (
    BlockInfo,
    BlockPage,
    Drained,
    Evicted,
    LeaseInfo,
    LeaseKind,
    LeasePage,
    LeaseState,
    ListedTransport,
    ShownBlock,
    TransportsReport,
)
from snowskin.kvstore.errors import BadRequest, ProtocolViolation
from snowskin.kvstore.extent import Extent
from snowskin.kvstore.messages import LeaseId
from snowskin.kvstore.wire import CRC32C_KEYED, TIER_NAMES, TIERS
from snowskin.transport.choice import TransportProbe
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
from snowskin.v1 import admin_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable

_KINDS = {
    LeaseKind.READ: admin_pb2.LEASE_KIND_READ,
    LeaseKind.WRITE: admin_pb2.LEASE_KIND_WRITE,
}
_KIND_NAMES: dict[int, LeaseKind] = {number: kind for kind, number in _KINDS.items()}
_STATES = {
    LeaseState.ACTIVE: admin_pb2.LEASE_STATE_ACTIVE,
    LeaseState.GRACE: admin_pb2.LEASE_STATE_GRACE,
    LeaseState.QUARANTINED: admin_pb2.LEASE_STATE_QUARANTINED,
}
_STATE_NAMES: dict[int, LeaseState] = {number: state for state, number in _STATES.items()}


def kind_from(number: int) -> LeaseKind | None:
    """Which leases a request asks for; None where both."""
    if number == admin_pb2.LEASE_KIND_UNSPECIFIED:
        return None
    if number not in _KIND_NAMES:
        raise BadRequest(f"lease kind {number} is not known here", hint="ask for READ or WRITE")
    return _KIND_NAMES[number]


def kind_to(kind: LeaseKind | None) -> Any:
    """The kind on the wire."""
    return admin_pb2.LEASE_KIND_UNSPECIFIED if kind is None else _KINDS[kind]


# --- node's side


def _set_block(message: admin_pb2.BlockInfo, block: BlockInfo) -> None:
    message.namespace = block.namespace
    message.key = block.key
    message.extent.tier = TIERS[block.extent.tier]
    message.extent.pool_id = block.extent.pool_id
    message.extent.offset = block.extent.offset
    message.extent.nbytes = block.extent.nbytes
    message.extent.generation = block.extent.generation
    message.parent_key = block.parent_key
    message.num_children = block.num_children
    message.num_read_leases = block.num_read_leases
    message.age_s = block.age_s
    message.idle_s = block.idle_s
    message.one_reader = block.one_reader


def _set_lease(message: admin_pb2.LeaseInfo, lease: LeaseInfo) -> None:
    message.id = lease.id
    message.kind = _KINDS[lease.kind]
    message.state = _STATES[lease.state]
    message.client = lease.client
    message.age_s = lease.age_s
    message.seconds_left = lease.seconds_left
    message.num_blocks = lease.num_blocks
    message.nbytes = lease.nbytes


def block_page_to(page: BlockPage) -> admin_pb2.ListBlocksResponse:
    """Some blocks."""
    message = admin_pb2.ListBlocksResponse(next_page_token=page.next_page_token)
    for block in page.blocks:
        _set_block(message.blocks.add(), block)
    return message


def shown_to(shown: tuple[ShownBlock, ...]) -> admin_pb2.ShowBlockResponse:
    """One block, in each of its shards."""
    message = admin_pb2.ShowBlockResponse()
    for one in shown:
        record = message.blocks.add()
        _set_block(record.block, one.block)
        record.checksum.algorithm = CRC32C_KEYED
        record.checksum.packed = one.checksum
        for lease in one.leases:
            _set_lease(record.leases.add(), lease)
    return message


def lease_page_to(page: LeasePage) -> admin_pb2.ListLeasesResponse:
    """Some leases."""
    message = admin_pb2.ListLeasesResponse(next_page_token=page.next_page_token)
    for lease in page.leases:
        _set_lease(message.leases.add(), lease)
    return message


def revoked_to(lease: LeaseInfo) -> admin_pb2.RevokeLeaseResponse:
    """A lease that was revoked."""
    message = admin_pb2.RevokeLeaseResponse()
    _set_lease(message.lease, lease)
    return message


def evicted_to(evicted: Evicted) -> admin_pb2.EvictResponse:
    """What went."""
    return admin_pb2.EvictResponse(
        num_blocks=evicted.num_blocks,
        nbytes=evicted.nbytes,
        num_held=evicted.num_held,
        num_unknown=evicted.num_unknown,
    )


def transports_to(report: TransportsReport) -> admin_pb2.ListTransportsResponse:
    """How the node is reached."""
    message = admin_pb2.ListTransportsResponse(advertisement=report.advertisement, door=report.door)
    for listed in report.transports:
        probe = listed.probe
        row = message.transports.add(
            scheme=probe.scheme,
            available=probe.available,
            reason=probe.reason,
            remedy=probe.remedy,
            kinds=probe.kinds,
            bound=listed.bound,
            advertised=listed.advertised,
            open=listed.is_open,
        )
        row.counters.update(listed.counters)
        _add_facts(row.facts, probe.facts)
    _set_host(message.host, report.host)
    return message


def _add_facts(container: Any, facts: Iterable[tuple[str, str]]) -> None:
    for name, value in facts:
        container.add(name=name, value=value)


def _place_to(place: Place) -> admin_pb2.DevicePlace:
    return admin_pb2.DevicePlace(numa_node=place.numa_node, pci_path=place.pci_path)


def _set_host(message: admin_pb2.HostInfo, host: HostFacts) -> None:
    for node in host.numa_nodes:
        message.numa_nodes.add(
            index=node.index,
            cpus=node.cpus,
            memory_nbytes=node.memory_nbytes,
            distances=node.distances,
        )
    for nic in host.nics:
        message.nics.add(
            name=nic.name,
            speed_bytes_per_s=nic.speed_bytes_per_s,
            up=nic.is_up,
            loopback=nic.is_loopback,
            addresses=[f"{address.host}/{address.prefix}" for address in nic.addresses],
            places=[_place_to(place) for place in nic.places],
        )
    for device in host.rdma_devices:
        message.rdma_ports.add(
            device=device.name,
            port=device.port,
            link_layer=device.link_layer,
            active=device.is_active,
            speed_bytes_per_s=device.speed_bytes_per_s,
            place=_place_to(device.place),
            nics=device.nics,
        )
    for gpu in host.gpus:
        message.gpus.add(
            address=gpu.address, vendor=gpu.vendor, device=gpu.device, place=_place_to(gpu.place)
        )
    pages = host.huge_pages
    message.huge_pages.shmem = pages.shmem
    message.huge_pages.anonymous = pages.anonymous
    message.huge_pages.page_nbytes = pages.page_nbytes
    _add_facts(message.huge_pages.mounts, pages.mounts)
    for page_nbytes, num_pages, num_free in pages.reserved:
        message.huge_pages.reserved.add(
            page_nbytes=page_nbytes, num_pages=num_pages, num_free=num_free
        )
    _add_facts(message.kernel, host.kernel)


# --- operator's side


def _block_from(message: admin_pb2.BlockInfo, node_id: str) -> BlockInfo:
    tier = TIER_NAMES.get(message.extent.tier)
    if tier is None:
        raise ProtocolViolation(
            f"node {node_id} tells of a block in tier {message.extent.tier}",
            hint="check the wire version",
        )
    return BlockInfo(
        namespace=message.namespace,
        key=message.key,
        extent=Extent(
            node_id=node_id,
            tier=tier,
            pool_id=message.extent.pool_id,
            offset=message.extent.offset,
            nbytes=message.extent.nbytes,
            generation=message.extent.generation,
        ),
        parent_key=message.parent_key,
        num_children=message.num_children,
        num_read_leases=message.num_read_leases,
        age_s=message.age_s,
        idle_s=message.idle_s,
        one_reader=message.one_reader,
    )


def lease_from(message: admin_pb2.LeaseInfo) -> LeaseInfo:
    """One lease."""
    kind, state = _KIND_NAMES.get(message.kind), _STATE_NAMES.get(message.state)
    if kind is None or state is None:
        raise ProtocolViolation(
            f"lease {message.id} is of kind {message.kind} in state {message.state}",
            hint="check the wire version",
        )
    return LeaseInfo(
        id=LeaseId(message.id),
        kind=kind,
        state=state,
        client=message.client,
        age_s=message.age_s,
        seconds_left=message.seconds_left,
        num_blocks=message.num_blocks,
        nbytes=message.nbytes,
    )


def block_page_from(message: admin_pb2.ListBlocksResponse, node_id: str) -> BlockPage:
    """Some blocks of that node."""
    return BlockPage(
        blocks=tuple(_block_from(block, node_id) for block in message.blocks),
        next_page_token=message.next_page_token,
    )


def shown_from(message: admin_pb2.ShowBlockResponse, node_id: str) -> tuple[ShownBlock, ...]:
    """One block, in each of its shards on that node."""
    return tuple(
        ShownBlock(
            block=_block_from(shown.block, node_id),
            checksum=shown.checksum.packed,
            leases=tuple(lease_from(lease) for lease in shown.leases),
        )
        for shown in message.blocks
    )


def lease_page_from(message: admin_pb2.ListLeasesResponse) -> LeasePage:
    """Some leases."""
    return LeasePage(
        leases=tuple(lease_from(lease) for lease in message.leases),
        next_page_token=message.next_page_token,
    )


def evicted_from(message: admin_pb2.EvictResponse) -> Evicted:
    """What went."""
    return Evicted(
        num_blocks=message.num_blocks,
        nbytes=message.nbytes,
        num_held=message.num_held,
        num_unknown=message.num_unknown,
    )


def drained_from(message: admin_pb2.DrainResponse) -> Drained:
    """What a draining node still serves."""
    return Drained(
        num_read_leases=message.num_read_leases, num_write_leases=message.num_write_leases
    )


def transports_from(message: admin_pb2.ListTransportsResponse) -> TransportsReport:
    """How that node is reached."""
    return TransportsReport(
        transports=tuple(
            ListedTransport(
                probe=TransportProbe(
                    scheme=row.scheme,
                    available=row.available,
                    reason=row.reason,
                    remedy=row.remedy,
                    kinds=tuple(row.kinds),
                    facts=_facts_from(row.facts),
                ),
                bound=tuple(row.bound),
                advertised=tuple(row.advertised),
                is_open=row.open,
                counters=tuple(sorted(row.counters.items())),
            )
            for row in message.transports
        ),
        advertisement=message.advertisement,
        host=_host_from(message.host),
        door=message.door,
    )


def _place_from(message: admin_pb2.DevicePlace) -> Place:
    node = message.numa_node if message.HasField("numa_node") else None
    return Place(numa_node=node, pci_path=tuple(message.pci_path))


def _addresses_from(texts: Iterable[str]) -> tuple[NicAddress, ...]:
    """Of `10.0.0.7/24`; what is no such thing is left out."""
    found = []
    for text in texts:
        host, slash, prefix = text.rpartition("/")
        if slash and prefix.isascii() and prefix.isdigit() and len(prefix) < 4:
            found.append(NicAddress(host=host, prefix=int(prefix)))
    return tuple(found)


def _host_from(message: admin_pb2.HostInfo) -> HostFacts:
    pages = message.huge_pages
    return HostFacts(
        numa_nodes=tuple(
            NumaNode(
                index=node.index,
                cpus=node.cpus,
                distances=tuple(node.distances),
                memory_nbytes=node.memory_nbytes,
            )
            for node in message.numa_nodes
        ),
        nics=tuple(
            Nic(
                name=nic.name,
                speed_bytes_per_s=max(nic.speed_bytes_per_s, 0.0),
                is_up=nic.up,
                is_loopback=nic.loopback,
                addresses=_addresses_from(nic.addresses),
                places=tuple(_place_from(place) for place in nic.places),
            )
            for nic in message.nics
        ),
        rdma_devices=tuple(
            RdmaDevice(
                name=port.device,
                port=port.port,
                link_layer=port.link_layer,
                is_active=port.active,
                speed_bytes_per_s=port.speed_bytes_per_s,
                place=_place_from(port.place),
                nics=tuple(port.nics),
            )
            for port in message.rdma_ports
        ),
        gpus=tuple(
            Gpu(
                address=gpu.address,
                vendor=gpu.vendor,
                device=gpu.device,
                place=_place_from(gpu.place),
            )
            for gpu in message.gpus
        ),
        huge_pages=HugePages(
            shmem=pages.shmem,
            anonymous=pages.anonymous,
            page_nbytes=pages.page_nbytes,
            mounts=_facts_from(pages.mounts),
            reserved=tuple(
                (row.page_nbytes, row.num_pages, row.num_free) for row in pages.reserved
            ),
        ),
        kernel=_facts_from(message.kernel),
    )


def _facts_from(facts: Iterable[admin_pb2.NamedFact]) -> tuple[tuple[str, str], ...]:
    return tuple((fact.name, fact.value) for fact in facts)
