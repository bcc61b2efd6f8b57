"""A tiny model, its straight generation, and instances over one store: what engine tests start from."""

from __future__ import annotations

import asyncio
import functools
import tempfile
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from snowskin.engines.decode import DecodeInstance
from snowskin.engines.limits import EngineLimits
from snowskin.engines.link import StoreLink
from snowskin.engines.messages import CachePolicy, DecodeStart, PrefillRequest, Prompt
from snowskin.engines.model.kv_memory import KvMemory
from snowskin.engines.model.llama import LlamaModel, Span, load_model
from snowskin.engines.model.random_model import make_random_model
from snowskin.engines.model.sampler import SamplingParams, sample
from snowskin.engines.nodes import NodeLinks
from snowskin.engines.prefill import PrefillInstance
from snowskin.engines.runner import ModelRunner
from snowskin.kvstore.blocks import KeyColumn, block_hashes
from snowskin.kvstore.errors import NodeUnavailable

NAMESPACE = b"n" * 32
BLOCK_SIZE = 4
CHUNK_TOKENS = 16


@functools.cache
def model_directory(architecture: str = "llama") -> Path:
    """A random model of two layers, made once a process and gone with it.

    Heads of all but the first architecture are larger than their share of the hidden size.
    """
    directory = Path(_directory().name) / architecture
    make_random_model(
        directory,
        layers=2,
        hidden=64,
        heads=4,
        kv_heads=2,
        head_dim=16 if architecture == "llama" else 24,
        intermediate=128,
        max_position=512,
        architecture=architecture,
    )
    return directory


@functools.cache
def _directory() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="snowskin-test-model-", ignore_cleanup_errors=True)


def new_model(architecture: str = "llama") -> LlamaModel:
    return load_model(model_directory(architecture))


def prompt_tokens(num_tokens: int, seed: int = 0) -> list[int]:
    """Printable bytes, other ones for each seed."""
    return [int(token) for token in np.random.default_rng(seed).integers(32, 127, num_tokens)]


