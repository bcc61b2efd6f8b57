"""`snowskin demo`: the main job from end to end, shown, measured and checked.

Rules kept here: real processes, real sockets, a real transformer. Each turn of one conversation runs with the cache
and without it; the tokens of both are then held against the same model in one piece, after the cluster is gone. With
several engines of a kind, as many users then read the document at once: each engine works, and with several nodes the
document comes to all of them. The exit status is 0 only if the tokens agree; the goals are said, held or missed, and
count too with `--strict`. Ctrl-C at any moment leaves nothing.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click
import httpx
from rich.console import Console

from snowskin.kvstore.config import LogLevel, options, setting
from snowskin.kvstore.errors import BadSetting
from snowskin.kvstore.telemetry import configure_logging
from snowskin.tools.bench.report import table_of
from snowskin.tools.cluster.chat import Answer, stream_chat
from snowskin.tools.cluster.demo_inputs import (
    QUESTIONS,
    Message,
    cut_document,
    first_message,
    make_model,
    next_turn,
    read_document,
    readers_message,
)
from snowskin.tools.cluster.demo_report import (
    Spread,
    Turn,
    make_report,
    ratio_line,
    requests_table,
)
from snowskin.tools.cluster.errors import RequestFailed
from snowskin.tools.cluster.interrupts import Interrupted, run_interruptible
from snowskin.tools.cluster.local import LocalCluster
from snowskin.tools.cluster.up_settings import UpSettings
from snowskin.tools.kvctl.admin import AdminClient
from snowskin.transport.errors import SnowskinError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from snowskin.engines.model.tokenizer import Tokenizer
    from snowskin.tools.cluster.monolith import Agreement

MIN_KV_MEMORY_NBYTES = 256 << 20
MIN_DRAM_NBYTES = 512 << 20
REQUEST_TIMEOUT_S = 300.0
ADMIN_TIMEOUT_S = 5.0
PIPE_COLUMNS = 150
# Left for questions and template, beyond the document and the answers.
SPARE_TOKENS = 512

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What the demonstration runs on."""

    model: str = setting("", help="Model directory; without one, a random model is made.")
    nodes: int = setting(1, help="Store nodes; engines are spread over them.")
    prefill: int = setting(1, help="Prefill engines.")
    decode: int = setting(1, help="Decode engines.")
    strict: bool = setting(False, help="Exit status 1 also where a goal is missed.")
    tokens: int = setting(48, help="Tokens to generate in each turn.")
    prompt_tokens: int = setting(4000, help="Tokens of the first prompt, at most.")
    prompt_file: Path | None = setting(None, help="Text of the first prompt.")
    json: Path | None = setting(None, help="Write the report here, as every benchmark does.")
    threads: int = setting(0, help="Compute threads of each engine; 0: cores / engines.")
    log_level: LogLevel = setting("warning", help="Least level that all processes log.")

    def __post_init__(self) -> None:
        """Refuses what cannot work."""
        for name, least in (
            *(("nodes", 1), ("prefill", 1), ("decode", 1)),
            *(("tokens", 1), ("prompt_tokens", 64), ("threads", 0)),
        ):
            if getattr(self, name) < least:
                raise BadSetting(f"{name} is {getattr(self, name)}", hint=f"give {least} or more")

    @property
    def num_readers(self) -> int:
        """Users who read the document at once, one for each engine of a kind; none where that is one."""
        count = max(self.prefill, self.decode)
        return count if count > 1 else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request that was sent, and what came back."""

    what: str
    messages: Sequence[Message]
    answer: Answer


class Screen:
    """Progress for a person: steps with their time, streamed text, tables."""

    def __init__(self) -> None:
        """Writes to stdout; tables are wide where that is no terminal."""
        console = Console(highlight=False)
        self.console = console if console.is_terminal else Console(width=PIPE_COLUMNS)
        self._began_s = time.monotonic()

    def step(self, text: str) -> None:
        """One line of progress."""
        print(f"[{time.monotonic() - self._began_s:5.1f} s] {text}", flush=True)

    @staticmethod
    def stream(text: str) -> None:
        """A piece of generated text, as it arrives."""
        print(text, end="", flush=True)

    @staticmethod
    def line(text: str = "") -> None:
        """A whole line."""
        print(text, flush=True)


async def _in_thread(work: Callable[[Callable[[], bool]], Result]) -> Result:
    """Runs `work(is_cancelled)` in a thread; a cancellation waits until it has noticed."""
    cancelled = threading.Event()
    running = asyncio.ensure_future(asyncio.to_thread(work, cancelled.is_set))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        cancelled.set()
        await asyncio.wait((running,))
        running.exception()  # seen: it ended because we asked
        raise


def _prepare(settings: DemoSettings, screen: Screen) -> tuple[Path, Tokenizer, UpSettings]:
    """The model, made if need be, and a cluster that has room for the conversation."""
    from snowskin.engines.model.config import ModelConfig
    from snowskin.engines.model.tokenizer import Tokenizer

    directory = Path(settings.model) if settings.model else make_model(screen.step)
    screen.step(f"model: {directory}")
    tokenizer = Tokenizer(directory)
    config = ModelConfig.from_directory(directory)
    defaults = UpSettings(model=str(directory), http_port=0)
    num_tokens = settings.prompt_tokens + len(QUESTIONS) * settings.tokens + SPARE_TOKENS
    if num_tokens > config.max_position:
        raise BadSetting(
            f"the conversation needs up to {num_tokens} tokens, the model takes {config.max_position}",
            hint="give less with --prompt-tokens or --tokens",
        )
    block_size = defaults.block_size
    block_nbytes = config.kv_block_nbytes(block_size=block_size, itemsize=4)
    needed_nbytes = (num_tokens // block_size + 1) * block_nbytes
    up = UpSettings(
        model=str(directory),
        nodes=settings.nodes,
        prefill=settings.prefill,
        decode=settings.decode,
        http_port=0,
        threads=settings.threads,
        kv_memory_nbytes=max(MIN_KV_MEMORY_NBYTES, 2 * needed_nbytes),
        dram_nbytes=max(MIN_DRAM_NBYTES, 4 * needed_nbytes),
        log_level=settings.log_level,
    )
    return directory, tokenizer, up


async def _converse(
    settings: DemoSettings, screen: Screen, client: httpx.AsyncClient, model: str, first: Message
) -> tuple[list[Turn], list[Asked]]:
    """All turns, each with the cache and then without."""
    messages = [first]
    turns: list[Turn] = []
    asked: list[Asked] = []
    for number in range(1, len(QUESTIONS) + 1):
        answers: list[Answer] = []
        for use_cache in (True, False):
            what = f"turn {number}, cache {'on' if use_cache else 'off'}"
            screen.step(f"{what}: {QUESTIONS[number - 1]}")
            answer = await stream_chat(
                client,
                model,
                messages,
                max_tokens=settings.tokens,
                use_cache=use_cache,
                on_text=screen.stream,
            )
            screen.line()
            answers.append(answer)
            asked.append(Asked(what=what, messages=messages, answer=answer))
        turns.append(Turn(number=number, cached=answers[0], uncached=answers[1]))
        if number < len(QUESTIONS):
            messages = next_turn(messages, answers[0].text, number)
    return turns, asked


async def _read_at_once(
    settings: DemoSettings, client: httpx.AsyncClient, model: str, document: str
) -> list[Asked]:
    """Several users ask about the same document at the same time, each with the cache."""
    prompts = [[readers_message(document, number)] for number in range(settings.num_readers)]
    reading = [
        asyncio.create_task(
            stream_chat(client, model, prompt, max_tokens=settings.tokens, use_cache=True)
        )
        for prompt in prompts
    ]
    try:
        answers = await asyncio.gather(*reading)
    finally:
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
    return [
        Asked(what=f"reader {number}", messages=prompt, answer=answer)
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), 1)
    ]


def _shared(prompts: Sequence[Sequence[int]]) -> list[int]:
    """What all prompts begin with: the document, and not the questions behind it."""
    columns = zip(*prompts, strict=False)
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]


async def _num_holding(cluster: LocalCluster, prompt_token_ids: Sequence[int]) -> int:
    """Nodes that hold all full blocks of a prompt."""
    async with AdminClient(cluster.conductor_address, timeout_s=ADMIN_TIMEOUT_S) as admin:
        match = await admin.match_prompt(prompt_token_ids)
    return sum(node.num_blocks == match.num_blocks for node in match.nodes)


async def _ask_all(
    settings: DemoSettings,
    screen: Screen,
    cluster: LocalCluster,
    document: str,
    tokenizer: Tokenizer,
) -> tuple[list[Turn], Spread | None, list[Asked]]:
    """The conversation, and, where there are several engines of a kind, the readers after it."""
    first = first_message(document)
    async with httpx.AsyncClient(
        base_url=f"http://{cluster.http_address}", timeout=REQUEST_TIMEOUT_S, trust_env=False
    ) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        turns, asked = await _converse(settings, screen, client, model, first)
        if not settings.num_readers:
            return turns, None, asked
        screen.step(f"{settings.num_readers} users ask about the document at the same time")
        readers = await _read_at_once(settings, client, model, document)
    prompts = [tokenizer.encode_chat(each) for each in ([first], *(r.messages for r in readers))]
    spread = Spread(
        answers=tuple(reader.answer for reader in readers),
        num_holding=await _num_holding(cluster, _shared(prompts)),
        num_nodes=settings.nodes,
    )
    return turns, spread, asked + readers


def _compare(
    directory: Path,
    tokenizer: Tokenizer,
    asked: Sequence[Asked],
    is_cancelled: Callable[[], bool],
) -> list[tuple[str, Agreement]]:
    """Holds every answer against the model in one piece; equal answers to one prompt are one comparison."""
    from snowskin.tools.cluster.monolith import Monolith

    monolith = Monolith(directory)
    compared: list[tuple[str, Agreement]] = []
    known: dict[tuple[tuple[int, ...], tuple[int, ...]], Agreement] = {}
    for one in asked:
        prompt_token_ids, answer = tuple(tokenizer.encode_chat(one.messages)), one.answer
        if answer.num_prompt_tokens != len(prompt_token_ids):
            raise SnowskinError(
                f"{one.what}: the cluster counted {answer.num_prompt_tokens} prompt tokens, "
                f"the tokenizer {len(prompt_token_ids)}"
            )
        pair = (prompt_token_ids, answer.token_ids)
        if pair not in known:
            known[pair] = monolith.compare(
                prompt_token_ids,
                answer.token_ids,
                stopped=answer.finish_reason == "stop",
                end_token_ids=tokenizer.eos_token_ids,
                is_cancelled=is_cancelled,
            )
        compared.append((one.what, known[pair]))
    return compared


def _verdict(
    settings: DemoSettings,
    screen: Screen,
    turns: Sequence[Turn],
    spread: Spread | None,
    compared: Sequence[tuple[str, Agreement]],
) -> int:
    """Tables, report and verdict; the exit status."""
    num_wrong = sum(agreement.num_wrong for _, agreement in compared)
    num_rounding = sum(agreement.num_rounding for _, agreement in compared)
    num_tokens = sum(agreement.num_tokens for _, agreement in compared)
    report = make_report(turns, num_wrong=num_wrong, num_rounding=num_rounding, spread=spread)
    screen.line()
    screen.console.print(requests_table(turns, spread))
    screen.console.print(table_of(report))
    for what, agreement in compared:
        for difference in agreement.differences:
            kind = "rounding" if difference.is_rounding else "WRONG"
            screen.line(f"{what}: {kind}: {difference}")
    if settings.json is not None:
        report.write(settings.json)
    screen.line(ratio_line(report))
    if num_wrong:
        screen.line(f"FAILED: {num_wrong} of {num_tokens} tokens are not the model's own.")
        return 1
    if settings.strict and report.missed:
        names = "; ".join(f"{row.name} ({row.goal})" for row in report.missed)
        screen.line(f"FAILED: the tokens are right, but missed: {names}.")
        return 1
    screen.line(
        f"OK: {num_tokens} tokens, cache on and off, equal those of the model in one piece"
        + (f" ({num_rounding} by rounding)." if num_rounding else ".")
    )
    return 0


async def _demo(settings: DemoSettings) -> int:
    screen = Screen()
    document = read_document(settings.prompt_file)
    directory, tokenizer, up = await _in_thread(lambda _is_cancelled: _prepare(settings, screen))
    document = await _in_thread(
        lambda _is_cancelled: cut_document(
            document, settings.prompt_tokens, lambda messages: len(tokenizer.encode_chat(messages))
        )
    )
    screen.step(
        f"cluster: conductor, {up.nodes} store node(s), {up.prefill} prefill and {up.decode} decode, "
        f"{up.threads_per_engine} thread(s) each"
    )
    async with LocalCluster(up) as cluster:
        facts = ", ".join(
            f"{process.name} (pid {process.pid})" for process in cluster.processes.values()
        )
        screen.step(f"ready: {facts}")
        try:
            turns, spread, asked = await _ask_all(settings, screen, cluster, document, tokenizer)
        except RequestFailed:
            for process in cluster.processes.values():  # their logs go with the cluster
                for line in process.tail():
                    screen.line(f"{process.name}: {line}")
            raise
        screen.step("stopping the cluster")
    screen.step("the same prompts through the model in one piece")
    compared = await _in_thread(
        lambda is_cancelled: _compare(directory, tokenizer, asked, is_cancelled)
    )
    screen.step("compared")
    return _verdict(settings, screen, turns, spread, compared)


@click.command(
    epilog="""
