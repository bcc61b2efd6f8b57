"""The OpenAI-compatible front over real sockets, with engines that do as they are told."""

from __future__ import annotations

import asyncio
import itertools
import threading

import pytest

from snowskin.engines.conductor import intake
from snowskin.engines.model.tokenizer import Tokenizer
from tests.support.conductors import conducting, events_of, make_tiny_model
from tests.support.fake_engines import FakeEngine, continuation, tokens_of


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-model")


def pair(prefill=(), decode=()):
    return [FakeEngine("prefill-0", prefill), FakeEngine("decode-0", decode)]


def text_of(prompt: str, num_tokens: int) -> str:
    return bytes(continuation(prompt.encode(), num_tokens)).decode()


# --- answers


async def test_a_completion_is_the_models_text_with_exact_usage(model):
    engines = pair()
    engines[0].num_cached_tokens = 3
    async with conducting(model, engines) as cluster:
        response = await cluster.complete("hello", max_tokens=20, return_token_ids=True)
        body = response.json()
        assert response.status_code == 200
        choice = body["choices"][0]
        assert choice["text"] == text_of("hello", 20)
        assert choice["token_ids"] == continuation(b"hello", 20)
        assert choice["finish_reason"] == "length"
        assert body["object"] == "text_completion"
        assert body["model"] == "tiny"
        assert body["usage"] == {
            "prompt_tokens": 5,
            "completion_tokens": 20,
            "total_tokens": 25,
            "prompt_tokens_details": {"cached_tokens": 3},
        }
        assert "snowskin" not in body
        assert body["id"] == f"cmpl-{response.headers['x-request-id']}"


async def test_token_ids_are_a_prompt_too(model):
    async with conducting(model, pair()) as cluster:
        response = await cluster.complete(list(b"hello"), max_tokens=4)
        assert response.json()["choices"][0]["text"] == text_of("hello", 4)


async def test_a_chat_goes_through_the_models_template(model):
    async with conducting(model, pair()) as cluster:
        messages = [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        ]
        response = await cluster.http.post(
            "/v1/chat/completions",
            json={"model": "tiny", "messages": messages, "max_completion_tokens": 6},
        )
        body = response.json()
        assert body["object"] == "chat.completion"
        asked = tokens_of(cluster["prefill-0"].prefills[0].prompt)
        assert asked[1:9] == list(b"be brief")
        answer = bytes(continuation(asked, 6)).decode()
        assert body["choices"][0]["message"] == {"role": "assistant", "content": answer}


async def test_a_stream_is_the_same_text_in_events(model):
    async with conducting(model, pair()) as cluster:
        response = await cluster.complete(
            "hello", max_tokens=9, stream=True, stream_options={"include_usage": True}
        )
        assert response.headers["content-type"].startswith("text/event-stream")
        *chunks, usage, done = events_of(response.text)
        assert done == "[DONE]"
        assert "".join(each["choices"][0]["text"] for each in chunks) == text_of("hello", 9)
        assert [each["choices"][0]["finish_reason"] for each in chunks] == [None] * 9 + ["length"]
        assert all(each["usage"] is None for each in chunks)
        assert usage["choices"] == []
        assert usage["usage"]["completion_tokens"] == 9


async def test_a_streamed_chat_begins_with_the_role(model):
    async with conducting(model, pair()) as cluster:
        response = await cluster.http.post(
            "/v1/chat/completions",
            json={
                "model": "tiny",
                "messages": [{"role": "user", "content": "hi"}],
                "max_tokens": 3,
                "stream": True,
                "return_token_ids": True,
            },
        )
        first, *chunks, last, done = events_of(response.text)
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert done == "[DONE]"
        assert last["choices"][0] | {"logprobs": None} == {
            "index": 0,
            "delta": {},
            "finish_reason": "length",
            "logprobs": None,
        }
        asked = tokens_of(cluster["prefill-0"].prefills[0].prompt)
        token_ids = [token for each in chunks for token in each["choices"][0]["token_ids"]]
        assert token_ids == continuation(asked, 3)


