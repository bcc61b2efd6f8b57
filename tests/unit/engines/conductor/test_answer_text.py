"""Stop strings: where the answer ends does not depend on how its text was cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from snowskin.engines.conductor.answer_text import AnswerText, StopMatcher
from snowskin.engines.model.tokenizer import Tokenizer
from tests.support.conductors import make_tiny_model


def emitted(stops, pieces):
    matcher = StopMatcher(stops)
    texts = [matcher.push(piece) for piece in pieces]
    return "".join([*texts, matcher.flush()]), matcher.matched


def wanted(stops, text):
    """The same, by looking at every prefix: the plainest way to say it."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


few = st.text("ab", max_size=12)


@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.lists(few, max_size=6))
def test_the_first_stop_to_be_completed_ends_the_text(stops, pieces):
    assert emitted(stops, pieces) == wanted(stops, "".join(pieces))


def test_what_may_begin_a_stop_is_held_back_and_nothing_else_is():
    matcher = StopMatcher(["stop"])
    assert matcher.push("one st") == "one "
    assert matcher.push("ep") == "step"
    assert matcher.push(" sto") == " "
    assert matcher.push("p and more") == ""
    assert matcher.matched
    assert matcher.push("x") == matcher.flush() == ""


def test_of_two_stops_the_one_that_is_completed_first_ends_the_text():
    assert emitted(["abb", "b"], ["abb"]) == ("a", True)
    assert emitted(["abb", "bb"], ["abb"]) == ("", True)


def test_the_token_that_ends_an_answer_has_no_text_even_where_it_is_a_plain_one(tmp_path):
    tokenizer = Tokenizer(make_tiny_model(tmp_path / "tiny-model"))
    answer = AnswerText(tokenizer, stops=["c"], stop_token_ids=[ord("x")])
    assert [answer.push(token) for token in "ax€"[:2].encode()] == ["a", ""]
    assert [answer.push(token) for token in "€".encode()] == ["", "", "€"]
    assert answer.push("é".encode()[0]) == ""
    assert (answer.flush(), answer.matched) == ("\ufffd", False)


def test_without_stops_everything_passes_at_once():
    matcher = StopMatcher([])
    assert [matcher.push("a"), matcher.push("b"), matcher.flush()] == ["a", "b", ""]
