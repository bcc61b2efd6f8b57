"""An engine that computes nothing, and `snowskin up` with such engines: for tests of processes, not of tokens.

    python -m tests.support.engine_toy up --model DIR ...

Rules kept here: supervisor, node and conductor are the real ones; a toy is a real role too (settings, ready line,
signals, registration), that takes half a second to start because it imports no torch.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from snowskin.engines.cancellation import Background
from snowskin.engines.registration import Registration
from snowskin.kvstore.role import announce_ready
from snowskin.tools.cluster import up as up_module
from snowskin.tools.cluster.local import LocalCluster
from snowskin.tools.cluster.roles import decode_settings, prefill_settings, role_command
from snowskin.v1 import conductor_pb2
from tests.support.clusters import load

if TYPE_CHECKING:
    from snowskin.engines.daemon import EngineSettings
    from snowskin.engines.messages import InstanceLoad
    from snowskin.kvstore.role import Stop

ROOT = Path(__file__).resolve().parents[2]


class Idle:
    """An instance that has nothing to do."""

    draining = False

    def load(self) -> InstanceLoad:
        return load()


async def serve_toy(settings: EngineSettings, stop: Stop) -> None:
    facts = conductor_pb2.RegisterRequest(
        instance_id=settings.instance_id,
        instance_epoch=os.getpid(),
        role=settings.role,
        address=f"{settings.instance_id}:1",  # nobody connects
        node_address=settings.node_address,
        namespaces=[bytes(32)],
        layout_json="{}",
        block_size=settings.block_size,
        block_nbytes=1,
        model_name=os.path.basename(settings.model),
        max_context_tokens=1,
    )
    registration = Registration(settings.conductor, facts, Idle())
    announce_ready(settings, role=settings.role, id=settings.instance_id, address=facts.address)
    async with Background() as tasks:
        tasks.start(registration.run(), "registration")
        await tasks.until(stop.wait())


@click.group()
def main() -> None:
    """Engines that compute nothing."""


main.add_command(role_command("prefill", prefill_settings(), serve_toy, help="Prefill."))
main.add_command(role_command("decode", decode_settings(), serve_toy, help="Decode."))
main.add_command(up_module.up)

if __name__ == "__main__":
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    toys = functools.partial(
        LocalCluster, engine_module="tests.support.engine_toy", environment={"PYTHONPATH": path}
    )
    vars(up_module)["LocalCluster"] = toys
    main()
