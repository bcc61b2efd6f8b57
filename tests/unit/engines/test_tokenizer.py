"""Text, conversations and streams of tokens, on the random model's byte tokenizer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snowskin.engines.errors import BadPrompt, ModelCorrupt, ModelMissing, ModelUnsupported
from snowskin.engines.model.random_model import END_TOKEN_ID, make_random_model
from snowskin.engines.model.tokenizer import IncrementalDecoder, Tokenizer

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def shared_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_model(
        tmp_path_factory.mktemp("model") / "m",
        layers=1,
        hidden=16,
        heads=1,
        kv_heads=1,
        head_dim=16,
        intermediate=16,
    )


@pytest.fixture(scope="module")
def tokenizer(shared_directory) -> Tokenizer:
    return Tokenizer(shared_directory)


@pytest.fixture
def directory(shared_directory: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((shared_directory / name).read_bytes())
    return tmp_path


def with_template(directory: Path, template: str) -> Tokenizer:
    (directory / "chat_template.jinja").write_text(template)
    return Tokenizer(directory)


def messages(*turns: tuple[str, str]) -> list[dict[str, object]]:
    return [{"role": role, "content": content} for role, content in turns]


# --- text


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=50))
def test_text_survives_the_round_trip(tokenizer, text):
    if not any(special in text for special in ("<|", "</s>")):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_left_out_of_text_unless_wanted(tokenizer):
    tokens = [ord("a"), END_TOKEN_ID, ord("b")]
    assert tokenizer.decode(tokens) == "ab"
    assert tokenizer.decode(tokens, skip_special_tokens=False) == "a</s>b"


def test_end_tokens_and_vocabulary_are_known(tokenizer):
    assert tokenizer.eos_token_ids == (END_TOKEN_ID,)
    assert tokenizer.vocab_size == 260
    assert tokenizer.token_id("</s>") == END_TOKEN_ID
    assert tokenizer.token_id("no such token") is None


def test_settings_of_a_training_run_do_not_cut_prompts(directory):
    path = directory / "tokenizer.json"
    saved = json.loads(path.read_text())
    saved["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    path.write_text(json.dumps(saved))
    assert len(Tokenizer(directory).encode("longer than three")) == 17


# --- conversations


def test_a_conversation_renders_by_the_models_template(tokenizer):
    turns = messages(("system", "S"), ("user", "U"))
    assert tokenizer.render_chat(turns) == "<|system|>S</s><|user|>U</s><|assistant|>"
    assert tokenizer.render_chat(turns, add_generation_prompt=False).endswith("U</s>")


def test_the_next_turn_begins_with_exactly_the_tokens_of_this_one(tokenizer):
    first = messages(("user", " What is é? "))
    answer = " It's\ta > letter ~ "
    so_far = tokenizer.encode_chat(first) + tokenizer.encode(answer) + [END_TOKEN_ID]
    second = messages(("user", " What is é? "), ("assistant", answer), ("user", "And ü?"))
    assert tokenizer.encode_chat(second)[: len(so_far)] == so_far


def test_a_rendered_conversation_gets_no_second_beginning_token(directory):
    path = directory / "tokenizer.json"
    saved = json.loads(path.read_text())
    saved["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "</s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [END_TOKEN_ID], "tokens": ["</s>"]}},
    }
    path.write_text(json.dumps(saved))
    tokenizer = with_template(directory, "{{ eos_token }}{{ messages[0].content }}")
    assert tokenizer.encode("x") == [END_TOKEN_ID, ord("x")]
    assert tokenizer.encode("x", add_special_tokens=False) == [ord("x")]
    assert tokenizer.encode_chat(messages(("user", "x"))) == [END_TOKEN_ID, ord("x")]


@pytest.mark.parametrize(
    "turns",
    [
        messages(("robot", "x")),
        [{"role": "user", "content": ["x"]}],
        [{"content": "x"}],
        [{"role": 5, "content": "x"}],
    ],
)
def test_what_the_template_refuses_is_the_callers_error(tokenizer, turns):
    with pytest.raises(BadPrompt, match="template refuses"):
        tokenizer.render_chat(turns)


def test_templates_are_rendered_as_hugging_face_does(directory):
    tokenizer = with_template(
        directory,
        "{% for m in messages %}\n    {% if loop.index == 3 %}{% break %}{% endif %}\n"
        "{{ m | tojson }}\n{% endfor %}\n{{ strftime_now is defined }}",
    )
    turns = messages(("user", "<é>"), ("user", "b"), ("user", "c"))
    assert tokenizer.render_chat(turns) == (
        '{"role": "user", "content": "<é>"}\n{"role": "user", "content": "b"}\nFalse'
    )


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
        "{% endgeneration %}{% else %}<|user|>{{ m.content }}{% endif %}{% endfor %}",
        "{% for m in messages %}\n  {%- generation -%}\n  {{ loop.index }}{{ m.content | trim }}\n"
        "  {%- endgeneration %}\n{% endfor %}",
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    ],
)
def test_templates_that_mark_answers_for_training_render_as_hugging_face_does(directory, template):
    chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils")
    turns = messages(("user", "a "), ("assistant", " b"), ("user", "c"))
    (expected,), _ = chat_template_utils.render_jinja_template([turns], chat_template=template)
    assert with_template(directory, template).render_chat(turns) == expected
    assert "b" in expected or "x" in template


def test_a_mark_for_training_without_its_end_is_a_broken_template(directory):
    with pytest.raises(ModelCorrupt, match="does not compile"):
        with_template(directory, "{% generation %}{{ messages }}")


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    ],
)
def test_a_template_can_neither_change_nor_reach_out(directory, template):
    with pytest.raises(BadPrompt):
        with_template(directory, template).render_chat(messages(("user", "x")))


def test_of_several_templates_the_default_one_counts(directory):
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["chat_template"] = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "plain"},
    ]
    settings["eos_token"] = {"content": "</s>", "lstrip": False}
    path.write_text(json.dumps(settings))
    assert Tokenizer(directory).render_chat([]) == "plain"
    assert with_template(directory, "own file {{ eos_token }}").render_chat([]) == "own file </s>"


def test_a_model_without_a_template_says_so(directory):
    (directory / "tokenizer_config.json").unlink()
    with pytest.raises(ModelUnsupported, match="no chat template"):
        Tokenizer(directory).render_chat([])


def test_a_missing_or_broken_file_is_a_typed_error(directory, tmp_path):
    with pytest.raises(ModelMissing, match="no model directory"):
        Tokenizer(tmp_path / "nowhere")
    with pytest.raises(ModelCorrupt, match="does not compile"):
        with_template(directory, "{% for")
    (directory / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelCorrupt, match=r"chat_template\.jinja cannot be read"):
        Tokenizer(directory)
    (directory / "chat_template.jinja").unlink()
    (directory / "tokenizer.json").write_text('{"model": 5}')
    with pytest.raises(ModelCorrupt, match="no tokenizer"):
        Tokenizer(directory)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ModelMissing, match=r"holds no tokenizer\.json"):
        Tokenizer(directory)


# --- streams


def pushed(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    decoder = IncrementalDecoder(tokenizer)
    return [*(decoder.push(token) for token in tokens), decoder.flush()]


@given(tokens=st.lists(st.integers(0, 259), max_size=60))
def test_deltas_joined_are_the_text_of_the_whole(tokenizer, tokens):
    assert "".join(pushed(tokenizer, tokens)) == tokenizer.decode(tokens)


@given(text=st.text(alphabet="aé中😀\u0301 ", max_size=30))
def test_each_delta_ends_with_a_whole_character(tokenizer, text):
    deltas = pushed(tokenizer, tokenizer.encode(text))
    assert "".join(deltas) == text
    assert all("\ufffd" not in delta for delta in deltas)
    # One delta per character: nothing is held back longer than its bytes are incomplete.
    assert [delta for delta in deltas if delta] == list(text)


def test_what_stays_incomplete_is_flushed_once(tokenizer):
    decoder = IncrementalDecoder(tokenizer)
    assert decoder.push(0xE4) == ""
    assert decoder.push(0xB8) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""
    assert decoder.push(ord("a")) == "a"


def test_a_long_stream_costs_a_few_tokens_of_decoding_a_push(tokenizer, monkeypatch):
    decoded: list[int] = []
    decode = tokenizer.decode

    def counted(token_ids):
        decoded.append(len(token_ids))
        return decode(token_ids)

    monkeypatch.setattr(tokenizer, "decode", counted)
    pushed(tokenizer, [ord("a")] * 300)
    assert max(decoded) <= 2
