"""`kvctl transports`: how each node's memory can be reached, and which way would be taken to it from here."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from snowskin.tools.kvctl.node_choice import ask_nodes, end_by, node_option
from snowskin.tools.kvctl.output import (
    nbytes_text,
    print_document,
    print_table,
    table,
    with_settings,
)
from snowskin.transport.advertisement import Advertisement, HostIdentity
from snowskin.transport.choice import AUTO, SCHEMES, Choice, Encounter, MemoryEnd, OwnSide, choose
from snowskin.transport.errors import BadDescriptor, TransportUnavailable
from snowskin.transport.host_probe import read_host
from snowskin.transport.probes import own_identity, probe_transports
from snowskin.transport.topology import Place, distances

if TYPE_CHECKING:
    from rich.table import Table

    from snowskin.kvstore.admin_messages import TransportsReport
    from snowskin.tools.kvctl.node_choice import NodeAnswer
    from snowskin.tools.kvctl.output import KvctlSettings
    from snowskin.transport.choice import TransportProbe
    from snowskin.transport.topology import HostFacts, Nic

HERE = "this host"
MOVED = ("pulled_nbytes", "pushed_nbytes", "served_nbytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """From one place to a node; `error` says why there is none."""

    start: str
    node: str
    choice: Choice | None = None
    error: str = ""


EPILOG = """
\b
Columns of `transports`:
  scheme       shm: memory of this host; ucx: RDMA and GPUs; tcp: between hosts; grpc: the slow path
  works        what trying it showed when the node started; `open`: it serves
  bound        where it listens
  advertised   where peers are told to come, the preferred ones first
  connections  open now
  moved        bytes that peers pulled and pushed, or the node itself
  refused      what peers were refused
  why          what was tried, and what to do where it does not work
\b
Columns of `ways`:
  from, to     the two ends
  scheme       what is taken, and by what, where ucx is
  path         of tcp and RDMA: the preferred ones; +N: fall-back
  why          why this one; then a line for each that was not taken
"""


@click.command(epilog=EPILOG)
@click.option(
    "--from",
    "start",
    metavar="NODE",
    default="",
    help="Ways from this node instead of from this host; it must be among those asked.",
)
@click.option(
    "--scheme",
    type=click.Choice([AUTO, *SCHEMES]),
    default=AUTO,
    show_default=True,
    help="Ways as if this one was demanded.",
)
@click.option(
    "--numa", type=click.IntRange(min=0), default=None, help="NUMA node of this end's memory."
)
@click.option("--ucx", is_flag=True, help="Try UCX on this host too; loads its libraries.")
@node_option
@with_settings
def transports(
    settings: KvctlSettings,
    start: str,
    scheme: str,
    numa: int | None,
    ucx: bool,
    nodes: tuple[str, ...],
) -> None:
    """How each node can be reached: schemes, addresses, hardware; and which way is taken to it from here.

    The node says what it tried when it started. The way is decided here as a client on this host decides it, for host
    memory, by what the node tells and what this host has.
    """
    answers = ask_nodes(settings, nodes, lambda node: node.transports())
    reports = {answer.node: answer.answer for answer in answers if answer.answer is not None}
    if start and start not in reports:
        raise click.UsageError(f"--from {start}: not among {', '.join(reports) or 'no node'}")
    memory = MemoryEnd(place=Place(numa_node=numa))
    if start:
        own, name = _side_of(reports[start]), start
    else:
        own, name = _this_side(with_ucx=ucx), HERE
    ways = [
        way_to(node, report, own=own, start=name, memory=memory, wanted=scheme)
        for node, report in reports.items()
        if node != start
    ]
    if settings.json:
        print_document(_document(reports, ways))
    else:
        _print(answers, ways)
    end_by(answers)


def _this_side(*, with_ucx: bool) -> OwnSide:
    facts = read_host()
    schemes = [scheme for scheme in SCHEMES if with_ucx or scheme != "ucx"]
    return OwnSide(identity=own_identity(), facts=facts, probes=probe_transports(schemes, facts))


def _side_of(report: TransportsReport) -> OwnSide:
    """A node's side, by what it told."""
    told = told_by(report)
    return OwnSide(
        identity=told.identity if told is not None else HostIdentity(),
        facts=report.host,
        probes={listed.probe.scheme: listed.probe for listed in report.transports},
    )


def told_by(report: TransportsReport) -> Advertisement | None:
    """What a node tells its peers; None where it tells nothing, or nothing that this release reads."""
    try:
        return Advertisement.from_bytes(report.advertisement)
    except BadDescriptor:
        return None


def way_to(
    node: str,
    report: TransportsReport,
    *,
    own: OwnSide,
    start: str,
    memory: MemoryEnd,
    wanted: str,
) -> Way:
    """Which transport is taken to a node, or why none is."""
    peer = told_by(report)
    meeting = Encounter(
        own=own,
        peer=peer,
        local=memory,
        has_local_door=start == HERE and opens_here(report.door),
    )
    try:
        return Way(start=start, node=node, choice=choose(meeting, wanted))
    except TransportUnavailable as error:
        return Way(start=start, node=node, error=str(error))


def opens_here(door: str) -> bool:
    """Whether a local door's socket can be used by who asks."""
    path = door.removeprefix("unix:")
    if path == door:
        return False
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode) and os.access(path, os.W_OK)
    except (OSError, ValueError):
        return False


