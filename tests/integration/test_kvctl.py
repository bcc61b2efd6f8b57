"""kvctl as a process against a scripted Admin service."""

from __future__ import annotations

import asyncio
import json
import os
import struct
import sys

import pytest
from click.testing import CliRunner

from snowskin.kvstore.errors import BadRequest, NodeUnavailable
from snowskin.kvstore.rpc import serving
from snowskin.tools.kvctl.main import cli
from snowskin.v1 import admin_pb2, admin_pb2_grpc, common_pb2, engine_pb2, store_pb2

POOL = store_pb2.PoolStat(
    pool_id=0,
    tier=common_pb2.TIER_DRAM,
    tenant="default",
    capacity_nbytes=1 << 30,
    free_nbytes=1 << 29,
    committed_nbytes=1 << 29,
    largest_hole_nbytes=1 << 28,
)


KNOWN = admin_pb2.NodeKnowledge(
    address="127.0.0.1:8",
    state="in sync",
    num_blocks=98765,
    seconds_since_message=1.25,
    sequence=11,
    node_epoch=5,
)


class ScriptedAdmin(admin_pb2_grpc.AdminServicer):
    """One engine, one node that answers, one that does not; remembers the prompts it was asked for."""

    def __init__(self):
        self.prompts = []
        self.address = ""
        self.make_error = None

    async def ClusterStatus(self, request, context):  # noqa: N802  the wire's name
        if self.make_error:
            raise self.make_error()
        load = engine_pb2.InstanceLoad(
            num_running=2, num_waiting_tokens=1234, num_kv_blocks=900, prefill_tokens_per_s=1500.4
        )
        instance = admin_pb2.InstanceStatus(
            instance_id="prefill-0", role="prefill", state="ready", load=load, block_size=16,
            address="127.0.0.1:9", node_address="127.0.0.1:8", seconds_since_report=0.25,
        )  # fmt: skip
        return admin_pb2.ClusterStatusResponse(
            instances=[instance], model_name="tiny", num_requests_finished=7, nodes=[KNOWN]
        )

    async def Nodes(self, request, context):  # noqa: N802
        stat = store_pb2.StatResponse(
            node_id="node-0", node_epoch=5, pools=[POOL], num_blocks=99, counters={"evicted": 3}
        )
        return admin_pb2.NodesResponse(
            nodes=[
                admin_pb2.NodeStatus(address="127.0.0.1:8", stat=stat, knowledge=KNOWN),
                admin_pb2.NodeStatus(
                    address="127.0.0.1:7",
                    error="no answer in 1 s",
                    knowledge=admin_pb2.NodeKnowledge(address="127.0.0.1:7", state="unknown"),
                ),
            ]
        )

    async def MatchPrompt(self, request, context):  # noqa: N802
        kind = request.WhichOneof("prompt")
        value = getattr(request, kind)
        if kind == "token_ids":
            value = list(struct.unpack(f"<{len(value) // 4}I", value))
        self.prompts.append(value)
        node = admin_pb2.NodeMatch(address="127.0.0.1:8", num_blocks=0, num_blocks_present=4)
        return admin_pb2.MatchPromptResponse(
            num_tokens=100, num_blocks=6, block_size=16, nodes=[node]
        )


@pytest.fixture
async def admin():
    servicer = ScriptedAdmin()
    async with serving(
        [(admin_pb2_grpc.add_AdminServicer_to_server, servicer)],
        host="127.0.0.1",
        port=0,
        service_names=["snowskin.v1.Admin"],
        role="conductor",
    ) as server:
        servicer.address = server.address
        yield servicer


async def kvctl(*arguments: str, conductor: str = "") -> tuple[int, str, str]:
    """Exit status, stdout, stderr of a kvctl process."""
    environment = {**os.environ, "SNOWSKIN_CONDUCTOR": conductor} if conductor else None
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "snowskin.tools.kvctl.main", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=environment,
    )  # fmt: skip
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_status_shows_instances_and_requests_to_people_and_to_programs(admin):
    status, out, err = await kvctl("--conductor", admin.address, "status")
    assert (status, err) == (0, "")
    assert "1,500 tokens/s" in out
    assert "…" not in out, "nothing is cut, whatever the width of stdout"
    row = next(line.split() for line in out.splitlines() if "127.0.0.1:9" in line)
    assert row[:3] == ["prefill-0", "prefill", "ready"]
    (known,) = [line for line in out.splitlines() if "98,765" in line]
    assert "in sync" in known
    assert "1.2 s ago" in known
    status, out, err = await kvctl("--json", "status", conductor=admin.address)
    answer = json.loads(out)
    assert (status, err) == (0, "")
    assert answer["num_requests_finished"] == 7
    assert answer["instances"][0]["num_waiting_tokens"] == 1234
    assert answer["instances"][0]["prefill_tokens_per_s"] == 1500.4


async def test_nodes_lists_also_the_node_that_does_not_answer(admin):
    status, out, _ = await kvctl("nodes", conductor=admin.address)
    assert status == 0
    assert "512.0 MiB" in out
    assert "no answer in 1 s" in out
    status, out, _ = await kvctl("nodes", "--json", conductor=admin.address)
    first, second = json.loads(out)
    assert status == 0
    assert first["stat"]["pools"][0]["tier"] == "dram"
    assert first["stat"]["counters"] == {"evicted": 3}
    assert first["knowledge"]["num_blocks"] == 98765
    assert (second["stat"], second["error"]) == (None, "no answer in 1 s")
    assert second["knowledge"]["state"] == "unknown"
    assert second["knowledge"]["seconds_since_message"] is None


async def test_match_takes_a_text_a_file_or_tokens_and_no_hit_is_no_failure(admin, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("from a file")
    answers = [
        await kvctl("match", *source, conductor=admin.address)
        for source in (("--text", "héllo"), ("--file", str(path)), ("--tokens", "1,2 3"))
    ]
    assert [status for status, _, _ in answers] == [0, 0, 0]
    assert "100 tokens, 6 full blocks of 16" in answers[0][1]
    assert admin.prompts == ["héllo", "from a file", [1, 2, 3]]
    _, out, _ = await kvctl("match", "--text", "x", "--json", conductor=admin.address)
    assert json.loads(out)["nodes"][0]["num_blocks_present"] == 4


async def test_an_error_of_the_conductor_is_one_line_with_its_hint(admin):
    admin.make_error = lambda: BadRequest("the question was 7", hint="ask for 6")
    status, out, err = await kvctl("status", conductor=admin.address)
    assert (status, out) == (1, "")
    assert err == "kvctl: the question was 7. ask for 6\n"
    admin.make_error = lambda: NodeUnavailable("down")
    assert (await kvctl("status", conductor=admin.address))[0] == 1


async def test_an_unreachable_conductor_is_exit_status_1_and_one_line():
    status, out, err = await kvctl("--conductor", "127.0.0.1:1", "--timeout-s", "2", "status")
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert "127.0.0.1:1 cannot be reached" in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["match"], "one of --text, --file and --tokens"),
        (["match", "--text", "a", "--tokens", "1"], "one of --text, --file and --tokens"),
        (["match", "--text", ""], "empty"),
        (["match", "--tokens", "1 x"], "--tokens"),
        (["match", "--tokens", "-1"], "-1 is not a token id"),
        (["match", "--file", "does/not/exist"], "does not exist"),
        (["--conductor", "nowhere", "status"], "is not host:port"),
        (["--timeout-s", "0", "status"], "seconds > 0"),
        (["statuss"], "No such command"),
    ],
)
def test_wrong_usage_is_exit_status_2_and_says_why(arguments, expected):
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert expected in result.output
