"""What a conductor's Admin service answers, as plain values.

Rules kept here: protobuf ends in this file; every call has a deadline; an error is the type that the conductor
raised, or says that it cannot be reached.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from snowskin.kvstore import wire
from snowskin.tools.kvctl.asking import Asker
from snowskin.v1 import admin_pb2, admin_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Sequence

    from snowskin.kvstore.messages import NodeStat


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceStatus:
    """One engine as the conductor sees it.

    Attributes:
        state: ready, draining or suspect.
        num_waiting_tokens: prompt tokens not computed yet, over all its requests.
        prefill_tokens_per_s, pull_bytes_per_s, decode_step_s: measured; 0 while unknown.
    """

    instance_id: str
    role: str
    state: str
    address: str
    node_address: str
    block_size: int
    seconds_since_report: float
    num_waiting: int
    num_running: int
    num_waiting_tokens: int
    num_kv_blocks: int
    num_kv_blocks_free: int
    num_tokens_computed: int
    prefill_tokens_per_s: float
    pull_bytes_per_s: float
    decode_step_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeKnowledge:
    """What the conductor knows of one node without asking it.

    Attributes:
        state: in sync, syncing, suspect or unknown; requests are placed by nodes in sync.
        num_blocks: known to be there, in all namespaces.
        seconds_since_message: how old that may be; None where the node never told anything.
        sequence: the node's last change that is in it.
        num_astray: how often what the node told did not follow, so that all was asked anew.
    """

    address: str
    state: str
    num_blocks: int
    seconds_since_message: float | None
    sequence: int
    node_epoch: int
    num_astray: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    """The instances, what became of the requests, and what is known of the nodes."""

    model_name: str
    instances: tuple[InstanceStatus, ...]
    num_requests_running: int
    num_requests_finished: int
    num_requests_refused: int
    num_requests_failed: int
    nodes: tuple[NodeKnowledge, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStatus:
    """One node; `stat` is None where it did not answer, and `error` says why."""

    address: str
    stat: NodeStat | None = None
    error: str = ""
    knowledge: NodeKnowledge | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeMatch:
    """What one node holds of a prompt.

    Attributes:
        num_blocks: longest gapless run from the start.
        num_blocks_present: blocks in all.
    """

    address: str
    num_blocks: int
    num_blocks_present: int
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptMatch:
    """What of a prompt is cached where; `num_blocks` counts its full blocks."""

    num_tokens: int
    num_blocks: int
    block_size: int
    nodes: tuple[NodeMatch, ...] = field(default=())


class AdminClient(Asker):
    """Asks one conductor; an asynchronous context manager."""

    PEER = "conductor"
    STUB = admin_pb2_grpc.AdminStub

    async def cluster_status(self) -> ClusterStatus:
        """Instances and request counts.

        Raises:
            NodeUnavailable, DeadlineExceeded: the conductor does not answer.
        """
        answer = await self._ask(self._stub.ClusterStatus, admin_pb2.ClusterStatusRequest())
        return ClusterStatus(
            model_name=answer.model_name,
            instances=tuple(_instance(instance) for instance in answer.instances),
            num_requests_running=answer.num_requests_running,
            num_requests_finished=answer.num_requests_finished,
            num_requests_refused=answer.num_requests_refused,
            num_requests_failed=answer.num_requests_failed,
            nodes=tuple(_knowledge(node) for node in answer.nodes),
        )

    async def nodes(self) -> tuple[NodeStatus, ...]:
        """The nodes that the instances have named, each asked now; raises as `cluster_status`."""
        answer = await self._ask(self._stub.Nodes, admin_pb2.NodesRequest())
        return tuple(
            NodeStatus(
                address=node.address,
                stat=wire.stat_from(node.stat) if node.HasField("stat") else None,
                error=node.error,
                knowledge=_knowledge(node.knowledge) if node.HasField("knowledge") else None,
            )
            for node in answer.nodes
        )

    async def match_prompt(self, prompt: str | Sequence[int]) -> PromptMatch:
        """What of a text, or of token ids, is cached where; raises as `cluster_status`."""
        request = admin_pb2.MatchPromptRequest()
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids = np.asarray(prompt, dtype="<u4").tobytes()
        answer = await self._ask(self._stub.MatchPrompt, request)
        return PromptMatch(
            num_tokens=answer.num_tokens,
            num_blocks=answer.num_blocks,
            block_size=answer.block_size,
            nodes=tuple(
                NodeMatch(
                    address=node.address,
                    num_blocks=node.num_blocks,
                    num_blocks_present=node.num_blocks_present,
                    error=node.error,
                )
                for node in answer.nodes
            ),
        )


def _knowledge(message: admin_pb2.NodeKnowledge) -> NodeKnowledge:
    told = message.HasField("seconds_since_message")
    return NodeKnowledge(
        address=message.address,
        state=message.state,
        num_blocks=message.num_blocks,
        seconds_since_message=message.seconds_since_message if told else None,
        sequence=message.sequence,
        node_epoch=message.node_epoch,
        num_astray=message.num_astray,
    )


def _instance(message: admin_pb2.InstanceStatus) -> InstanceStatus:
    load = message.load
    return InstanceStatus(
        instance_id=message.instance_id,
        role=message.role,
        state=message.state,
        address=message.address,
        node_address=message.node_address,
        block_size=message.block_size,
        seconds_since_report=message.seconds_since_report,
        num_waiting=load.num_waiting,
        num_running=load.num_running,
        num_waiting_tokens=load.num_waiting_tokens,
        num_kv_blocks=load.num_kv_blocks,
        num_kv_blocks_free=load.num_kv_blocks_free,
        num_tokens_computed=load.num_tokens_computed,
        prefill_tokens_per_s=load.prefill_tokens_per_s,
        pull_bytes_per_s=load.pull_bytes_per_s,
        decode_step_s=load.decode_step_s,
    )
