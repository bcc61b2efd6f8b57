"""The conductor's gRPC: instances register and report, routers ask for plans, operators for facts.

Rules kept here: a message is checked before it changes anything; every answer comes from the state
as it is now; what needs a node is asked with a deadline, and a node that does not answer is a line
of the answer and not an error of it.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from snowskin.engines.conductor.engine_client import prompt_to
from snowskin.engines.conductor.errors import NoInstanceReady
from snowskin.engines.conductor.request import Stage
from snowskin.engines.conductor.wire import (
    load_from,
    registration_from,
    set_load,
    token_ids_from,
)
from snowskin.kvstore.errors import BadRequest
from snowskin.kvstore.telemetry import get_logger
from snowskin.kvstore.wire import reply_to, to_ms
from snowskin.transport.errors import SnowskinError
from snowskin.v1 import admin_pb2, admin_pb2_grpc, common_pb2, conductor_pb2, conductor_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Sequence

    from snowskin.engines.conductor.intake import ServedModel
    from snowskin.engines.conductor.nodes import NodeHit, Nodes
    from snowskin.engines.conductor.request import CacheShape
    from snowskin.engines.conductor.scheduler import Scheduler
    from snowskin.kvstore.clock import Clock

CONDUCTOR_SERVICE = "snowskin.v1.Conductor"
ADMIN_SERVICE = "snowskin.v1.Admin"
NODE_TIMEOUT_S = 1.0

log = get_logger(__name__)


class ConductorService(conductor_pb2_grpc.ConductorServicer):
    """Schedule, Register, Report."""

    def __init__(
        self, scheduler: Scheduler, model: ServedModel, clock: Clock, *, report_interval_s: float
    ) -> None:
        """Tells instances to report every `report_interval_s` seconds."""
        self._scheduler = scheduler
        self._model = model
        self._clock = clock
        self._report_interval_s = report_interval_s

    async def Schedule(  # noqa: N802  the wire's name
        self, request: conductor_pb2.ScheduleRequest, _context: Any
    ) -> conductor_pb2.ScheduleResponse:
        """A plan; the placement counts as load until the instances' next reports."""
        token_ids = token_ids_from(request.token_ids, vocab_size=self._model.vocab_size)
        if request.max_tokens < 1:
            raise BadRequest(f"max_tokens is {request.max_tokens}", hint="use at least 1")
        request_id = request.request_id or secrets.token_hex(16)
        scheduler = self._scheduler
        prepared = await scheduler.prepare(
            request_id,
            token_ids,
            max_tokens=request.max_tokens,
            use_cache=request.cache_policy != common_pb2.CACHE_POLICY_OFF,
            salt=f"{request_id} {secrets.token_hex(16)}",
            is_new=True,
        )
        await scheduler.admit(prepared.request, is_counted=False)
        prefill = scheduler.plan(prepared.request, Stage.PREFILL)
        decode = scheduler.plan(prepared.request, Stage.DECODE)
        for placed in (prefill, decode):
            scheduler.state.on_placed(request_id, placed.placement)
        estimate = prefill.placement.estimate
        assert estimate is not None, "a prefill placement has an estimate"
        return conductor_pb2.ScheduleResponse(
            prefill_instance_id=prefill.instance.instance_id,
            prefill_address=prefill.instance.address,
            decode_instance_id=decode.instance.instance_id,
            decode_address=decode.instance.address,
            num_cached_blocks=prefill.placement.num_cached_blocks,
            ttft_s=estimate.ttft_s,
            transfer_s=estimate.transfer_s,
            queue_s=estimate.queue_s,
            prefill_s=estimate.prefill_s,
            prompt=prompt_to(
                replace(prepared.prompt, node_addresses=prefill.placement.node_addresses)
            ),
        )

    async def Register(  # noqa: N802
        self, request: conductor_pb2.RegisterRequest, _context: Any
    ) -> conductor_pb2.RegisterResponse:
        """Takes an instance in."""
        registration = registration_from(request, model_name=self._model.name)
        self._scheduler.state.on_registered(
            registration, load_from(request.load), self._clock.now_s()
        )
        self._scheduler.nodes.want(registration.node_address)
        self._scheduler.directory.want(registration.node_address)
        self._scheduler.wake()
        log.info(
            "instance registered",
            instance=registration.instance_id,
            instance_role=registration.role,
            address=registration.address,
            node=registration.node_address,
            epoch=registration.epoch,
        )
        return conductor_pb2.RegisterResponse(report_interval_ms=to_ms(self._report_interval_s))

    async def Report(  # noqa: N802
        self, request: conductor_pb2.ReportRequest, _context: Any
    ) -> conductor_pb2.ReportResponse:
        """Takes a heartbeat."""
        state = self._scheduler.state
        version = state.version
        known = state.on_reported(
            request.instance_id,
            request.instance_epoch,
            load_from(request.load),
            draining=request.draining,
            now_s=self._clock.now_s(),
        )
        if state.version != version:
            self._scheduler.wake()
        return conductor_pb2.ReportResponse(known=known)


