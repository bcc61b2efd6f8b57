"""Engines that are lost, full or wrong, and clients that go away: exact text, or a clear error."""

from __future__ import annotations

import asyncio

import pytest

from snowskin.engines.conductor.errors import ConductorDraining
from snowskin.engines.conductor.job import Job, Sampling
from tests.support.conductors import conducting, events_of, make_tiny_model
from tests.support.engine_bench import until
from tests.support.fake_engines import FakeEngine, continuation, serving_engine, tokens_of

PROMPT = "hello"
NUM_TOKENS = 40
TOKENS = continuation(PROMPT.encode(), NUM_TOKENS)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-model")


def cluster_of(model, *, prefill=((), ()), decode=((), ()), **settings):
    engines = [FakeEngine(f"prefill-{at}", script) for at, script in enumerate(prefill)]
    engines += [FakeEngine(f"decode-{at}", script) for at, script in enumerate(decode)]
    return conducting(model, engines, **settings)


async def answered(cluster, **fields):
    """Token ids of a streamed answer, each event's as it came."""
    response = await cluster.complete(
        PROMPT, max_tokens=NUM_TOKENS, stream=True, return_token_ids=True, **fields
    )
    assert response.status_code == 200, response.text
    *chunks, done = events_of(response.text)
    assert done == "[DONE]", chunks[-1]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    return [token for each in chunks for token in each["choices"][0].get("token_ids", [])]


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        ((["lost"], []), ([], [])),
        (([], []), (["lost"], [])),
        ((["lost"], ["lost"]), ([], [])),
        ((["full"], []), (["full"], [])),
        (([], []), (["lost after 0"], [])),
        (([], []), (["lost after 7"], [])),
        (([], []), (["lost after 20"], ["lost after 11"])),
        (([], []), (["cut after 38"], [])),
        (([], []), (["no end"], [])),
        ((["ok", "lost"], []), (["lost after 5"], [])),
    ],
)
async def test_a_lost_engine_changes_no_token(model, prefill, decode):
    async with cluster_of(model, prefill=prefill, decode=decode, instance_wait_s=10.0) as cluster:
        reporting = asyncio.create_task(report_all(cluster))
        try:
            assert await answered(cluster) == TOKENS
        finally:
            reporting.cancel()
            await asyncio.gather(reporting, return_exceptions=True)
        assert cluster.served.conductor.state.counts().num_finished == 1


async def report_all(cluster):
    """Heartbeats: what failed a call is ready again with its next report."""
    while True:
        for instance_id in cluster.engines:
            await cluster.registrar.report(instance_id)
        await asyncio.sleep(0.02)


async def test_a_replay_counts_tokens_once_and_has_an_id_of_its_own(model):
    async with cluster_of(model, decode=(["lost after 7"], [])) as cluster:
        response = await cluster.complete(
            PROMPT,
            max_tokens=NUM_TOKENS,
            headers={"x-request-id": "mine", "x-snowskin-stats": "1"},
        )
        body = response.json()
        assert body["usage"]["prompt_tokens"] == len(PROMPT)
        assert body["usage"]["completion_tokens"] == NUM_TOKENS
        assert body["snowskin"]["num_decode_retries"] == 1
        prefills = [each for at in (0, 1) for each in cluster[f"prefill-{at}"].prefills]
        first_id = prefills[0].request_id
        assert first_id.startswith("mine.")
        assert [each.request_id for each in prefills] == [first_id, f"{first_id}.r1"]
        assert tokens_of(prefills[1].prompt) == [*PROMPT.encode(), *TOKENS[:8]]
        assert prefills[1].sampling.max_tokens == NUM_TOKENS - 8
        assert cluster["decode-1"].starts[0].request_id == f"{first_id}.r1"


async def test_a_lost_prefill_is_retried_under_the_id_that_decode_waits_for(model):
    async with cluster_of(model, prefill=(["lost"], [])) as cluster:
        assert await answered(cluster, headers={"x-request-id": "mine"}) == TOKENS
        ids = [each.request_id for at in (0, 1) for each in cluster[f"prefill-{at}"].prefills]
        assert len(ids) == 2
        assert len(set(ids)) == 1
        assert [each.request_id for each in cluster["decode-0"].starts] == ids[:1]


