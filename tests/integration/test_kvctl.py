"""kvctl as a process against a scripted Admin service, and as commands against a whole node."""

from __future__ import annotations

import asyncio
import json
import os
import struct
import sys

import grpc
import pytest
from click.testing import CliRunner

from snowskin.kvstore.errors import BadRequest, BadSetting, NodeUnavailable
from snowskin.kvstore.rpc import serving
from snowskin.tools.kvctl.main import cli
from snowskin.tools.kvctl.node_choice import addresses_of
from snowskin.tools.kvctl.output import KvctlSettings
from snowskin.v1 import admin_pb2, admin_pb2_grpc, common_pb2, engine_pb2, store_pb2, store_pb2_grpc
from tests.support.node_process import NodeProcess
from tests.support.store_drivers import connected, keys_of, namespace_of, noise

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
        self.nodes = None

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
        if self.nodes is not None:
            return admin_pb2.NodesResponse(nodes=[_node_status(*node) for node in self.nodes])
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


def _node_status(address, node_id):
    if not node_id:
        return admin_pb2.NodeStatus(address=address, error="no answer")
    return admin_pb2.NodeStatus(address=address, stat=store_pb2.StatResponse(node_id=node_id))


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
        (["evict"], "give the keys of blocks, or --all"),
        (["evict", "--all", "ab" * 32], "give the keys of blocks, or --all"),
        (["evict", "abc"], "no even number of hex digits"),
        (["evict", "ab" * 8, "ab" * 32], "keys of several lengths"),
        (["blocks", "ls", "--namespace", "ab"], "64 to 64 hex digits, not 2"),
        (["blocks", "ls", "--limit", "0"], "x>=1"),
        (["leases", "revoke", "x"], "not a valid integer"),
    ],
)
def test_wrong_usage_is_exit_status_2_and_says_why(arguments, expected):
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert expected in result.output


# --- the commands that ask nodes themselves, against one node with five blocks of 1,000 bytes


NAMESPACE = namespace_of(1)
KEYS = keys_of(1, 5)
COLUMN = common_pb2.KeyColumn(packed=KEYS.packed, width=32)
HEX_KEYS = sorted(key.hex() for key in KEYS)


@pytest.fixture(scope="module")
def node_process():
    settings = {"dram_nbytes": 1 << 20, "log_level": "error", "drain_s": 0.1, "grace_s": 0.0}
    with NodeProcess(settings) as process:
        yield process


@pytest.fixture
def node(node_process):
    data = noise(1, 5 * 1000)
    with connected("blocking", node_process.door, client_name="filler") as client:
        client.publish(
            namespace=NAMESPACE,
            keys=KEYS,
            block_nbytes=1000,
            local=client.register(data),
            local_offsets=range(0, 5000, 1000),
        )
    return node_process.address


@pytest.fixture
def store(node):
    """The stubs of the node's Store."""
    with grpc.insecure_channel(node) as channel:
        yield store_pb2_grpc.StoreStub(channel)


def run(*arguments):
    """Exit status, stdout and stderr of a command; it must not need the conductor."""
    words = ["--conductor", "127.0.0.1:1", "--timeout-s", "10", *arguments]
    result = CliRunner().invoke(cli, words)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def answer(*arguments, node):
    """The JSON of a command that must succeed, of the only node that was asked."""
    status, out, err = run(*arguments, "--json", "--node", node)
    assert (status, err) == (0, "")
    (one,) = json.loads(out)
    assert one["node"] == node
    return one


def keys_listed(*filters, node):
    return [block["key"] for block in answer("blocks", "ls", *filters, node=node)["blocks"]]


def test_node_says_by_what_it_is_reached_and_a_client_beside_it_maps_its_memory(node):
    told = answer("transports", node=node)
    works = {row["scheme"]: row["open"] for row in told["transports"]}
    assert works == {"shm": True, "tcp": True, "grpc": False}
    assert told["way"]["choice"]["scheme"] == "shm"
    by_tcp = answer("transports", "--scheme", "tcp", node=node)["way"]["choice"]
    assert by_tcp["paths"][0]["remote_address"] == told["transports"][1]["advertised"][0]


def test_blocks_are_listed_by_page_and_filter(node, store):
    status, out, err = run("blocks", "ls", "--node", node)
    assert (status, err) == (0, "")
    assert out.count(NAMESPACE.hex()[:16]) == out.count("1000 B") == 5
    listed = answer("blocks", "ls", node=node)
    assert [block["key"] for block in listed["blocks"]] == HEX_KEYS
    assert not listed["more"]
    assert keys_listed("--limit", "2", node=node) == HEX_KEYS[:2]
    assert answer("blocks", "ls", "--limit", "2", node=node)["more"]
    assert "more: raise --limit" in run("blocks", "ls", "--limit", "2", "--node", node)[1]
    assert keys_listed("--key-prefix", HEX_KEYS[3][:12], node=node) == [HEX_KEYS[3]]
    assert not keys_listed("--namespace", "ab" * 32, node=node)
    assert not keys_listed("--leased", node=node)
    matched = store.Match(store_pb2.MatchRequest(namespaces=[NAMESPACE], keys=COLUMN))
    assert len(keys_listed("--leased", node=node)) == 5
    ref = common_pb2.LeaseRef(id=matched.lease.id, capability=matched.lease.capability)
    store.Release(store_pb2.ReleaseRequest(leases=[ref]))


