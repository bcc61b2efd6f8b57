"""`snowskin demo` as a user runs it, on a small model: to its end, and interrupted."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys

import psutil
import pytest

from tests.support.tiny_model import make_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

DEMO_SEED = 77
STOP_TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def runtime_dir(tmp_path_factory, monkeypatch):
    place = tmp_path_factory.mktemp("run")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
    return place


@pytest.fixture
def prompt_file(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("It was a bright cold day in April, and the clocks were striking. " * 40)
    return path


def start_demo(model, prompt_file, *flags):
    return subprocess.Popen(
        [sys.executable, "-m", "snowskin.tools.cluster.main", "demo", "--model", str(model),
         "--prompt-file", str(prompt_file), "--tokens", "12", "--prompt-tokens", "1000", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def processes_of(supervisor_pid):
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "--parent-pid" in words and words[words.index("--parent-pid") + 1] == str(
            supervisor_pid
        ):
            found.append(process)
    return found


def test_it_shows_the_main_job_and_its_tokens_agree(model, prompt_file, runtime_dir, tmp_path):
    report_path = tmp_path / "report.json"
    with start_demo(model, prompt_file, "--json", str(report_path)) as demo:
        out, _ = demo.communicate(timeout=150)
    assert demo.returncode == 0, out
    assert "OK: 72 tokens, cache on and off, equal those of the model in one piece." in out
    report = json.loads(report_path.read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["tokens unlike the model in one piece"]["value"] == 0
    assert [row["goal"] for name, row in rows.items() if name.startswith("TTFT")] == [
        None,
        "ratio <= 0.3",
        "ratio <= 0.3",
    ]
    assert processes_of(demo.pid) == []
    assert list(runtime_dir.iterdir()) == []


@pytest.mark.parametrize("index", range(4))
def test_ctrl_c_at_any_moment_leaves_nothing(model, prompt_file, runtime_dir, index):
    seed = DEMO_SEED + index
    after_s = random.Random(seed).uniform(0.0, 9.0)
    with start_demo(model, prompt_file) as demo:
        try:
            demo.wait(timeout=after_s)
        except subprocess.TimeoutExpired:
            os.killpg(demo.pid, signal.SIGINT)
        out, _ = demo.communicate(timeout=STOP_TIMEOUT_S)
    what = f"SIGINT after {after_s:.3f} s (seed {seed}): {out}"
    assert demo.returncode in (0, 130, -signal.SIGINT, 1), what
    assert processes_of(demo.pid) == [], what
    assert list(runtime_dir.iterdir()) == [], what