async def test_retries_end_and_the_error_says_what_happened(model):
    async with cluster_of(
        model, prefill=(["lost"] * 9,), decode=([],), instance_wait_s=10.0
    ) as cluster:
        reporting = asyncio.create_task(report_all(cluster))
        try:
            response = await cluster.complete(PROMPT)
        finally:
            reporting.cancel()
            await asyncio.gather(reporting, return_exceptions=True)
        assert response.status_code == 503
        assert "the fake is lost" in response.json()["error"]["message"]
        assert len(cluster["prefill-0"].prefills) == 3
        assert cluster.served.conductor.state.counts().num_failed == 1
        scraped = (await cluster.http.get("/metrics")).text
        assert 'snowskin_conductor_retries_total{stage="prefill"} 2.0' in scraped


async def test_an_answer_whose_last_word_alone_was_lost_is_whole_and_no_retry(model):
    async with cluster_of(model, decode=(["no end"],), max_retries=0) as cluster:
        assert await answered(cluster) == TOKENS
        scraped = (await cluster.http.get("/metrics")).text
        assert 'snowskin_conductor_retries_total{stage="decode"} 0.0' in scraped


async def test_an_engine_that_is_not_there_any_more_is_a_clear_error(model):
    async with conducting(model, [FakeEngine("decode-0")]) as cluster:
        async with serving_engine(FakeEngine("prefill-0")) as gone:
            await cluster.registrar.register(gone)
        response = await cluster.complete(PROMPT)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "no_instance_ready"
        async with serving_engine(FakeEngine("prefill-0")) as back:
            await cluster.registrar.register(back, instance_epoch=2)
            response = await cluster.complete(PROMPT, max_tokens=NUM_TOKENS)
        assert response.json()["choices"][0]["text"] == bytes(TOKENS).decode()


async def test_an_engine_that_is_stopped_in_the_middle_of_a_call_is_lost(model):
    spare = FakeEngine("decode-0")
    async with conducting(model, [FakeEngine("prefill-0")], instance_wait_s=10.0) as cluster:
        stopped = FakeEngine("decode-0", ["hang after 3"])
        async with serving_engine(stopped):
            await cluster.registrar.register(stopped)
            asking = asyncio.create_task(answered(cluster))
            await stopped.busy.wait()
        async with serving_engine(spare):
            await cluster.registrar.register(spare, instance_epoch=2)
            assert await asking == TOKENS


async def test_what_an_engine_refuses_is_not_tried_elsewhere(model):
    async with cluster_of(model, prefill=(["refuse"], [])) as cluster:
        response = await cluster.complete(PROMPT)
        assert response.status_code == 400
        assert "the fake refuses" in response.json()["error"]["message"]
        assert cluster["prefill-1"].prefills == []


async def test_a_bug_in_an_engine_is_a_500(model, caplog):
    # After its hand-off: a write that met the crash would hide it, and the request go on elsewhere.
    async with cluster_of(model, decode=(["crash after 3"], [])) as cluster:
        response = await cluster.complete(PROMPT)
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
    caplog.clear()  # the record's traceback holds frames, and they hold sockets


async def test_when_all_are_full_the_user_is_told_when_to_come_back(model):
    async with cluster_of(model, prefill=(["full"], ["full"])) as cluster:
        response = await cluster.complete(PROMPT)
        assert response.status_code == 429
        assert response.headers["retry-after"] == "3"


async def test_an_error_after_the_first_token_ends_the_stream_without_done(model):
    async with cluster_of(model, decode=(["refuse after 3"],), prefill=([],)) as cluster:
        response = await cluster.complete(PROMPT, max_tokens=9, stream=True, return_token_ids=True)
        assert response.status_code == 200
        *chunks, last = events_of(response.text)
        assert "the fake refuses" in last["error"]["message"]
        assert [each["choices"][0]["token_ids"] for each in chunks] == [[t] for t in TOKENS[:4]]


