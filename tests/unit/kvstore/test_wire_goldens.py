"""What was once sent is read for ever: bytes kept in files still mean what is written beside them."""

from __future__ import annotations

import json

import pytest
from google.protobuf import json_format

from tests.support.goldens import (
    FOLDER,
    as_bytes,
    as_json,
    goldens,
    main,
    message_kinds,
    still_reads,
)

HINT = "a field was added? python -m tests.support.goldens --write, and commit the files with it"
STEMS = sorted(path.stem for path in FOLDER.glob("*.binpb"))


@pytest.mark.parametrize("stem", STEMS)
def test_old_bytes_have_their_old_meaning(stem):
    kind = message_kinds()[stem.partition(".")[0]]
    data = (FOLDER / f"{stem}.binpb").read_bytes()
    text = (FOLDER / f"{stem}.json").read_text(encoding="utf-8")
    assert still_reads(kind, data, text), f"{stem}: peers of an older release mean something else"
    message = json_format.ParseDict(json.loads(text), kind())
    assert as_bytes(message) == data


def test_every_message_with_every_field_has_its_golden():
    now = {stem: (as_bytes(message), as_json(message)) for stem, message in goldens()}
    assert sorted(now) == STEMS, HINT
    for stem, (data, text) in now.items():
        assert (FOLDER / f"{stem}.binpb").read_bytes() == data, f"{stem}: {HINT}"
        assert (FOLDER / f"{stem}.json").read_text(encoding="utf-8") == text, f"{stem}: {HINT}"


def test_no_golden_leaves_a_field_out():
    """The filler itself: a field that it skipped would be a field that nobody watches."""
    seen = {}
    for stem, message in goldens():
        name = stem.partition(".")[0]
        seen.setdefault(name, set()).update(field.name for field, _ in message.ListFields())
    for name, kind in message_kinds().items():
        assert seen[name] == {field.name for field in kind.DESCRIPTOR.fields}, name


def test_writing_anew_does_not_change_what_older_peers_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tests.support.goldens.FOLDER", tmp_path)
    assert main(["--write"]) == 0
    extent = tmp_path / "Extent.binpb"
    good = extent.read_bytes()
    # The same values under other numbers, as a renumbered field would have left them.
    renumbered = bytes([good[0] + (1 << 3)]) + good[1:]
    extent.write_bytes(renumbered)
    assert main(["--write"]) == 1
    assert "Extent" in capsys.readouterr().out
    assert extent.read_bytes() == renumbered
    assert main(["--write", "--break-wire"]) == 0
    assert extent.read_bytes() == good
