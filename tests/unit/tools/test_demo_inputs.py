"""What the demonstration works on."""

from __future__ import annotations

import pytest

from snowskin.kvstore.errors import BadSetting
from snowskin.tools.cluster.demo_inputs import (
    QUESTIONS,
    cut_document,
    first_message,
    model_directory,
    next_turn,
    read_document,
)


def count(messages):
    return sum(len(message["content"].encode()) for message in messages)


@pytest.mark.parametrize("bound", [40, 41, 100, 10_000])
def test_the_document_is_cut_to_the_longest_beginning_that_fits(bound):
    document = "aé€" * 300
    cut = cut_document(document, bound, count)
    assert document.startswith(cut)
    assert count([first_message(cut)]) <= bound
    if cut != document:
        assert count([first_message(document[: len(cut) + 1])]) > bound


def test_a_turn_continues_the_conversation_before_it():
    first = [first_message("text")]
    second = next_turn(first, "an answer", 1)
    assert second[:1] == first
    assert [message["role"] for message in second] == ["user", "assistant", "user"]
    assert second[1]["content"] == "an answer"
    assert second[2]["content"] == QUESTIONS[1]


def test_the_model_lies_in_the_checkout_or_else_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert model_directory(tmp_path).is_relative_to(tmp_path / "cache" / "snowskin")
    (tmp_path / "pyproject.toml").touch()
    assert model_directory(tmp_path).parent == tmp_path / ".cache"


def test_documents_are_joined_in_order(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "architecture.md").write_text("map")
    (tmp_path / "README.md").write_text("readme")
    assert read_document(None, tmp_path) == "map\n\nreadme"


@pytest.mark.parametrize("content", [None, b"", b" \n", b"\xff\xfe"])
def test_a_prompt_file_that_holds_no_text_is_refused(tmp_path, content):
    path = tmp_path / "prompt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadSetting, match="prompt"):
        read_document(path)


def test_no_document_at_all_is_an_error_that_says_what_to_give(tmp_path):
    with pytest.raises(BadSetting, match="--prompt-file"):
        read_document(None, tmp_path)
