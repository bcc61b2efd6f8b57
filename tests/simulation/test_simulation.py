"""Thousands of small worlds, each from its seed; and what makes believable that they would show a bug.

A failure names the seed, and the command that shows its run step by step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.simulation.plants import NAMED, OTHERS
from tests.simulation.runs import RunSummary, replay_command, run_seed, run_seeds
from tests.support.results import VARIABLE, write_result

HERE = Path(__file__).parent
NUM_SEEDS, NUM_STEPS = 300, 500
LONG_SEEDS, LONG_STEPS, LONG_S = 10_000, 1_000, 1_200.0
# What the runs must have come to, or they prove nothing of it.
REACHED = (
    "answers that came too late",
    "blocks pulled",
    "blocks refused by checksum",
    "calls past their deadline",
    "calm runs",
    "clients cut off with room",
    "clients frozen",
    "clients killed",
    "commits refused as late",
    "hints taken back",
    "instances asked to register again",
    "instances forgotten",
    "late holders told so",
    "leases of an earlier epoch",
    "messages doubled",
    "messages lost",
    "messages split",
    "node: blocks_corrupt",
    "node: blocks_evicted",
    "node: matches_cut",
    "nodes frozen",
    "nodes killed",
    "operations cancelled",
    "processes frozen in a copy",
    "prompts computed again by decode",
    "quarantines",
    "queue waits",
    "read leases expired",
    "refused: LEASE_SHARE_EXCEEDED",
    "refused: POOL_EXHAUSTED",
    "refused: QUARANTINE_SHARE_EXCEEDED",
    "releases by board",
    "renewals",
    "requests finished",
    "requests refused",
    "requests with hits",
    "resyncs by sequence",
    "resyncs by snapshot",
    "roles frozen",
    "roles killed",
    "stages tried elsewhere",
    "unmapped write leases expired",
    "users who hung up",
    "views in sync",
    "waiting calls cancelled",
    "watchers dropped",
    "watches cut",
)


def told(summary: RunSummary) -> str:
    """Each violation, and how to see it again."""
    return "\n".join(
        f"seed {each.seed}, step {each.step}: {each.message}\n    {replay_command(each)}"
        for each in summary.violations
    )


def kept_seeds() -> list[tuple[int, int]]:
    lines = (
        line.partition("#")[0].split() for line in (HERE / "seeds.txt").read_text().splitlines()
    )
    return [(int(words[0]), int(words[1])) for words in lines if words]


@pytest.mark.timeout(120)
def test_no_rule_is_broken_and_every_trouble_is_met():
    began_at_s = time.monotonic()
    summary = run_seeds(0, NUM_SEEDS, NUM_STEPS)
    seconds = time.monotonic() - began_at_s
    print(f"seeds 0 to {NUM_SEEDS - 1}: {summary.num_steps} steps in {seconds:.1f} s")
    assert not summary.violations, told(summary)
    unmet = [name for name in REACHED if not summary.seen[name]]
    assert not unmet, f"not once in {NUM_SEEDS} seeds: {unmet}"
    assert summary.num_steps >= NUM_SEEDS * 200


@pytest.mark.parametrize(("seed", "num_steps"), kept_seeds())
def test_seed_that_once_broke_a_rule(seed, num_steps):
    summary = run_seed(seed, num_steps)
    assert not summary.violations, told(summary)


@pytest.mark.soak
@pytest.mark.timeout(1_500)
def test_no_rule_is_broken_in_ten_thousand_worlds():
    began_at_s = time.monotonic()
    summary = run_seeds(
        0,
        LONG_SEEDS,
        LONG_STEPS,
        num_processes=len(os.sched_getaffinity(0)),
        deadline_s=began_at_s + LONG_S,
    )
    seconds = time.monotonic() - began_at_s
    write_result(
        "simulation",
        num_seeds=summary.num_seeds,
        num_steps_of_trouble_each=LONG_STEPS,
        num_steps=summary.num_steps,
        num_violations=len(summary.violations),
        seconds=round(seconds, 1),
        seen=dict(sorted(summary.seen.items())),
    )
    assert not summary.violations, told(summary)
    assert summary.num_seeds == LONG_SEEDS, f"only {summary.num_seeds} seeds in {seconds:.0f} s"


def test_numbers_of_a_long_run_are_written_only_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert write_result("long", num_seeds=3) is None
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    path = write_result("long", num_seeds=3)
    assert path == tmp_path / "long.json"
    content = json.loads(path.read_text())
    assert (content["test"], content["num_seeds"]) == ("long", 3)
    assert content["host"]["num_cores"] >= 1


# --- what it would find


def first_violation(plant, monkeypatch, max_seeds: int) -> RunSummary | None:
    plant(monkeypatch)
    for seed in range(max_seeds):
        summary = run_seed(seed, NUM_STEPS, checks_books=False)
        if summary.violations:
            return summary
    return None


@pytest.mark.parametrize("name", [*NAMED, *OTHERS])
def test_planted_bug_is_found(name, monkeypatch):
    plant, max_seeds = (NAMED | OTHERS)[name]
    found = first_violation(plant, monkeypatch, max_seeds)
    assert found is not None, f"{name} was not found in {max_seeds} seeds"
    print(f"{name}: {told(found)}")


def test_five_kinds_of_bugs_are_planted():
    assert list(NAMED) == [
        "lost release",
        "double free",
        "commit after expiry",
        "eviction under a lease",
        "stale generation",
    ]


def test_replay_shows_the_same_violation_after_no_more_steps_than_it_takes(monkeypatch):
    plant, max_seeds = NAMED["stale generation"]
    found = first_violation(plant, monkeypatch, max_seeds)
    assert found is not None
    (broken,) = found.violations
    lines: list[str] = []
    again = run_seed(broken.seed, broken.num_steps, checks_books=False, print_line=lines.append)
    assert [(each.step, each.message) for each in again.violations] == [
        (broken.step, broken.message)
    ]
    assert f"{broken.step:5d}" in lines[-1][:6], "the trace ends with the step that broke the rule"
    assert f"--from {broken.seed} --steps {broken.num_steps}" in replay_command(broken)


def test_seed_is_a_run_whatever_process_runs_it():
    here = [run_seed(seed, 200).digests[seed] for seed in range(8)]
    program = (
        "from tests.simulation.runs import run_seed\n"
        "print([run_seed(seed, 200).digests[seed] for seed in range(7, -1, -1)])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(HERE.parent.parent)}
    other = subprocess.run(
        [sys.executable, "-c", program],
        cwd=HERE.parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == str(here[::-1])