def _document(reports: dict[str, TransportsReport], ways: list[Way]) -> list[dict[str, object]]:
    by_node = {way.node: way for way in ways}
    return [
        {
            "node": node,
            "transports": [
                {
                    **_probe_document(listed.probe),
                    "open": listed.is_open,
                    "bound": listed.bound,
                    "advertised": listed.advertised,
                    "counters": dict(listed.counters),
                }
                for listed in report.transports
            ],
            "door": report.door,
            "host": report.host,
            "advertisement": told_by(report),
            "way": by_node.get(node),
        }
        for node, report in reports.items()
    ]


def _probe_document(probe: TransportProbe) -> dict[str, object]:
    """A probe with its facts by name."""
    return {
        "scheme": probe.scheme,
        "available": probe.available,
        "reason": probe.reason,
        "remedy": probe.remedy,
        "kinds": probe.kinds,
        "facts": dict(probe.facts),
    }


def _print(answers: list[NodeAnswer[TransportsReport]], ways: list[Way]) -> None:
    schemes = table(
        "node", "scheme", "works", "bound", "advertised", "#connections", "#moved", "#refused", "why",
        title="transports",
    )  # fmt: skip
    hosts = table("node", "what", "where", "speed", "which", title="hosts")
    for answer in answers:
        if answer.answer is not None:
            _add_schemes(schemes, answer.node, answer.answer)
            _add_host(hosts, answer.node, answer.answer.host)
    shown = table("from", "to", "scheme", "path", "why", title="ways")
    for way in ways:
        _add_way(shown, way)
    print_table(schemes, hosts, *([shown] if ways else []))


def _add_schemes(rows: Table, node: str, report: TransportsReport) -> None:
    for listed in report.transports:
        probe, counters = listed.probe, dict(listed.counters)
        moved = sum(counters.get(name, 0) for name in MOVED)
        refused = sum(number for name, number in counters.items() if name.startswith("refused "))
        works = "open" if listed.is_open else "yes" if probe.available else "no"
        facts = "; ".join(f"{name}: {value}" for name, value in probe.facts)
        why = f"{probe.reason}. {probe.remedy}" if probe.remedy else probe.reason
        rows.add_row(
            node,
            probe.scheme,
            works,
            ", ".join(listed.bound) or "-",
            ", ".join(listed.advertised) or "-",
            str(counters.get("num_connections", 0)) if counters else "-",
            nbytes_text(moved) if counters else "-",
            str(refused) if counters else "-",
            f"{why} ({facts})" if facts else why,
        )


def _add_host(rows: Table, node: str, host: HostFacts) -> None:
    for numa in host.numa_nodes:
        far = " ".join(str(distance) for distance in numa.distances)
        rows.add_row(
            node, f"NUMA node {numa.index}", f"cores {numa.cpus}", "",
            f"{nbytes_text(numa.memory_nbytes)}, distances {far}",
        )  # fmt: skip
    for nic in host.nics:
        if nic.is_up and not nic.is_loopback:
            addresses = ", ".join(address.host for address in nic.addresses)
            rows.add_row(node, f"NIC {nic.name}", _where(nic), _speed(nic), addresses)
    for device in host.rdma_devices:
        rows.add_row(
            node,
            f"RDMA {device.name}:{device.port}",
            _place_text(device.place),
            f"{8 * device.speed_bytes_per_s / 1e9:g} Gbit/s",
            f"{device.link_layer}, {'active' if device.is_active else 'down'}, "
            f"{', '.join(device.nics)}",
        )
    near = distances(host)
    for gpu in host.gpus:
        others = [
            f"{other} {far.level.name.lower()}" for one, other, far in near if one == gpu.address
        ]
        rows.add_row(
            node, f"GPU {gpu.address}", _place_text(gpu.place), "", ", ".join(others) or gpu.vendor
        )
    pages = host.huge_pages
    mounts = ", ".join(path for path, _ in pages.mounts) or "no mount"
    rows.add_row(
        node, "huge pages", "", "", f"memfds {pages.shmem or '?'}, {mounts}, "
        f"{sum(size * count for size, count, _ in pages.reserved) >> 20} MiB reserved",
    )  # fmt: skip


def _place_text(place: Place) -> str:
    node = "NUMA ?" if place.numa_node is None else f"NUMA {place.numa_node}"
    return f"{node}, {place.pci_path[-1]}" if place.pci_path else node


def _where(nic: Nic) -> str:
    return " + ".join(_place_text(place) for place in nic.places) or "virtual"


def _speed(nic: Nic) -> str:
    return f"{8 * nic.speed_bytes_per_s / 1e9:g} Gbit/s" if nic.speed_bytes_per_s else "?"


def _add_way(rows: Table, way: Way) -> None:
    if way.choice is None:
        rows.add_row(way.start, way.node, "none", "-", way.error)
        return
    choice = way.choice
    preferred = [path.name for path in choice.paths if path.is_preferred] or list(choice.devices)
    spare = sum(not path.is_preferred for path in choice.paths)
    path = ", ".join(preferred) + (f" +{spare}" if spare else "")
    scheme = f"{choice.scheme} ({choice.via})" if choice.via else choice.scheme
    rows.add_row(way.start, way.node, scheme, path or "-", choice.reason)
    for other in choice.not_taken:
        rows.add_row("", "", f"not {other.scheme}", "", other.reason)
