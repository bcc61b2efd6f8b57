"""Logs: one line a fact, the request's id on it, nothing secret in it."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import sys

import pytest

from snowskin.kvstore.errors import BadSetting
from snowskin.kvstore.telemetry import bind_request, configure_logging, get_logger


@pytest.fixture
def logging_restored():
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    yield
    root.handlers[:], level = before
    root.setLevel(level)


@pytest.fixture
def configured(logging_restored):
    def configure(**options):
        stream = io.StringIO()
        configure_logging("node", stream=stream, **options)
        return lambda: stream.getvalue().splitlines()

    return configure


def test_a_fact_is_one_line_with_its_fields_in_order(configured):
    lines = configured()
    get_logger("snowskin.x").warning("lease expired", lease=7, extent="a b")
    (line,) = lines()
    time, rest = line.split(" ", 1)
    assert time.startswith("time=20")
    assert time.endswith("Z")
    assert rest.startswith('role=node level=warning event="lease expired" lease=7 extent="a b"')


def test_json_lines_carry_the_same(configured):
    lines = configured(json=True)
    get_logger("snowskin.x").info("published", num_blocks=3)
    (line,) = lines()
    record = json.loads(line)
    assert record.pop("time").endswith("Z")
    assert record == {
        "role": "node",
        "level": "info",
        "event": "published",
        "num_blocks": 3,
        "logger": "snowskin.x",
    }


async def test_the_request_id_is_on_every_line_of_its_context_and_no_other(configured):
    lines = configured(json=True)
    log = get_logger("snowskin.x")

    async def work(request_id):
        with bind_request(request_id):
            await asyncio.sleep(0)
            await asyncio.create_task(inner(request_id))

    async def inner(expected):
        log.info("inside", expected=expected)

    await asyncio.gather(work("r1"), work("r2"))
    log.info("outside")
    records = [json.loads(line) for line in lines()]
    assert sorted(r["request_id"] for r in records[:2]) == ["r1", "r2"]
    assert all(r["request_id"] == r["expected"] for r in records[:2])
    assert "request_id" not in records[2]


def test_lines_of_the_standard_library_look_the_same(configured):
    lines = configured()
    logging.getLogger("uvicorn.error").warning("port %d", 7)
    with bind_request("r1"):
        logging.getLogger("elsewhere").info("hello", extra={"num_blocks": 2})
    first, second = lines()
    assert 'role=node level=warning event="port 7"' in first
    assert "event=hello request_id=r1" in second
    assert "num_blocks=2" in second


def test_chatty_libraries_are_quiet_below_debug(configured):
    lines = configured(level="info")
    logging.getLogger("uvicorn.access").info("GET /")
    assert lines() == []
    configured(level="debug")
    assert logging.getLogger("uvicorn.access").isEnabledFor(logging.INFO)


def test_lines_below_the_level_are_not_written(configured):
    lines = configured(level="warning")
    get_logger("snowskin.x").info("not now")
    assert lines() == []


@pytest.mark.parametrize("key", ["prompt", "token", "authorization", "cache_salt", "token_ids"])
def test_secrets_and_prompts_are_never_written(configured, key):
    lines = configured()
    get_logger("snowskin.x").info("asked", **{key: "hush", "num_tokens": 4})
    (line,) = lines()
    assert "hush" not in line
    assert f'{key}="[not logged]"' in line
    assert "num_tokens=4" in line


@pytest.mark.parametrize("text", ["a\nlevel=error event=forged", "a\r\x1b[2Jb", "a\u2028b"])
def test_a_value_cannot_forge_a_line_or_steer_a_terminal(configured, text):
    lines = configured()
    get_logger("snowskin.x").info("asked", model=text)
    (line,) = lines()
    assert line.isprintable()


def test_an_exception_stays_on_its_line(configured):
    lines = configured()
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        get_logger("snowskin.x").exception("task died")
    (line,) = lines()
    assert "RuntimeError: broken" in line
    assert "level=error" in line


def test_an_unknown_level_is_refused():
    with pytest.raises(BadSetting, match="one of debug, info, warning, error"):
        configure_logging("node", level="loud")


def test_unconfigured_logging_writes_nothing_to_stdout(logging_restored, capsys):
    logging.getLogger().handlers[:] = []
    get_logger("snowskin.y").error("a fact")
    assert capsys.readouterr().out == ""


def test_stderr_is_the_default(logging_restored, capsys, monkeypatch):
    configure_logging("node")
    get_logger("snowskin.x").info("here")
    assert "event=here" in capsys.readouterr().err
    (handler,) = logging.getLogger().handlers
    assert isinstance(handler, logging.StreamHandler)
    assert handler.stream is sys.stderr
