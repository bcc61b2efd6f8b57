"""Builders of what a conductor knows: instances, views, requests, with only what a test says."""

from __future__ import annotations

from typing import Any

from snowskin.engines.conductor.request import CacheShape, Request
from snowskin.engines.conductor.state import Registration
from snowskin.engines.conductor.view import ClusterView, InstanceState, InstanceView
from snowskin.engines.messages import InstanceLoad

SHAPE = CacheShape(namespaces=(b"n" * 32,), block_size=16, block_nbytes=1 << 16)
OTHER_SHAPE = CacheShape(namespaces=(b"o" * 32,), block_size=16, block_nbytes=1 << 16)


def load(**fields: Any) -> InstanceLoad:
    """An idle instance with 1,000 blocks that has measured nothing, but for `fields`."""
    values: dict[str, Any] = {
        "num_waiting": 0,
        "num_running": 0,
        "num_waiting_tokens": 0,
        "num_kv_blocks": 1000,
        "num_kv_blocks_free": 1000,
        "num_tokens_computed": 0,
        "prefill_tokens_per_s": 0.0,
        "pull_bytes_per_s": 0.0,
        "decode_step_s": 0.0,
    }
    return InstanceLoad(**{**values, **fields})


def instance(instance_id: str, **fields: Any) -> InstanceView:
    """A ready instance whose role is the first part of its id: `prefill-0`."""
    values: dict[str, Any] = {
        "instance_id": instance_id,
        "epoch": 1,
        "role": instance_id.split("-")[0],
        "address": f"{instance_id}:1",
        "node_address": "node-0:1",
        "shape": SHAPE,
        "model_name": "tiny",
        "max_context_tokens": 0,
        "load": load(),
        "state": InstanceState.READY,
        "seconds_since_report": 0.1,
    }
    return InstanceView(**{**values, **fields})


def view(*instances: InstanceView, **fields: Any) -> ClusterView:
    """A view of `instances`, sorted as a view always is; one request is being decided."""
    ordered = tuple(sorted(instances, key=lambda each: each.instance_id))
    return ClusterView(**{"instances": ordered, "num_requests": 1, **fields})


def request(**fields: Any) -> Request:
    """A prompt of 100 tokens that wants 10 more."""
    values: dict[str, Any] = {
        "request_id": "r",
        "shape": SHAPE,
        "num_tokens": 100,
        "max_tokens": 10,
    }
    return Request(**{**values, **fields})


def registration(instance_id: str, **fields: Any) -> Registration:
    """What `prefill-0` says of itself when it starts."""
    values: dict[str, Any] = {
        "instance_id": instance_id,
        "epoch": 1,
        "role": instance_id.split("-")[0],
        "address": f"{instance_id}:1",
        "node_address": "node-0:1",
        "shape": SHAPE,
        "model_name": "tiny",
    }
    return Registration(**{**values, **fields})