def straight(
    token_ids: list[int],
    sampling: SamplingParams,
    max_length: int = 512,
    architecture: str = "llama",
) -> list[int]:
    """The answer of the model alone: one prefill, then token by token."""
    model = _reference(architecture)
    memory = KvMemory(model.config, -(-512 // BLOCK_SIZE), BLOCK_SIZE)
    block_ids = memory.allocate(memory.num_blocks)
    known, answer, start = list(token_ids), [], 0
    while True:
        span = Span(token_ids=known[start:], start=start, block_ids=block_ids)
        start = len(known)
        token = sample(model.forward([span], memory)[0], sampling, len(known)).token_id
        known.append(token)
        answer.append(token)
        if token in sampling.stop_token_ids or len(answer) == sampling.max_tokens:
            return answer
        if len(known) == max_length:
            return answer


@functools.cache
def _reference(architecture: str = "llama") -> LlamaModel:
    return new_model(architecture)


def make_prompt(
    token_ids,
    *,
    policy=CachePolicy.READ_WRITE,
    salt="",
    block_size=BLOCK_SIZE,
    namespace=NAMESPACE,
    nodes=(),
) -> Prompt:
    hashes = block_hashes(token_ids, block_size, cache_salt=salt or None)
    return Prompt(
        token_ids=tuple(token_ids),
        block_keys=KeyColumn.of(hashes),
        namespace=namespace,
        cache_policy=policy,
        node_addresses=tuple(nodes),
    )


def make_limits(**changes) -> EngineLimits:
    limits = EngineLimits(
        namespace=NAMESPACE,
        vocab_size=_reference().config.vocab_size,
        block_size=BLOCK_SIZE,
        max_context_tokens=512,
        chunk_tokens=CHUNK_TOKENS,
    )
    return replace(limits, **changes)


async def until(condition, timeout_s=10.0) -> None:
    """Returns when `condition()` holds; other tasks run in between."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  many conditions have no event of their own
            await asyncio.sleep(0.0005)


@dataclass
class Answer:
    """What a decode told."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    stats: object = None

    async def emit(self, output) -> None:
        self.token_ids += output.token_ids
        if output.finish_reason:
            assert not self.finish_reason, "the end is told once"
            self.finish_reason, self.stats = output.finish_reason, output.stats


@dataclass
class Bench:
    """One prefill and one decode instance, each with a memory of its own, over one store."""

    prefill: PrefillInstance
    decode: DecodeInstance
    prefill_runner: ModelRunner
    decode_runner: ModelRunner
    prefill_link: StoreLink
    decode_link: StoreLink

    def num_free(self) -> tuple[int, int]:
        return self.prefill_runner.memory.num_free, self.decode_runner.memory.num_free

    def all_free(self) -> bool:
        self.prefill_runner.memory.check()
        self.decode_runner.memory.check()
        return self.num_free() == (
            self.prefill_runner.memory.num_blocks,
            self.decode_runner.memory.num_blocks,
        )

    async def run_prefill(self, prompt, sampling, request_id="r"):
        return await self.prefill.prefill(
            PrefillRequest(request_id=request_id, prompt=prompt, sampling=sampling)
        )

    async def run_decode(
        self, prompt, sampling, handoff, request_id="r", answer=None, timeout_s=20.0
    ):
        answer = answer or Answer()
        future = handoff
        if not isinstance(handoff, asyncio.Future):
            future = asyncio.get_running_loop().create_future()
            future.set_result(handoff)
        start = DecodeStart(
            request_id=request_id, prompt=prompt, sampling=sampling, handoff_timeout_s=timeout_s
        )
        await self.decode.decode(start, future, answer.emit)
        return answer

    async def run(
        self, token_ids, sampling, *, request_id="r", policy=CachePolicy.READ_WRITE, nodes=()
    ):
        """Both at once, as the conductor does; all tokens, prefill's answer, decode's answer."""
        salt = request_id if policy is CachePolicy.OFF else ""
        prompt = make_prompt(token_ids, policy=policy, salt=salt, nodes=nodes)
        handoff = asyncio.get_running_loop().create_future()

        async def prefilled():
            response = await self.run_prefill(prompt, sampling, request_id)
            handoff.set_result(response.handoff)
            return response

        response, answer = await asyncio.gather(
            prefilled(), self.run_decode(prompt, sampling, handoff, request_id)
        )
        return [response.handoff.first_token_id, *answer.token_ids], response, answer


@asynccontextmanager
async def open_bench(
    connect,
    *,
    connect_decode=None,
    num_blocks=256,
    limits=None,
    wait=True,
    architecture="llama",
):
    """Instances over the store that `connect` reaches; both links are up if `wait`.

    The store's address is `node-0`; where decode has one of its own, that is `node-1`.
    """
    limits = limits or make_limits()
    connects = {"node-0": connect, "node-1": connect_decode}
    own_addresses = ["node-0", "node-1" if connect_decode else "node-0"]
    async with AsyncExitStack() as stack:
        runners, links, nodes, tasks = [], [], [], []
        for own_address in own_addresses:
            model = new_model(architecture)
            memory = KvMemory(model.config, num_blocks, limits.block_size)
            runners.append(await stack.enter_async_context(ModelRunner(model, memory)))

            def link_to(address, memory=memory):
                return StoreLink(
                    connects.get(address) or refuse,
                    memory.host_view(),
                    namespace=limits.namespace,
                    block_nbytes=memory.block_nbytes,
                )

            links.append(link_to(own_address))
            nodes.append(NodeLinks(links[-1], own_address=own_address, link_to=link_to))
            stack.push_async_callback(nodes[-1].close)
            tasks.append(asyncio.create_task(links[-1].run()))
        prefill = PrefillInstance(runners[0], nodes[0], limits)
        decode = DecodeInstance(runners[1], nodes[1], limits)
        tasks.append(asyncio.create_task(decode.run()))
        try:
            if wait:
                async with asyncio.timeout(5):
                    for link in links:
                        await link.wait_connected()
            yield Bench(prefill, decode, runners[0], runners[1], links[0], links[1])
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


async def refuse():
    raise NodeUnavailable("no node has this address")
