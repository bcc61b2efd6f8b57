"""An operator sees what happens: metrics that are documented and true, one tree of spans, a story in the logs.

One cluster, two requests (the second finds the first one's prompt cached), and then every role is asked. What the
numbers should be is computed here, from lengths, and from what the answers say.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections import defaultdict
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from snowskin.tools.cluster.local import LocalCluster
from snowskin.tools.cluster.ports import pick_port
from snowskin.tools.cluster.up_settings import UpSettings
from tests.support.completions import Answer, answer_of
from tests.support.e2e_cluster import BLOCK_SIZE, CHUNK_TOKENS, HOST, ROOT
from tests.support.sensitive_model import block_nbytes, words

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="session")]

SEED = 60_706
ROLES = {"node-0": "Node", "conductor": "Conductor", "prefill-0": "Prefill", "decode-0": "Decode"}
DOCS = ROOT / "docs" / "metrics.md"
ROW = re.compile(r"\| `(\w+)` \| (\w+) \| ((?:`\w+`(?:, )?)*) \|")
FIRST, SECOND, UNTRACED = "story-first", "story-second", "story-untraced"
NUM_TOKENS = 40
# A word that no code and no log would have by chance.
CANARY = "zyzzogeton"
CALLER = "00-" + "5e" * 16 + "-" + "7a" * 8 + "-01"
NOT_SAMPLED = CALLER[:-1] + "0"
SETTLE_S = 5.0
LOOK_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What came out of it: answers by request, families by role, spans, log lines by process."""

    answers: dict[str, Answer]
    families: dict[str, dict]
    spans: list[dict]
    logs: dict[str, list[dict]]
    log_text: str
    span_text: str

    def value(self, name: str, **labels: str) -> float:
        """One sample, of whatever role."""
        return next(
            float(sample.value)
            for families in self.families.values()
            for family in families.values()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def lines(self, process: str, request_id: str) -> list[str]:
        """Events of one request in one process, in order."""
        return [
            line["event"] for line in self.logs[process] if line.get("request_id") == request_id
        ]

    def trace(self, trace_id: str) -> list[dict]:
        """Spans of one trace."""
        return [span for span in self.spans if span["trace_id"] == trace_id]


@asynccontextmanager
async def traced_cluster(model: Path, folder: Path):
    """One of each role; all of them log and trace into `folder`."""
    settings = UpSettings(
        model=str(model),
        block_size=BLOCK_SIZE,
        chunk_tokens=CHUNK_TOKENS,
        dram_nbytes=64 << 20,
        kv_memory_nbytes=64 << 20,
        threads=1,
        http_port=0,
        conductor_port=pick_port(HOST),
        log_json=True,
    )
    environment = {"SNOWSKIN_TRACE_FILE": str(folder / "spans.jsonl")}
    async with LocalCluster(settings, environment=environment, log_dir=folder) as cluster:
        yield cluster


async def ask(http, prompt, request_id, traceparent):
    """One completion; greedy."""
    model = (await http.get("/v1/models")).json()["data"][0]["id"]
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    headers = {"x-request-id": request_id, "x-snowskin-stats": "1", "traceparent": traceparent}
    response = await http.post("/v1/completions", json=body, headers=headers)
    assert response.status_code == 200, response.text
    assert response.headers["x-request-id"] == request_id
    return answer_of(response.json())


async def scrape(http, cluster):
    """Families of every role, once no lease is out: releases travel without an answer."""
    async with asyncio.timeout(SETTLE_S):
        while True:
            found = {}
            for name, process in cluster.processes.items():
                response = await http.get(f"http://{process.facts.http_address}/metrics")
                assert response.status_code == 200, response.text
                assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
                families = text_string_to_metric_families(response.text)
                found[name] = {family.name: family for family in families}
            leases = found["node-0"]["snowskin_node_leases"].samples
            if not any(sample.value for sample in leases):
                return found
            await asyncio.sleep(LOOK_S)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def prompts():
    """The second begins with the first."""
    chance = random.Random(SEED)
    first = [*f"{CANARY} ".encode(), *words(chance, 150 - len(CANARY) - 1)]
    return {
        FIRST: first,
        SECOND: [*first, *words(chance, 60)],
        UNTRACED: words(chance, 50),
    }


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def seen(sensitive_model, prompts, tmp_path_factory):
    """Asked, scraped, stopped; then read."""
    folder = tmp_path_factory.mktemp("seen")
    answers = {}
    async with (
        traced_cluster(sensitive_model, folder) as cluster,
        httpx.AsyncClient(
            base_url=f"http://{cluster.http_address}", trust_env=False, timeout=30.0
        ) as http,
    ):
        for request_id, traceparent in [(FIRST, CALLER), (SECOND, ""), (UNTRACED, NOT_SAMPLED)]:
            answers[request_id] = await ask(http, prompts[request_id], request_id, traceparent)
        families = await scrape(http, cluster)
    texts = {name: (folder / f"{name}.log").read_text() for name in ROLES}
    span_text = (folder / "spans.jsonl").read_text()
    return Seen(
        answers=answers,
        families=families,
        spans=[json.loads(line) for line in span_text.splitlines()],
        logs={
            name: [json.loads(line) for line in text.splitlines() if line.startswith("{")]
            for name, text in texts.items()
        },
        log_text="".join(texts.values()),
        span_text=span_text,
    )


# --- metrics


def documented() -> dict[str, dict[str, tuple[str, frozenset[str]]]]:
    """By the heading of its table: each metric's type and labels."""
    tables: dict[str, dict[str, tuple[str, frozenset[str]]]] = defaultdict(dict)
    heading = ""
    for line in DOCS.read_text().splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        if row := ROW.match(line):
            name, kind, labels = row.groups()
            assert name not in tables[heading], f"{name} is there twice"
            tables[heading][name] = (kind, frozenset(re.findall(r"\w+", labels)))
    return tables


@pytest.mark.parametrize("process", ROLES)
async def test_what_a_role_shows_is_what_is_documented(seen, process):
    tables = documented()
    expected = {**tables["Every role"], **tables[ROLES[process]]}
    shown = {
        f"{family.name}_total" if family.type == "counter" else family.name: family
        for family in seen.families[process].values()
    }
    assert set(shown) == set(expected), "docs/metrics.md and the role differ"
    for name, family in shown.items():
        kind, labels = expected[name]
        assert family.type == kind, name
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == labels, name


@pytest.mark.parametrize("process", ROLES)
async def test_names_say_their_role_and_unit(seen, process):
    for family in seen.families[process].values():
        if family.name.startswith("snowskin_") and family.name != "snowskin_build_info":
            assert family.name.startswith(f"snowskin_{ROLES[process].lower()}_"), family.name
            if family.type == "histogram":
                assert family.name.endswith("_seconds"), family.name


async def test_tokens_are_those_of_the_answers(seen, prompts):
    num_prompt = sum(len(prompt) for prompt in prompts.values())
    num_cached = sum(answer.num_cached_tokens for answer in seen.answers.values())
    num_generated = sum(len(answer.token_ids) for answer in seen.answers.values())
    assert num_cached == len(prompts[FIRST]) // BLOCK_SIZE * BLOCK_SIZE  # else nothing is shown
    assert num_generated == NUM_TOKENS * len(prompts)
    for role in ("conductor", "prefill"):
        assert seen.value(f"snowskin_{role}_prompt_tokens_total") == num_prompt
        assert seen.value(f"snowskin_{role}_tokens_cached_total") == num_cached
    assert seen.value("snowskin_conductor_tokens_generated_total") == num_generated
    # The first token of each answer is prefill's.
    assert seen.value("snowskin_decode_tokens_generated_total") == num_generated - len(prompts)
    assert seen.value("snowskin_prefill_tokens_computed_total") == num_prompt - num_cached
    assert seen.value("snowskin_decode_tokens_recomputed_total") == 0


async def test_requests_and_their_times_are_counted_once(seen, prompts):
    num_requests = len(prompts)
    assert seen.value("snowskin_conductor_requests_total", outcome="finished") == num_requests
    assert seen.value("snowskin_conductor_requests_running") == 0
    for name in ("ttft_seconds", "tpot_seconds"):
        assert seen.value(f"snowskin_conductor_{name}_count") == num_requests
    num_gaps = num_requests * (NUM_TOKENS - 1)
    assert seen.value("snowskin_conductor_tbt_seconds_count") == num_gaps
    e2e_s = seen.value("snowskin_conductor_request_seconds_sum", outcome="finished")
    ttft_s = seen.value("snowskin_conductor_ttft_seconds_sum")
    tbt_s = seen.value("snowskin_conductor_tbt_seconds_sum")
    assert 0 < ttft_s + tbt_s <= e2e_s
    told_s = sum(answer.stats["ttft_s"] for answer in seen.answers.values())
    assert ttft_s == pytest.approx(told_s, rel=0.1)
    assert seen.value("snowskin_prefill_step_seconds_sum") < e2e_s


async def test_bytes_and_blocks_agree_between_engines_and_node(seen):
    one = block_nbytes(BLOCK_SIZE)
    for role in ("prefill", "decode"):
        accounts = [getattr(answer, role) for answer in seen.answers.values()]
        for thing, field in [
            ("pull_bytes", "pulled_nbytes"),
            ("publish_bytes", "published_nbytes"),
        ]:
            told = sum(account[field] for account in accounts)
            assert seen.value(f"snowskin_{role}_{thing}_total") == told > 0
    pulled = sum(seen.value(f"snowskin_{role}_pull_bytes_total") for role in ("prefill", "decode"))
    assert seen.value("snowskin_node_blocks_matched_total") == pulled / one
    num_blocks = sum(
        seen.value(f"snowskin_{role}_publish_bytes_total") for role in ("prefill", "decode")
    )
    assert seen.value("snowskin_node_blocks_committed_total") == num_blocks / one
    # Tails are gone with their readers.
    num_kept = seen.value("snowskin_node_blocks")
    assert seen.value("snowskin_node_pool_committed_bytes") == num_kept * one
    sizes = ("free", "committed", "reserved", "quarantined")
    assert seen.value("snowskin_node_pool_capacity_bytes") == sum(
        seen.value(f"snowskin_node_pool_{size}_bytes") for size in sizes
    )


async def test_the_cluster_is_well_and_says_so(seen):
    for role in ("prefill", "decode"):
        assert seen.value("snowskin_conductor_instances", role=role, state="ready") == 1
        assert seen.value(f"snowskin_{role}_node_connected") == 1
        assert seen.value(f"snowskin_{role}_node_breaker", state="closed") == 1
        assert seen.value(f"snowskin_{role}_kv_blocks", state="held") == 0
    assert seen.value("snowskin_conductor_nodes", sync="in_sync") == 1
    assert seen.value("snowskin_node_watchers") == 1
    assert seen.value("snowskin_node_door_calls_total") > 10
    assert seen.value("snowskin_prefill_rpc_seconds_count", method="Engine/Prefill") == 3


# --- traces


async def test_a_trace_is_one_tree_over_all_roles(seen):
    (second,) = [
        span
        for span in seen.spans
        if span["name"] == "request" and span["facts"]["request_id"] == SECOND
    ]
    assert second["facts"]["num_cached_tokens"] == seen.answers[SECOND].num_cached_tokens
    for trace_id, root_parent in [(CALLER[3:35], CALLER[36:52]), (second["trace_id"], "")]:
        spans = seen.trace(trace_id)
        ids = {span["span_id"] for span in spans}
        assert len(ids) == len(spans)
        (root,) = [span for span in spans if span["parent_id"] not in ids]
        assert (root["role"], root["name"]) == ("conductor", "request")
        assert root["parent_id"] == root_parent
        assert {span["role"] for span in spans} == {"conductor", "prefill", "decode", "node"}
        assert not [span for span in spans if span["error"]]


async def test_a_request_is_followed_from_the_front_to_the_node(seen):
    spans = {span["span_id"]: span for span in seen.trace(CALLER[3:35])}

    def way(span):
        names = []
        while span is not None:
            names.append(f"{span['role']} {span['name']}")
            span = spans.get(span["parent_id"])
        return tuple(reversed(names))

    ways = {way(span) for span in spans.values()}
    prefill = ("conductor request", "conductor prefill", "prefill Engine/Prefill")
    decode = ("conductor request", "conductor decode", "decode Engine/Decode")
    assert ("conductor request", "conductor prepare") in ways
    assert ("conductor request", "conductor place") in ways
    for step in ("queue", "chunk"):
        assert (*prefill, f"prefill {step}") in ways
    for step in ("reserve", "commit"):
        on_node = (*prefill, "prefill publish", f"prefill store {step}", f"node node {step}")
        assert on_node in ways
    assert (*prefill, "prefill pull cached", "prefill store match", "node node match") in ways
    assert (*prefill, "prefill publish", "prefill copy out") in ways
    # Pulled before the hand-off, or, where decode came late, behind it.
    pulled = [way for way in ways if way[:3] == decode and "decode pull" in way]
    assert any(way[-3:-1] == ("decode pull", "decode store match") for way in pulled)
    assert any(way[-2:] == ("decode pull", "decode copy in") for way in pulled)
    for step in ("await hand-off", "generate"):
        assert (*decode, f"decode {step}") in ways


async def test_spans_lie_within_their_request_and_tell_its_work(seen, prompts):
    spans = seen.trace(CALLER[3:35])
    (root,) = [span for span in spans if span["name"] == "request"]
    for span in spans:
        assert span["began_at_s"] >= root["began_at_s"] - 0.001, span
        assert span["seconds"] >= 0, span
    chunks = [span for span in spans if span["name"] == "chunk"]
    assert sum(span["facts"]["num_tokens"] for span in chunks) == len(prompts[FIRST])
    (generate,) = [span for span in spans if span["name"] == "generate"]
    assert generate["facts"]["num_tokens"] == NUM_TOKENS
    copied = [span["facts"]["nbytes"] for span in spans if span["name"] == "copy in"]
    assert sum(copied) == seen.answers[FIRST].decode["pulled_nbytes"]


async def test_a_caller_that_does_not_sample_is_not_traced(seen):
    assert len({span["trace_id"] for span in seen.spans}) == 2
    assert UNTRACED not in seen.span_text


# --- logs


STORY = [
    ("conductor", ["placed", "placed", "handed off", "request ended"]),
    ("prefill-0", ["pulled", "published", "prompt computed"]),
    ("decode-0", ["hand-off received", "pulled", "answer finished"]),
]


@pytest.mark.parametrize("request_id", [FIRST, SECOND, UNTRACED])
async def test_the_story_of_a_request_is_found_by_its_id(seen, request_id):
    for process, events in STORY:
        assert seen.lines(process, request_id) == events, process


async def test_a_traced_requests_calls_are_in_the_nodes_log_too(seen):
    assert "call answered" in seen.lines("node-0", FIRST)
    assert seen.lines("node-0", UNTRACED) == []
    traced = [line for lines in seen.logs.values() for line in lines if "trace_id" in line]
    assert {line["trace_id"] for line in traced if line["request_id"] == FIRST} == {CALLER[3:35]}


async def test_a_line_tells_what_the_answer_told(seen):
    for request_id, answer in seen.answers.items():
        (ended,) = [
            line
            for line in seen.logs["conductor"]
            if line.get("request_id") == request_id and line["event"] == "request ended"
        ]
        assert ended["num_cached_tokens"] == answer.num_cached_tokens
        assert ended["num_generated_tokens"] == len(answer.token_ids)


async def test_nobody_writes_down_what_was_said(seen, prompts):
    assert all(answer.text for answer in seen.answers.values())
    written = (
        seen.log_text
        + seen.span_text
        + "".join(str(families) for families in seen.families.values())
    )
    assert CANARY not in written
    for request_id, prompt in prompts.items():
        for token_ids in (prompt, seen.answers[request_id].token_ids):
            some = list(token_ids[:8])
            for text in (json.dumps(some)[1:-1], " ".join(map(str, some)), bytes(some).hex()):
                assert text not in written, f"tokens of {request_id}"
        assert bytes(prompt[-24:]).decode() not in written