async def test_the_first_token_is_streamed_while_decode_has_not_answered(model):
    async with conducting(model, pair(decode=["hang after 0"])) as cluster:
        body = {"model": "tiny", "prompt": "hello", "max_tokens": 5, "stream": True}
        async with cluster.http.stream("POST", "/v1/completions", json=body) as response:
            line = await anext(response.aiter_lines())
            assert f'"text":"{text_of("hello", 1)}"' in line


async def test_a_stop_string_ends_the_answer_before_it_and_cancels_the_work(model):
    whole = text_of("hello", 64)
    stop = whole[10:13]
    assert whole.index(stop) == 10
    for stream in (False, True):
        engines = pair(decode=["hang after 40"])
        engines[1].burst = 40  # tokens behind the stop string have come, and are not counted
        async with conducting(model, engines) as cluster:
            response = await cluster.complete(
                "hello",
                max_tokens=64,
                stop=["~~", stop],
                stream=stream,
                return_token_ids=True,
                stream_options={"include_usage": True} if stream else None,
            )
            if stream:
                *chunks, last, usage, _done = events_of(response.text)
                text = "".join(each["choices"][0]["text"] for each in [*chunks, last])
                reason = last["choices"][0]["finish_reason"]
                num_tokens = usage["usage"]["completion_tokens"]
            else:
                body = response.json()
                text = body["choices"][0]["text"]
                reason = body["choices"][0]["finish_reason"]
                num_tokens = body["usage"]["completion_tokens"]
            assert (text, reason, num_tokens) == (whole[:10], "stop", 13)
            assert cluster.served.conductor.state.counts().num_finished == 1


async def test_the_end_token_has_no_text_and_is_counted(model):
    engines = pair()
    engines[1].end_after = 8
    async with conducting(model, engines) as cluster:
        body = (await cluster.complete("hello", max_tokens=20)).json()
        assert body["choices"][0]["finish_reason"] == "stop"
        assert body["choices"][0]["text"] == text_of("hello", 7)
        assert body["usage"]["completion_tokens"] == 8


async def test_stats_are_told_to_who_asks(model):
    async with conducting(model, pair()) as cluster:
        response = await cluster.complete(
            "hello", max_tokens=3, headers={"x-snowskin-stats": "1", "x-request-id": "mine"}
        )
        stats = response.json()["snowskin"]
        assert stats["request_id"] == response.headers["x-request-id"] == "mine"
        assert stats["prefill_instance_id"] == "prefill-0"
        assert stats["decode_instance_id"] == "decode-0"
        assert stats["prefill"]["num_prompt_tokens"] == 5
        assert stats["decode"]["num_generated_tokens"] == 2
        assert stats["ttft_s"] > 0


async def test_one_token_needs_no_decode(model):
    async with conducting(model, pair()) as cluster:
        response = await cluster.complete("hello", max_tokens=1)
        assert response.json()["choices"][0]["text"] == text_of("hello", 1)
        assert cluster["decode-0"].starts == []


async def test_sampling_reaches_the_engines_as_it_was_asked_for(model):
    async with conducting(model, pair()) as cluster:
        await cluster.complete(
            "hello", max_tokens=5, temperature=0.5, top_p=0.25, top_k=3, seed=-1, ignore_eos=True
        )
        sampling = cluster["prefill-0"].prefills[0].sampling
        assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.25, 3)
        assert sampling.seed == 2**64 - 1
        assert (sampling.max_tokens, list(sampling.stop_token_ids)) == (5, [])
        assert cluster["decode-0"].starts[0].sampling == sampling
        await cluster.complete("hello", max_tokens=5)
        assert list(cluster["prefill-0"].prefills[1].sampling.stop_token_ids) != []