class AdminService(admin_pb2_grpc.AdminServicer):
    """ClusterStatus, Nodes, MatchPrompt."""

    def __init__(self, scheduler: Scheduler, model: ServedModel) -> None:
        """Answers for the cluster of `scheduler`."""
        self._scheduler = scheduler
        self._nodes: Nodes = scheduler.nodes
        self._model = model

    async def ClusterStatus(  # noqa: N802
        self, _request: admin_pb2.ClusterStatusRequest, _context: Any
    ) -> admin_pb2.ClusterStatusResponse:
        """Instances and counts."""
        counts = self._scheduler.state.counts()
        response = admin_pb2.ClusterStatusResponse(
            model_name=self._model.name,
            num_requests_running=counts.num_running,
            num_requests_finished=counts.num_finished,
            num_requests_refused=counts.num_refused,
            # To an operator a request that its user gave up is not finished either.
            num_requests_failed=counts.num_failed + counts.num_cancelled,
        )
        for address in self._node_addresses():
            self._set_knowledge(address, response.nodes.add())
        for instance in self._scheduler.view().instances:
            status = response.instances.add(
                instance_id=instance.instance_id,
                role=instance.role,
                address=instance.address,
                node_address=instance.node_address,
                state=instance.state.value,
                seconds_since_report=instance.seconds_since_report,
                block_size=instance.shape.block_size,
            )
            set_load(instance, status.load)
        return response

    async def Nodes(  # noqa: N802
        self, _request: admin_pb2.NodesRequest, _context: Any
    ) -> admin_pb2.NodesResponse:
        """Every node that an instance has named, asked now."""
        response = admin_pb2.NodesResponse()
        stats = [response.nodes.add(address=address) for address in self._node_addresses()]
        await asyncio.gather(*(self._ask(status) for status in stats))
        for status in stats:  # last, so that it is no older than the answers beside it
            self._set_knowledge(status.address, status.knowledge)
        return response

    async def MatchPrompt(  # noqa: N802
        self, request: admin_pb2.MatchPromptRequest, _context: Any
    ) -> admin_pb2.MatchPromptResponse:
        """What of a prompt is cached where."""
        token_ids = await self._prompt_tokens(request)
        shape = self._some_shape()
        keys = await self._scheduler.block_keys(token_ids, shape)
        hits: Sequence[NodeHit] = await self._scheduler.probe(shape, keys, timeout_s=NODE_TIMEOUT_S)
        return admin_pb2.MatchPromptResponse(
            num_tokens=len(token_ids),
            num_blocks=len(keys),
            block_size=shape.block_size,
            nodes=[
                admin_pb2.NodeMatch(
                    address=hit.address,
                    num_blocks=hit.num_blocks,
                    num_blocks_present=hit.num_blocks_present,
                    error=hit.error,
                )
                for hit in hits
            ],
        )

    def _node_addresses(self) -> list[str]:
        """Every node that an instance has named."""
        instances = self._scheduler.view().instances
        return sorted({each.node_address for each in instances if each.node_address})

    def _set_knowledge(self, address: str, message: admin_pb2.NodeKnowledge) -> None:
        known = self._scheduler.directory.knowledge(address)
        message.address = address
        message.state = known.sync.value
        message.num_blocks = known.num_blocks
        message.sequence = known.sequence
        message.node_epoch = known.node_epoch
        message.num_astray = known.num_astray
        if math.isfinite(known.seconds_since_message):
            message.seconds_since_message = known.seconds_since_message

    async def _ask(self, status: admin_pb2.NodeStatus) -> None:
        try:
            stat = await self._nodes.stat(status.address, timeout_s=NODE_TIMEOUT_S)
        except SnowskinError as error:
            status.error = str(error)
        else:
            reply_to(stat, status.stat)

    async def _prompt_tokens(self, request: admin_pb2.MatchPromptRequest) -> list[int]:
        if request.WhichOneof("prompt") == "text":
            return await asyncio.to_thread(self._model.tokenizer.encode, request.text)
        return token_ids_from(request.token_ids, vocab_size=self._model.vocab_size)

    def _some_shape(self) -> CacheShape:
        """The shape that requests are served with, or, for want of it, any instance's."""
        view = self._scheduler.view()
        shape = view.shape()
        if shape is None and view.instances:
            shape = view.instances[0].shape
        if shape is None:
            raise NoInstanceReady(
                "no instance has registered, so the block size is not known",
                hint="start one: snowskin prefill",
            )
        return shape
