"""Every transcript says what the node does; `python -m tests.support.transcripts` writes them anew."""

from __future__ import annotations

import pytest

from tests.support.transcripts import FOLDER, replay

TRANSCRIPTS = sorted(FOLDER.glob("*.txt"))


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_node_does_what_the_transcript_says(path):
    text = path.read_text(encoding="utf-8")
    assert replay(text) == text, "review it: python -m tests.support.transcripts; git diff"


def test_a_wrong_effect_does_not_pass():
    text = "> open writer\n> probe writer a\n    writer: probed 1 from the first\n"
    assert replay(text) != text