async def test_without_the_cache_the_keys_are_this_requests_alone(model):
    async with conducting(model, pair()) as cluster:
        prompt = "x" * 40
        await cluster.complete(prompt, max_tokens=2)
        await cluster.complete(prompt, max_tokens=2)
        off = {"x-snowskin-cache": "off", "x-request-id": "same"}
        await cluster.complete(prompt, max_tokens=2, headers=off)
        await cluster.complete(prompt, max_tokens=2, headers=off)
        prompts = [each.prompt for each in cluster["prefill-0"].prefills]
        keys = [each.block_keys.packed for each in prompts]
        assert len(keys[0]) == 2 * 32
        assert keys[0] == keys[1]
        assert len(set(keys)) == 3
        assert [each.cache_policy for each in prompts] == [1, 1, 2, 2]


async def test_concurrent_requests_of_one_id_have_tails_of_their_own(model):
    async with conducting(model, pair()) as cluster:
        headers = {"x-request-id": "same"}
        answers = await asyncio.gather(
            *(cluster.complete("hello", max_tokens=5, headers=headers) for _ in range(4))
        )
        assert {each.json()["choices"][0]["text"] for each in answers} == {text_of("hello", 5)}
        assert {each.headers["x-request-id"] for each in answers} == {"same"}
        ids = [each.request_id for each in cluster["prefill-0"].prefills]
        assert len(set(ids)) == 4


async def test_requests_of_one_id_at_two_conductors_have_tails_of_their_own(model):
    headers = {"x-request-id": "same"}
    async with conducting(model, pair()) as one, conducting(model, pair()) as other:
        for cluster in (one, other, one):
            await cluster.complete("hello", max_tokens=5, headers=headers)
        ids = [each.request_id for at in (one, other) for each in at["prefill-0"].prefills]
    assert len(set(ids)) == 3


# --- refusals


@pytest.mark.parametrize(
    ("fields", "param", "code", "words"),
    [
        ({"n": 2}, "n", "unsupported_parameter", "not supported"),
        ({"logprobs": 3}, "logprobs", "unsupported_parameter", "not supported"),
        ({"colour": "red"}, "colour", "unknown_parameter", "unknown"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value", "greater than or equal to 1"),
        ({"temperature": 3}, "temperature", "invalid_value", "less than or equal to 2"),
        ({"prompt": ["a", "b"]}, "prompt", "invalid_value", "batches are not supported"),
        ({"prompt": ""}, "prompt", "invalid_value", "empty"),
        ({"prompt": [1, 5000]}, "prompt", "invalid_value", "vocabulary"),
        ({"model": "other"}, "model", "model_not_found", "'tiny'"),
        ({"model": None}, "model", "missing_required_parameter", "missing"),
        ({"max_tokens": 4092}, None, "context_length_exceeded", "limit is 4096"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(model, fields, param, code, words):
    async with conducting(model, pair()) as cluster:
        response = await cluster.complete(**{"prompt": "hello", **fields})
        assert response.status_code == (404 if code == "model_not_found" else 400)
        error = response.json()["error"]
        assert (error["param"], error["code"]) == (param, code)
        assert error["type"] == "invalid_request_error"
        assert words in error["message"]
        assert cluster["prefill-0"].prefills == []


async def test_the_longest_request_that_fits_is_served(model):
    async with conducting(model, pair()) as cluster:
        response = await cluster.complete("hello", max_tokens=4091, stop="q")
        assert response.status_code == 200


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("x-request-id", "a b"),
        ("x-request-id", "x" * 97),
        ("x-snowskin-cache", "maybe"),
        ("x-snowskin-stats", "yes"),
    ],
)
async def test_a_header_that_means_nothing_is_refused_by_name(model, header, value):
    async with conducting(model, pair()) as cluster:
        response = await cluster.complete(headers={header: value})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == header
        assert response.headers["x-request-id"] != value


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v2/anything", 404, "unknown_url"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
    ],
)
async def test_what_is_not_there_is_an_error_of_the_same_shape(model, method, path, status, code):
    async with conducting(model) as cluster:
        response = await cluster.http.request(method, path)
        assert response.status_code == status
        assert response.json()["error"]["code"] == code
        assert response.headers["x-request-id"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"a":NaN'])
async def test_a_body_that_is_no_json_object_is_a_400(model, body):
    async with conducting(model) as cluster:
        response = await cluster.http.post("/v1/completions", content=body)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "invalid_json"


async def test_half_a_surrogate_pair_in_a_name_is_still_answered(model):
    async with conducting(model) as cluster:
        response = await cluster.http.post(
            "/v1/completions", content=b'{"model":"tiny","prompt":"x","\\ud800":1}'
        )
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("is_declared", [True, False])
async def test_a_body_over_the_limit_is_a_413(model, is_declared):
    async def chunks():
        for _ in range(9):
            yield b" " * (1 << 20)

    content = b" " * ((8 << 20) + 1) if is_declared else chunks()
    async with conducting(model) as cluster:
        response = await cluster.http.post("/v1/completions", content=content)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"


async def test_a_body_that_does_not_come_in_time_is_a_408(model, monkeypatch):
    monkeypatch.setattr(intake, "BODY_TIMEOUT_S", 0.05)
    async with conducting(model, pair()) as cluster:
        host, _, port = cluster.served.http_address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n"
            b"connection: close\r\n\r\n" + b'{"model":'
        )
        status, answer = await reader.readline(), await reader.read()
        writer.close()
        await writer.wait_closed()
        assert b" 408 " in status
        assert b'"code":"body_timed_out"' in answer
        assert b'"type":"invalid_request_error"' in answer