\b
Examples:
  snowskin demo
  snowskin demo --nodes 2 --prefill 2 --decode 2 --strict
  snowskin demo --tokens 16 --prompt-tokens 1000
  snowskin demo --model models/Qwen3-0.6B --json demo.json
"""
)
@options(DemoSettings, table="demo")
@click.pass_context
def demo(ctx: click.Context, settings: DemoSettings) -> None:
    """The main job, shown and checked: prefill, store, decode, token for token.

    Starts a store node, a conductor, a prefill and a decode engine as processes on loopback; sends a long prompt and
    two follow-up turns of the same conversation, each with the cache on and off; prints times, blocks and bytes; and
    compares every token with the same model in one piece. With several engines of a kind as many users then ask about
    the same document at once. Exit status 0 only if the tokens agree, and with --strict if the goals hold too.
    """
    configure_logging("demo", level=settings.log_level)
    # Before torch is imported: OpenMP threads that spin while they wait steal the engines' cores.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    try:
        status = run_interruptible(_demo(settings))
    except Interrupted as interrupted:
        status = 128 + interrupted.number
        print(f"\nsnowskin demo: {interrupted}: stopped, nothing is left behind", file=sys.stderr)
    except SnowskinError as error:
        print(f"\nsnowskin demo: {error}", file=sys.stderr)
        status = 2 if error.status in ("INVALID_ARGUMENT", "NOT_FOUND") else 1
    ctx.exit(status)
