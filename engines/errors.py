"""What the engines refuse and why, grouped by the moment it can happen.

Rules kept here: as in `snowskin.transport.errors`, a class says what happened, the message says the
numbers, the hint says what to do next.
"""

from __future__ import annotations

from snowskin.transport.errors import SnowskinError

# --- at start: the model's directory


class ModelMissing(SnowskinError):
    """The model directory, or a file that it must hold, is not there."""

    status = "NOT_FOUND"


class ModelUnsupported(SnowskinError):
    """The model asks for something that this decoder does not compute."""

    status = "FAILED_PRECONDITION"


class ModelCorrupt(SnowskinError):
    """A file of the model directory cannot be read, or its tensors contradict config.json."""

    status = "DATA_LOSS"


# --- on a request: what the caller sent is wrong


class PromptTooLong(SnowskinError):
    """Prompt and wanted tokens together exceed what the model or the instance can hold."""

    status = "INVALID_ARGUMENT"


class BadPrompt(SnowskinError):
    """The prompt is empty, holds an unknown token, or the chat template refuses it."""

    status = "INVALID_ARGUMENT"


class BadSamplingParams(SnowskinError):
    """A sampling parameter is out of its range."""

    status = "INVALID_ARGUMENT"


# --- while computing


class KvMemoryExhausted(SnowskinError):
    """The instance's KV memory has fewer free blocks than wanted."""

    status = "RESOURCE_EXHAUSTED"


class LogitsNotFinite(SnowskinError):
    """The model computed NaN or infinity: its weights or the KV bytes under it are broken."""

    status = "DATA_LOSS"


# --- on an instance: it cannot take the request, or cannot finish it


class InstanceOverloaded(SnowskinError):
    """As many requests wait at this instance as it lets wait."""

    status = "RESOURCE_EXHAUSTED"


class InstanceDraining(SnowskinError):
    """The instance is shutting down: it takes no new requests, and ended what was still running."""

    status = "UNAVAILABLE"


class HandoffMissing(SnowskinError):
    """Decode was started, and its hand-off did not come."""

    status = "DEADLINE_EXCEEDED"