async def test_a_passed_limit_is_a_429_with_its_reason_and_retry_after(model):
    async with conducting(model, pair(prefill=["hang"]), max_requests=1) as cluster:
        hanging = asyncio.create_task(cluster.complete("hello"))
        await cluster["prefill-0"].busy.wait()
        response = await cluster.complete("hello")
        assert response.status_code == 429
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "too_many_requests")
        assert "1 requests are in flight" in error["message"]
        assert int(response.headers["retry-after"]) >= 1
        assert cluster.served.conductor.state.counts().num_refused == 1
        hanging.cancel()
        await asyncio.gather(hanging, return_exceptions=True)
        await cluster.served.conductor.pipeline.drain(5.0)


async def test_one_request_too_many_is_refused_before_it_is_read_into_tokens(model, monkeypatch):
    async with conducting(model, pair(prefill=["hang"]), max_requests=1) as cluster:
        encoded = []

        def encode(_self, text, **_options):
            encoded.append(text)
            return [1, 2]

        monkeypatch.setattr(Tokenizer, "encode", encode)
        hanging = asyncio.create_task(cluster.complete("the first"))
        await cluster["prefill-0"].busy.wait()
        flood = [cluster.complete("one more", stream=index % 2 == 0) for index in range(20)]
        refused = await asyncio.gather(*flood, cluster.complete(["no", "prompt"]))
        assert {response.status_code for response in refused} == {429}
        assert encoded == ["the first"]
        counts = cluster.served.conductor.state.counts()
        assert (counts.num_running, counts.num_refused, counts.num_arrived) == (1, 21, 22)
        hanging.cancel()
        await asyncio.gather(hanging, return_exceptions=True)
        await cluster.served.conductor.pipeline.drain(5.0)


async def test_requests_that_are_being_read_into_tokens_count_as_in_flight(model, monkeypatch):
    async with conducting(model, pair(), max_requests=2) as cluster:
        gate = threading.Event()

        def held(_self, text, **_options):
            assert gate.wait(10)
            return [1, 2]

        monkeypatch.setattr(Tokenizer, "encode", held)
        long = "a" * (intake.OFF_LOOP_CHARACTERS + 1)
        asking = [asyncio.create_task(cluster.complete(long, max_tokens=1)) for _ in range(5)]
        try:
            async with asyncio.timeout(5):
                early = [await one for one in itertools.islice(asyncio.as_completed(asking), 3)]
        finally:
            gate.set()
        assert [response.status_code for response in early] == [429, 429, 429]
        assert sorted([(await each).status_code for each in asking]) == [200, 200, 429, 429, 429]