def test_a_block_is_shown_by_as_many_digits_as_name_it(node):
    shown = answer("blocks", "show", HEX_KEYS[0][:16], node=node)["shown"]
    assert shown["block"]["key"] == HEX_KEYS[0]
    assert shown["block"]["namespace"] == NAMESPACE.hex()
    assert shown["block"]["extent"]["nbytes"] == 1000
    assert len(bytes.fromhex(shown["checksum"])) == 4
    status, out, _ = run("blocks", "show", HEX_KEYS[0], "--node", node)
    assert (status, HEX_KEYS[0] in out, NAMESPACE.hex() in out) == (0, True, True)
    status, _, err = run("blocks", "show", "ee" * 32, "--node", node)
    assert (status, "no node that was asked has block ee" in err) == (1, True)


def test_leases_are_listed_and_revoked(node, store):
    store.Match(store_pb2.MatchRequest(namespaces=[NAMESPACE], keys=COLUMN))
    new = common_pb2.KeyColumn(packed=keys_of(2, 3).packed, width=32)
    store.Reserve(store_pb2.ReserveRequest(namespace=NAMESPACE, keys=new, block_nbytes=1000))
    read, write = answer("leases", "ls", node=node)["leases"]
    assert (read["kind"], read["state"], read["num_blocks"]) == ("read", "active", 5)
    assert (write["kind"], write["nbytes"]) == ("write", 3000)
    only = answer("leases", "ls", "--kind", "write", node=node)
    assert [lease["id"] for lease in only["leases"]] == [write["id"]]
    assert not answer("leases", "ls", "--client", "nobody", node=node)["leases"]
    assert "active" in run("leases", "ls", "--node", node)[1]
    revoked = answer("leases", "revoke", str(read["id"]), node=node)["lease"]
    assert (revoked["id"], revoked["state"]) == (read["id"], "grace")
    assert "revoked" in run("leases", "revoke", str(write["id"]), "--node", node)[1]
    status, _, err = run("leases", "revoke", "12345", "--node", node)
    assert (status, "there is no lease 12345" in err, "kvctl leases ls" in err) == (1, True, True)


def test_an_eviction_is_shown_before_it_is_done(node):
    status, out, _ = run("evict", HEX_KEYS[0], "ff" * 32, "--node", node)
    assert (status, "would be evicted" in out, "add --yes" in out) == (0, True, True)
    assert len(keys_listed(node=node)) == 5
    one = answer("evict", HEX_KEYS[0], "ff" * 32, "--yes", node=node)
    evicted = one["evicted"]
    assert (one["dry_run"], evicted["num_blocks"], evicted["num_unknown"]) == (False, 1, 1)
    rest = answer("evict", "--all", "--yes", node=node)["evicted"]
    assert (rest["num_blocks"], rest["nbytes"]) == (4, 4000)
    assert not keys_listed(node=node)


async def test_nodes_are_found_through_the_conductor_and_by_their_ids(admin):
    admin.nodes = [("127.0.0.1:8", "node-a"), ("127.0.0.1:7", "")]
    settings = KvctlSettings(conductor=admin.address)
    assert await addresses_of(settings, ()) == ["127.0.0.1:8", "127.0.0.1:7"]
    assert await addresses_of(settings, ("node-a", "127.0.0.1:8")) == ["127.0.0.1:8"]
    with pytest.raises(BadSetting, match=r"no node 'node-x'.*known are node-a"):
        await addresses_of(settings, ("node-x",))
    admin.nodes = []
    with pytest.raises(BadSetting, match="knows no node"):
        await addresses_of(settings, ())


async def test_a_node_that_does_not_answer_is_a_line_of_trouble_beside_the_others(admin, node):
    admin.nodes = [(node, "node-a"), ("127.0.0.1:2", "")]
    status, out, err = await kvctl(
        "--timeout-s", "5", "--json", "blocks", "ls", conductor=admin.address
    )
    assert [one["node"] for one in json.loads(out)] == [node]
    assert (status, err.count("\n"), "127.0.0.1:2" in err) == (1, 1, True)
    status, _, err = await kvctl("leases", "revoke", "1", conductor=admin.address)
    assert (status, "say which with --node" in err) == (2, True)


def test_a_drained_node_grants_nothing_more(node, store):  # the last one: there is no way back
    status, out, _ = run("drain", node)
    assert (status, "draining" in out) == (0, True)
    assert store.Stat(store_pb2.StatRequest()).draining
    with pytest.raises(grpc.RpcError, match="is draining"):
        store.Match(store_pb2.MatchRequest(namespaces=[NAMESPACE], keys=COLUMN))
