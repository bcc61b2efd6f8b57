"""From generated tokens to the text that a user gets: whole characters, and nothing from a stop on.

Rules kept here: a stop string ends the answer where it is completed first (of several completed by
the same character, the one that began first), however the text was cut into pieces; neither it nor
anything after it is ever emitted; text that may be the beginning of a stop string is held back. The
token that ends a sequence has no text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from snowskin.engines.model.tokenizer import IncrementalDecoder, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence


class StopMatcher:
    """Looks for stop strings in a stream of text."""

    def __init__(self, stops: Sequence[str]) -> None:
        """With no `stops`, everything passes at once."""
        self._stops = tuple(stops)
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """What of the text so far can be emitted now; nothing more after a match."""
        if self.matched:
            return ""
        text = self._held + text
        self._held = ""
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.matched = True
            return text[: min(found)[1]]
        num_held = self._num_held(text)
        if num_held:
            text, self._held = text[:-num_held], text[-num_held:]
        return text

    def flush(self) -> str:
        """What was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        """Characters at the end of `text` that begin a stop string."""
        longest = max((len(stop) for stop in self._stops), default=0)
        for length in range(min(longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


class AnswerText:
    """The text of one answer, token by token."""

    def __init__(
        self, tokenizer: Tokenizer, *, stops: Sequence[str], stop_token_ids: Sequence[int]
    ) -> None:
        """Tokens in `stop_token_ids` have no text."""
        self._decoder = IncrementalDecoder(tokenizer)
        self._matcher = StopMatcher(stops)
        self._stop_token_ids = frozenset(stop_token_ids)

    @property
    def matched(self) -> bool:
        """Whether a stop string has ended the answer."""
        return self._matcher.matched

    def push(self, token_id: int) -> str:
        """Text that can be emitted now; may be empty."""
        if token_id in self._stop_token_ids:
            return ""
        return self._matcher.push(self._decoder.push(token_id))

    def flush(self) -> str:
        """The rest, at the end of the answer."""
        text = self._matcher.push(self._decoder.flush())
        return text + ("" if self.matched else self._matcher.flush())
