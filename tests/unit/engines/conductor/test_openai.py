"""Requests: everything that OpenAI has is either done, said not to be, or means the same as nothing."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snowskin.engines.conductor.errors import InvalidParameter
from snowskin.engines.conductor.openai import parse_chat, parse_completion

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "m", "prompt": "hi"}


def chat(**fields):
    return parse_chat(json.dumps({**CHAT, **fields}).encode())


def completion(**fields):
    return parse_completion(json.dumps({**COMPLETION, **fields}).encode())


def refused(parse, **fields):
    with pytest.raises(InvalidParameter) as caught:
        parse(**fields)
    return caught.value


def test_everything_supported_is_understood():
    request = completion(
        max_tokens=3, temperature=0, top_p=0.5, top_k=5, seed=7, stop=["a", "b"], stream=True, n=1,
        stream_options={"include_usage": True}, user="u", ignore_eos=True, return_token_ids=True,
    )  # fmt: skip
    assert (request.prompt, request.wanted_tokens, request.temperature) == ("hi", 3, 0.0)
    assert (request.stop, request.seed, request.include_usage) == (("a", "b"), 7, True)
    assert chat(max_completion_tokens=5).wanted_tokens == 5
    assert chat(max_tokens=5).wanted_tokens == 5
    assert (chat().wanted_tokens, chat().default_tokens) == (None, None)
    assert (completion().wanted_tokens, completion().default_tokens) == (None, 16)
    assert completion(prompt=[1, 2]).prompt == (1, 2)
    assert completion(stop="x").stop == ("x",)


OPTIONAL = [
    "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stream", "stream_options", "user",
    "ignore_eos", "return_token_ids", "n", "logprobs", "tools",
]  # fmt: skip


@pytest.mark.parametrize("name", OPTIONAL)
def test_null_is_not_given(name):
    assert completion(**{name: None}) == completion()
    assert chat(**{name: None}) == chat()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2), ("n", True), ("best_of", 2), ("echo", True), ("suffix", "x"), ("logprobs", 0),
        ("logprobs", True), ("frequency_penalty", 0.5), ("presence_penalty", -1), ("tools", [{}]),
        ("logit_bias", {"1": 2}), ("response_format", {"type": "json_object"}), ("store", True),
        ("tool_choice", "auto"), ("reasoning_effort", "low"), ("modalities", ["audio"]),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(name, value):
    for parse in (completion, chat):
        error = refused(parse, **{name: value})
        assert (error.param, error.code) == (name, "unsupported_parameter")
        assert name in error.message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 1), ("best_of", 1), ("echo", False), ("logprobs", False), ("presence_penalty", 0.0),
        ("frequency_penalty", 0), ("tools", []), ("response_format", {"type": "text"}),
    ],
)  # fmt: skip
def test_what_says_in_words_what_its_absence_means_is_accepted(name, value):
    assert completion(**{name: value}) == completion()
    assert chat(**{name: value}) == chat()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 1.0}, "max_tokens"), ({"max_tokens": True}, "max_tokens"),
        ({"temperature": 2.1}, "temperature"), ({"temperature": float("nan")}, "temperature"),
        ({"temperature": -0.1}, "temperature"), ({"top_p": 0}, "top_p"), ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"), ({"top_k": 1.5}, "top_k"),
        ({"seed": 2**64}, "seed"), ({"seed": 1.5}, "seed"), ({"stream": "yes"}, "stream"),
        ({"stop": ["a"] * 5}, "stop"), ({"stop": [""]}, "stop"), ({"stop": [1]}, "stop"),
        ({"stop": "x" * 257}, "stop"), ({"stream_options": {}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"), ({"user": 1}, "user"),
        ({"model": 1}, "model"), ({"nonsense": None}, "nonsense"), ({"messages": []}, "messages"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(fields, param):
    assert refused(completion, **fields).param == param


@pytest.mark.parametrize(
    "prompt", [["a"], ["a", "b"], [[1], [2]], 5, None, {"a": 1}, [1, True], [1.5], [-1], [2**32]]
)
def test_only_one_prompt_of_text_or_tokens_is_taken(prompt):
    assert refused(completion, prompt=prompt).param == "prompt"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "text", "text": 1}]}, "messages[0].content"),
        ({"role": "tool", "content": "x"}, "messages[0].role"),
        ({"content": "x"}, "messages[0].role"),
        ({"role": "user", "content": "x", "name": "me"}, "messages[0].name"),
        ({"role": "user", "content": "x", "mood": 1}, "messages[0].mood"),
        ("x", "messages[0]"),
    ],
)
def test_a_message_that_is_not_understood_is_refused_by_name(message, param):
    assert refused(chat, messages=[message]).param == param


def test_an_answer_of_ours_can_be_sent_back_as_a_message():
    message = {
        "role": "assistant", "content": "hi", "refusal": None, "tool_calls": None, "audio": None,
    }  # fmt: skip
    assert chat(messages=[message]).messages[0].content == "hi"


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].content == "ab"


def test_two_words_for_one_limit_may_not_differ():
    assert chat(max_tokens=5, max_completion_tokens=5).wanted_tokens == 5
    assert refused(chat, max_tokens=5, max_completion_tokens=6).param == "max_completion_tokens"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
names = st.sampled_from([*OPTIONAL, "messages", "prompt", "model", "best_of"]) | st.text(max_size=6)


@given(st.dictionaries(names, json_values, max_size=6) | json_values, st.booleans())
def test_no_json_breaks_the_parsers(fields, is_whole):
    if is_whole and isinstance(fields, dict):
        fields = {**CHAT, **COMPLETION, **fields}
    body = json.dumps(fields).encode()
    for parse in (parse_chat, parse_completion):
        try:
            parse(body)
        except InvalidParameter as error:
            error.message.encode()
            (error.param or "").encode()


@given(st.binary(max_size=40))
def test_no_bytes_break_the_parsers(body):
    for parse in (parse_chat, parse_completion):
        with pytest.raises(InvalidParameter):
            parse(body)