async def test_a_request_that_takes_too_long_is_a_504(model):
    async with cluster_of(model, prefill=(["hang"],), request_timeout_s=0.2) as cluster:
        response = await cluster.complete(PROMPT)
        assert response.status_code == 504


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prefill", "decode"), [(["hang"], []), ([], ["hang"]), ([], ["hang after 3"])]
)
async def test_a_client_that_goes_away_cancels_both_calls(model, prefill, decode, stream):
    async with cluster_of(model, prefill=(prefill,), decode=(decode,)) as cluster:
        asking = asyncio.create_task(cluster.complete(PROMPT, max_tokens=NUM_TOKENS, stream=stream))
        await asyncio.gather(cluster["prefill-0"].busy.wait(), cluster["decode-0"].busy.wait())
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        async with asyncio.timeout(5):
            await cluster.served.conductor.pipeline.drain(5.0)
            await asyncio.gather(*(engine.idle.wait() for engine in cluster.engines.values()))
        counts = cluster.served.conductor.state.counts()
        assert (counts.num_cancelled, counts.num_running) == (1, 0)
        view = cluster.served.conductor.scheduler.view()
        assert all(each.num_placed_requests == 0 for each in view.instances)


async def test_a_draining_conductor_finishes_what_runs_and_takes_no_more(model):
    engines = [FakeEngine("prefill-0"), FakeEngine("decode-0")]
    engines[1].step_s = 0.005
    async with conducting(model, engines, drain_s=10.0) as cluster:
        asking = asyncio.create_task(answered(cluster))
        await engines[1].busy.wait()
        draining = asyncio.create_task(cluster.served.conductor.pipeline.drain(10.0))
        await asyncio.sleep(0)
        late = await cluster.complete(PROMPT)
        assert late.status_code == 503
        assert late.json()["error"]["code"] == "conductor_draining"
        assert await asking == TOKENS
        await draining


async def test_what_a_draining_conductor_cannot_finish_ends_with_its_reason(model):
    async with cluster_of(model, decode=(["hang after 3"] * 2,), prefill=([],)) as cluster:
        asking = [
            asyncio.create_task(
                cluster.complete(PROMPT, max_tokens=9, stream=stream, return_token_ids=True)
            )
            for stream in (True, False)
        ]
        await cluster["decode-0"].busy.wait()
        await until(lambda: cluster.served.conductor.state.num_running == 2)
        async with asyncio.timeout(5):
            await cluster.served.conductor.pipeline.drain(0.1)
            streamed, whole = await asyncio.gather(*asking)
        *_chunks, last = events_of(streamed.text)
        assert last["error"]["code"] == "conductor_draining"
        assert whole.status_code == 503
        assert whole.json()["error"]["code"] == "conductor_draining"
        counts = cluster.served.conductor.state.counts()
        assert (counts.num_failed, counts.num_running) == (2, 0)


async def test_a_request_that_is_cut_before_its_work_began_says_so_too(model):
    async with cluster_of(model) as cluster:
        pipeline = cluster.served.conductor.pipeline
        job = Job(request_id="r", token_ids=[1, 2], sampling=Sampling())
        async with pipeline.run(job) as run:
            run.cut(ConductorDraining("gone"))
            with pytest.raises(ConductorDraining, match="gone"):
                await anext(run)


async def test_many_requests_at_once_are_all_exact_and_spread(model):
    async with cluster_of(model) as cluster:
        prompts = [f"prompt number {at}" for at in range(24)]
        answers = await asyncio.gather(*(cluster.complete(each, max_tokens=12) for each in prompts))
        for prompt, answer in zip(prompts, answers, strict=True):
            wanted = bytes(continuation(prompt.encode(), 12)).decode()
            assert answer.json()["choices"][0]["text"] == wanted
        for name, engine in cluster.engines.items():
            assert 6 <= len(engine.prefills) + len(engine.starts) <= 18, name
