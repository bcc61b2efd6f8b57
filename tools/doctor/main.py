"""`snowskin doctor`: every check in order, as text or JSON.

Rules kept here: nothing is changed on the host and no role is started; torch is looked at, not imported.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from snowskin.kvstore.config import Value, explain
from snowskin.kvstore.errors import BadSetting, InsecureAddress
from snowskin.tools.cluster.config_command import check_environment
from snowskin.tools.cluster.demo_inputs import model_directory
from snowskin.tools.cluster.tables import SETTINGS
from snowskin.tools.doctor import kernel, machine, software
from snowskin.tools.doctor.finding import Finding, Host, Verdict
from snowskin.tools.doctor.need import ROLES, Need, need_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NAME_WIDTH, VERDICT_WIDTH = 22, 7

EPILOG = f"""
ROLE is one of {", ".join(ROLES)}; without one it is `up`, a whole cluster on this host. Behind it
stand --config FILE and the role's own flags, as on its command line: what they ask for (memory,
ports, threads) is held against what is there.

\b
Each check ends as one of:
  ok       good
  warn     works, and could be better or faster
  fail     the role would not start, or not serve
  absent   optional, and not here

Exit status: 0 nothing failed, 1 something did, 2 usage.

\b
Examples:
  snowskin doctor
  snowskin doctor node --config snowskin.toml --dram-nbytes 64GiB
  snowskin doctor --json | jq '.findings[] | select(.verdict != "ok")'
"""


@click.command(epilog=EPILOG, context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[ROLE] [FLAGS]...")
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of text.")
def doctor(arguments: tuple[str, ...], as_json: bool) -> None:
    """Can this host run Snowskin: what is wrong, what it means, and what to do."""
    role, *flags = arguments if arguments and arguments[0] in ROLES else ("up", *arguments)
    found = examine(role, flags)
    failed = any(each.verdict is Verdict.FAIL for each in found)
    if as_json:
        document = {"role": role, "ok": not failed, "findings": [asdict(each) for each in found]}
        print(json.dumps(document, indent=2))
    else:
        print("\n".join(line for each in found for line in lines_of(each)))
    if failed:
        raise click.exceptions.Exit(1)


def examine(role: str, flags: Sequence[str], host: Host | None = None) -> list[Finding]:
    """All findings, in reading order.

    Raises:
        click.UsageError: an unknown flag or key, or a value of the wrong type.
    """
    host = host or Host()
    num_cores = len(os.sched_getaffinity(0))
    told = explain(SETTINGS[role](), table=role, arguments=flags)
    values = {each.name: each.value for each in told}
    need = need_of(role, values, num_cores=num_cores)
    info = time.get_clock_info("monotonic")
    gpu = machine.gpu(host)
    return [
        settings(role, values),
        kernel.system(host),
        software.python(),
        software.libraries(software.installed_versions()),
        software.checksums(software.checksum_bytes_per_s()),
        software.torch(software.torch_build(), has_gpu=gpu.verdict is not Verdict.ABSENT),
        *_memory_findings(host, need),
        machine.cores(host, num_cores=num_cores, num_threads=need.num_threads),
        machine.numa(host),
        kernel.clock_source(host),
        kernel.clock(
            kernel.read_clock(), resolution_s=info.resolution, is_adjustable=info.adjustable
        ),
        kernel.open_files(host),
        kernel.connection_backlog(host),
        kernel.socket_buffers(host),
        machine.ports(host, need.ports),
        machine.sockets_folder(),
        *_disk_findings(role, values),
        gpu,
        machine.rdma(host),
    ]


def _disk_findings(role: str, values: Mapping[str, Value]) -> list[Finding]:
    found = [
        machine.disk(
            machine.temporary_folder(),
            what="temporary files",
            meaning="logs and sockets of `snowskin up` lie here; KV blocks are never written to disk",
        )
    ]
    if role == "up" and not values.get("model"):
        meaning = "the random model is made here, 152 MB, where no --model is given"
        found.append(machine.disk(model_directory(), what="model", meaning=meaning))
    return found


def _memory_findings(host: Host, need: Need) -> list[Finding]:
    return [
        kernel.memfd(host),
        machine.memory(host, wanted_nbytes=need.nbytes, wanted_by=need.reason),
        kernel.overcommit(host, wanted_nbytes=need.nbytes),
        kernel.locked_memory(host, pool_nbytes=need.pool_nbytes),
        kernel.huge_pages(host),
        machine.shared_memory_folder(host),
    ]


def settings(role: str, values: Mapping[str, Value]) -> Finding:
    """Whether the role would accept its settings."""
    try:
        check_environment(os.environ)
        SETTINGS[role]()(**values)
    except (BadSetting, InsecureAddress) as error:
        return Finding(
            name="settings",
            verdict=Verdict.FAIL,
            found=error.message,
            meaning=f"snowskin {role} would refuse to start",
            action=error.hint or f"see snowskin config print {role}",
        )
    return Finding(
        name="settings",
        verdict=Verdict.OK,
        found=f"{role}: {len(values)} settings",
        meaning=f"they can work; snowskin config print {role} shows where each comes from",
    )


def lines_of(finding: Finding) -> list[str]:
    """A finding for a person: what it is, what it means, and what to do, if anything."""
    indent = " " * VERDICT_WIDTH
    lines = [
        f"{finding.verdict:<{VERDICT_WIDTH}}{finding.name:<{NAME_WIDTH}}{finding.found}",
        f"{indent}{'':<{NAME_WIDTH}}{finding.meaning}",
    ]
    if finding.action:
        lines.append(f"{indent}{'':<{NAME_WIDTH}}do: {finding.action}")
    return lines
