"""Transcripts: what happens to a node, line by line, and what it does, as texts that people read and review.

A line that begins with `>` is an event; the indented lines below it are the effects, in order: answers (`name:`), and
the pool's blocks by use where they changed. Blocks are named by words, leases by `#number`; places are counted in
blocks. `python -m tests.support.transcripts` from the repository's root writes the effects of all transcripts anew;
what changed is then reviewed as a diff.

    > node blocks=8                            a node; settings of NodeLimits by name
    > open writer                              a client connects (`remote`: maps no memory)
    > reserve writer a b parent=z timeout=5    also: one_reader, ttl=
    > reserve-tail writer r1                   also: timeout=
    > commit writer #1 a b
    > abort writer #1
    > match reader a b wait=2 timeout=5        also: max=, ttl=
    > match-tail reader r1                     also: timeout=
    > release reader #2 wrong=0,1
    > renew reader #2                          also: ttl=
    > probe reader a b
    > wait 10                                  seconds pass
    > end writer                               the connection ends
    > drain
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from snowskin.kvstore.messages import (
    Aborted,
    AbortRequest,
    CommitRequest,
    Committed,
    Complaint,
    LeaseId,
    Matched,
    Probed,
    ProbeRequest,
    Released,
    ReleaseRequest,
    Renewed,
    RenewRequest,
    Request,
    Reserved,
    Run,
    SessionId,
)
from snowskin.transport.errors import SnowskinError
from tests.support.node_driver import (
    BLOCK,
    NAMESPACE,
    Answer,
    NodeDriver,
    column,
    matching,
    matching_tail,
    record,
    reserving,
    reserving_tail,
)

if TYPE_CHECKING:
    from snowskin.kvstore.session import Session

FOLDER = Path(__file__).resolve().parent.parent / "transcripts"


def replay(text: str) -> str:
    """The same transcript with the effects that its events have now."""
    stage = Stage()
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith(">"):
            lines.append(line)
            lines += [f"    {effect}" for effect in stage.play(line[1:].split())]
        elif not line.startswith(" "):
            lines.append(line)
    return "\n".join(lines) + "\n"


class Stage:
    """One node and the clients of one transcript."""

    def __init__(self) -> None:
        """No node yet: the first event makes it."""
        self._node = NodeDriver()
        self._clients: dict[str, Session] = {}
        self._names: dict[SessionId, str] = {}
        self._effects: list[str] = []
        self._books: dict[str, float] = {}

    def play(self, words: list[str]) -> list[str]:
        """The effects of one event."""
        self._effects = []
        event, *rest = words
        options = dict(word.split("=", 1) for word in rest if "=" in word)
        plain = [word for word in rest if "=" not in word]
        match event:
            case "node":
                blocks = int(options.pop("blocks", 8))
                limits: dict[str, Any] = {name: float(value) for name, value in options.items()}
                self._node = NodeDriver(blocks=blocks, **limits)
                self._node.on_answer = self._on_answer
            case "open":
                session = self._node.session(plain[0], maps="remote" not in plain)
                self._clients[plain[0]] = session
                self._names[session.id] = plain[0]
            case "end":
                self._node.end(self._clients.pop(plain[0]))
            case "wait":
                self._node.wait(float(plain[0]))
            case "drain":
                self._node.take(self._node.state.drain())
            case _:
                session = self._clients[plain[0]]
                call_id = self._node.call(session, request_of(event, plain[1:], options))
                if self._node.answer(session, call_id) is None:
                    self._effects.append(f"{plain[0]} waits")
        books = self._node.books()
        if books != self._books:
            self._books = books
            uses = ", ".join(f"{num:g} {use}" for use, num in books.items())
            self._effects.append(f"blocks: {uses}")
        return self._effects

    def _on_answer(self, session_id: SessionId, _call_id: int, answer: Answer) -> None:
        self._effects.append(f"{self._names[session_id]}: {told(answer)}")


def request_of(event: str, plain: list[str], options: dict[str, str]) -> Request:
    """The request that an event is."""
    timeout_s, ttl_s = float(options.get("timeout", 0)), float(options.get("ttl", 0))
    leases = tuple(LeaseId(int(word[1:])) for word in plain if word.startswith("#"))
    names = " ".join(word for word in plain if word[0] != "#" and word != "one_reader")
    match event:
        case "reserve":
            return reserving(
                names,
                parent=options.get("parent", ""),
                one_reader="one_reader" in plain,
                ttl_s=ttl_s,
                timeout_s=timeout_s,
            )
        case "reserve-tail":
            return reserving_tail(names, timeout_s=timeout_s)
        case "commit":
            checksums = b"".join(record(name) for name in names.split())
            return CommitRequest(
                lease_id=leases[0], num_blocks=len(names.split()), checksums=checksums
            )
        case "abort":
            return AbortRequest(lease_id=leases[0])
        case "match":
            return matching(
                names,
                wait_blocks=int(options.get("wait", 0)),
                max_blocks=int(options.get("max", 0)),
                timeout_s=timeout_s,
                ttl_s=ttl_s,
            )
        case "match-tail":
            return matching_tail(names, timeout_s=timeout_s)
        case "release":
            wrong = tuple(int(index) for index in options.get("wrong", "").split(",") if index)
            complaints = (Complaint(lease_id=leases[0], block_indices=wrong),) if wrong else ()
            return ReleaseRequest(lease_ids=leases, complaints=complaints)
        case "renew":
            return RenewRequest(lease_ids=leases, ttl_s=ttl_s)
        case "probe":
            return ProbeRequest(namespaces=(NAMESPACE,), keys=column(names))
    raise ValueError(f"there is no event {event!r}")


def told(answer: Answer) -> str:
    """An answer in words."""
    match answer:
        case Reserved(lease=None):
            return "all here, nothing reserved"
        case Reserved(lease=lease, runs=runs) if lease is not None:
            return f"reserved #{lease.id} for {lease.ttl_s:g} s: {places(runs)}"
        case Committed(existing_block_indices=existing, num_blocks_left=num_left):
            lost = f", {list(existing)} were here first" if existing else ""
            return f"committed, {num_left} left{lost}"
        case Aborted(freed_nbytes=nbytes):
            return f"aborted, {nbytes / BLOCK:g} free again"
        case Matched(num_blocks=num_blocks, lease=lease, wake_reason=reason):
            found = f"matched {num_blocks}, {reason.name}"
            if lease is None:
                return found
            return f"{found}: #{lease.id} for {lease.ttl_s:g} s: {places(answer.runs)}"
        case Released(num_unknown=num_unknown):
            return f"released, {num_unknown} unknown" if num_unknown else "released"
        case Renewed(ttl_s=lives):
            return "renewed: " + ", ".join(f"{life_s:g} s" for life_s in lives)
        case Probed(num_blocks=num_blocks, present_bitmap=bitmap):
            bits = "".join(f"{byte:08b}"[::-1] for byte in bitmap)
            return f"probed {num_blocks} from the first, present {bits}"
        case SnowskinError():
            retry = f"; retry after {answer.retry_after_s:g} s" if answer.retry_after_s else ""
            return f"{type(answer).__name__}: {answer.message}{retry}"
    raise ValueError(f"there are no words for {answer}")


def places(runs: tuple[Run, ...]) -> str:
    """Which blocks lie where, e.g. `0-2 at 5`."""
    parts = []
    for run in runs:
        last = run.first_block_index + run.num_blocks - 1
        indices = f"{run.first_block_index}" + (f"-{last}" if run.num_blocks > 1 else "")
        parts.append(f"{indices} at {run.extent.offset / BLOCK:g}")
    return ", ".join(parts)


def rewrite() -> None:
    """Writes the effects of all transcripts anew."""
    for path in sorted(FOLDER.glob("*.txt")):
        text = path.read_text(encoding="utf-8")
        if (now := replay(text)) != text:
            path.write_text(now, encoding="utf-8")
            print(f"rewritten: {path.name}")


if __name__ == "__main__":
    rewrite()
