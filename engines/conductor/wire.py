"""What instances say to the conductor, from protobuf to our own values.

Rules kept here: a registration that cannot work is refused by name before anything is kept.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from snowskin.engines.conductor.errors import ModelMismatch
from snowskin.engines.conductor.request import CacheShape, Stage
from snowskin.engines.conductor.state import Registration
from snowskin.engines.messages import InstanceLoad
from snowskin.kvstore.errors import BadRequest, NamespaceMismatch

if TYPE_CHECKING:
    from snowskin.engines.conductor.view import InstanceView
    from snowskin.v1 import conductor_pb2, engine_pb2

NAMESPACE_NBYTES = 32
MAX_NAMESPACES = 64
MAX_NAME_LENGTH = 128

_LOAD = tuple(InstanceLoad.__dataclass_fields__)


def load_from(message: engine_pb2.InstanceLoad) -> InstanceLoad:
    """What an instance is doing; what it does not say, or cannot mean, is 0: unknown."""
    values = {name: getattr(message, name) for name in _LOAD}
    return InstanceLoad(
        **{name: value if 0 <= value < math.inf else 0 for name, value in values.items()}
    )


def set_load(instance: InstanceView, message: engine_pb2.InstanceLoad) -> None:
    """Fills in what `instance` reported last."""
    for name in _LOAD:
        setattr(message, name, getattr(instance.load, name))


def registration_from(message: conductor_pb2.RegisterRequest, *, model_name: str) -> Registration:
    """A registration.

    Raises:
        BadRequest: a field is missing or out of range.
        NamespaceMismatch: a namespace is not 32 bytes, or there is none.
        ModelMismatch: the instance serves another model.
    """
    for name in ("instance_id", "address"):
        if not 0 < len(getattr(message, name)) <= MAX_NAME_LENGTH:
            raise BadRequest(
                f"{name} has {len(getattr(message, name))} characters",
                hint=f"give 1 to {MAX_NAME_LENGTH}",
            )
    if message.role not in list(Stage):
        raise BadRequest(f"role {message.role!r} is unknown", hint=f"one of {', '.join(Stage)}")
    if message.model_name != model_name:
        raise ModelMismatch(
            f"instance {message.instance_id} serves {message.model_name!r}, this conductor "
            f"{model_name!r}",
            hint="start both with the same --model-name",
        )
    if message.block_size < 1 or message.block_nbytes < 1:
        raise BadRequest(
            f"blocks of {message.block_size} tokens and {message.block_nbytes} bytes",
            hint="give at least 1 of each",
        )
    namespaces = tuple(message.namespaces)
    if not 0 < len(namespaces) <= MAX_NAMESPACES or any(
        len(each) != NAMESPACE_NBYTES for each in namespaces
    ):
        raise NamespaceMismatch(
            f"{len(namespaces)} namespaces of {[len(each) for each in namespaces[:4]]} bytes",
            hint=f"give 1 to {MAX_NAMESPACES} of {NAMESPACE_NBYTES} bytes",
        )
    return Registration(
        instance_id=message.instance_id,
        epoch=message.instance_epoch,
        role=message.role,
        address=message.address,
        node_address=message.node_address,
        shape=CacheShape(
            namespaces=namespaces,
            block_size=message.block_size,
            block_nbytes=message.block_nbytes,
        ),
        model_name=message.model_name,
        max_context_tokens=message.max_context_tokens,
        layout_json=message.layout_json,
    )


def token_ids_from(packed: bytes, *, vocab_size: int) -> list[int]:
    """Tokens of a packed column.

    Raises:
        BadRequest: not a whole number of tokens, none, or one outside the vocabulary.
    """
    if len(packed) % 4 or not packed:
        raise BadRequest(
            f"token_ids has {len(packed)} bytes", hint="pack each token in 4 bytes, little-endian"
        )
    token_ids: list[int] = np.frombuffer(packed, dtype="<u4").tolist()
    if max(token_ids) >= vocab_size:
        raise BadRequest(
            f"token {max(token_ids)} is outside the vocabulary of {vocab_size}",
            hint="use the tokenizer of this model",
        )
    return token_ids
