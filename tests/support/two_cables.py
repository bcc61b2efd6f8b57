"""An owner and a reader of `tcp` on two hosts joined by two cables.

Rules kept here: the owner listens on both cables and by both families; both sides are processes of their own, and end
with their block.
"""

from __future__ import annotations

from snowskin.transport.addresses import Reachability
from tests.support.transfer_child import TransferChild


def owner_on_both_cables(hosts, owned):
    """In host b, on both cables and by both families."""
    addresses = [f"{hosts.b.address(cable)}:0" for cable in (0, 1)]
    addresses.append(f"[{hosts.b.address(0, version=6)}]:0")
    return TransferChild("tcp", owned, command=hosts.b.command, listen=addresses)


def reader_of(hosts, landing):
    """In host a."""
    return TransferChild("tcp", landing, command=hosts.a.command, listen=[])


def addresses_of(descriptor):
    return Reachability.from_bytes(descriptor.extra).addresses


def pulled(reader, descriptor, nbytes, *, within_s=5.0):
    region = reader.attach(descriptor)
    try:
        return reader.ask("pull", region=region, runs=[(0, 0, nbytes)], within_s=within_s)
    finally:
        reader.ask("detach", region=region)
