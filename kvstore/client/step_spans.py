"""What a traced flow of the client tells of its steps: their names, and a few counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snowskin.kvstore.call_spans import facts_of_reply, name_of_call
from snowskin.kvstore.client.machine import Call, Move

if TYPE_CHECKING:
    from snowskin.kvstore.client.machine import Done, Step
    from snowskin.kvstore.tracing import Fact


def name_of(step: Step) -> str:
    """The span's name."""
    if isinstance(step, Move):
        return "copy out" if step.is_push else "copy in"
    return name_of_call(step.request)


def is_told(step: Step) -> bool:
    """Whether a step is worth a span: one that waits for something."""
    return isinstance(step, Call | Move)


def facts_of(step: Step, done: Done) -> dict[str, Fact]:
    """Counts and sizes of a step that went well."""
    if isinstance(step, Move):
        return {"nbytes": sum(run.nbytes for _, runs in step.runs for run in runs)}
    return facts_of_reply(done.reply)