async def test_a_streamed_refusal_is_a_status_and_no_stream(model):
    async with conducting(model, pair(), max_ttft_s=0.001) as cluster:
        response = await cluster.complete("hello" * 100, stream=True)
        assert response.status_code == 429
        assert response.json()["error"]["code"] == "ttft_too_long"


async def test_no_ready_instance_is_a_503_after_the_wait(model):
    async with conducting(model, [FakeEngine("prefill-0")]) as cluster:
        response = await cluster.complete("hello")
        assert response.status_code == 503
        error = response.json()["error"]
        assert error["code"] == "no_instance_ready"
        assert "no decode instance" in error["message"]
        health = await cluster.http.get("/healthz")
        assert (health.status_code, health.json()["ok"]) == (503, False)
        assert "decode" in health.json()["reason"]
        assert (await cluster.http.get("/healthz?live=1")).status_code == 200


async def test_a_request_waits_for_an_instance_that_is_starting(model):
    engines = pair()
    async with conducting(model, engines, instance_wait_s=10.0) as cluster:
        await cluster.registrar.report("decode-0", draining=True)
        waiting = asyncio.create_task(cluster.complete("hello", max_tokens=3))
        await asyncio.wait({waiting}, timeout=0.1)
        assert not waiting.done()
        await cluster.registrar.report("decode-0", draining=False)
        assert (await waiting).json()["choices"][0]["text"] == text_of("hello", 3)
        assert (await cluster.http.get("/healthz")).status_code == 200


async def test_only_so_many_new_requests_wait_for_an_instance(model):
    settings = {"instance_wait_s": 10.0, "max_waiting_requests": 2}
    engines = [FakeEngine("prefill-0"), FakeEngine("decode-0")]
    async with conducting(model, engines, **settings) as cluster:
        await cluster.registrar.report("decode-0", draining=True)
        asking = [asyncio.create_task(cluster.complete("hello", max_tokens=3)) for _ in range(5)]
        async with asyncio.timeout(5):
            sent_away = [await one for one in itertools.islice(asyncio.as_completed(asking), 3)]
        for response in sent_away:
            assert (response.status_code, response.headers["retry-after"]) == (503, "1")
            assert "2 requests wait for one already" in response.json()["error"]["message"]
        await cluster.registrar.report("decode-0", draining=False)
        assert sorted([(await each).status_code for each in asking]) == [200, 200, 503, 503, 503]


async def test_a_completion_that_names_no_length_ends_with_the_context(model):
    async with conducting(model, pair()) as cluster:
        for num_prompt_tokens, num_tokens in ((4090, 6), (4095, 1), (100, 16)):
            response = await cluster.complete("x" * num_prompt_tokens)
            assert response.status_code == 200, response.text
            assert response.json()["usage"]["completion_tokens"] == num_tokens
        named = await cluster.complete("x" * 4090, max_tokens=7)
        assert named.json()["error"]["code"] == "context_length_exceeded"


async def test_a_user_is_told_apart_in_the_logs_and_not_named(model, caplog):
    caplog.set_level("INFO")
    async with conducting(model, pair()) as cluster:
        for user in ("jane@example.org", "jane@example.org", "joe@example.org", None):
            assert (await cluster.complete("hello", max_tokens=1, user=user)).status_code == 200
        ended = [each.msg for each in caplog.records if "request ended" in str(each.msg)]
        jane, again, joe, nobody = [each.get("user") for each in ended]
        assert jane == again != joe
        assert len(jane) == 12
        assert nobody is None
        assert "example.org" not in caplog.text
    caplog.clear()


async def test_models_are_listed(model):
    async with conducting(model) as cluster:
        listed = (await cluster.http.get("/v1/models")).json()
        assert [each["id"] for each in listed["data"]] == ["tiny"]
        assert (await cluster.http.get("/v1/models/tiny")).json() == listed["data"][0]
