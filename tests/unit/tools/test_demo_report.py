"""The numbers of the demonstration."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from snowskin.tools.cluster.chat import Answer
from snowskin.tools.cluster.demo_report import (
    Spread,
    Traffic,
    Turn,
    make_report,
    ratio_line,
    requests_table,
)

STATS = {
    "prefill": {
        "num_blocks_published": 10, "num_blocks_pulled": 1, "published_nbytes": 10 << 20,
        "pulled_nbytes": 1 << 20, "pull_s": 0.25,
    },
    "decode": {"num_blocks_pulled": 11, "pulled_nbytes": 11 << 20, "pull_s": 0.5},
}  # fmt: skip


def answer(ttft_s, *, num_cached_tokens=0, gaps_s=(0.01, 0.02, 0.03)):
    return Answer(
        text="t",
        token_ids=(1, 2, 3, 4),
        finish_reason="length",
        num_prompt_tokens=4000,
        num_cached_tokens=num_cached_tokens,
        ttft_s=ttft_s,
        gaps_s=gaps_s,
        stats=STATS,
    )


def turns(*ttfts):
    return [
        Turn(number=number, cached=answer(on, num_cached_tokens=3984), uncached=answer(off))
        for number, (on, off) in enumerate(ttfts, start=1)
    ]


def test_traffic_is_that_of_both_engines_together():
    traffic = Traffic.of(STATS)
    assert (traffic.num_blocks_published, traffic.num_blocks_pulled) == (10, 12)
    assert (traffic.published_nbytes, traffic.pulled_nbytes) == (10 << 20, 12 << 20)
    assert traffic.pull_s == 0.75
    assert Traffic.of({}).num_blocks_pulled == 0


def test_the_goal_is_asked_of_later_turns_only():
    held = make_report(turns((4, 4), (0.3, 4), (1.2, 4)), num_wrong=0, num_rounding=0)
    assert [row.goal for row in held.rows[:3]] == [None, "ratio <= 0.3", "ratio <= 0.3"]
    assert held.missed == ()
    assert "0.075 and 0.300 (goal <= 0.3: held)" in ratio_line(held)
    missed = make_report(turns((4, 4), (0.3, 4), (2, 4)), num_wrong=0, num_rounding=0)
    assert "MISSED" in ratio_line(missed)


def test_wrong_tokens_miss_their_goal_and_rounding_has_none():
    report = make_report(turns((4, 4)), num_wrong=1, num_rounding=2)
    assert [row.name for row in report.missed] == ["tokens unlike the model in one piece"]
    assert report.rows[-1].value == 2


def test_every_request_has_a_line_with_its_numbers():
    out = io.StringIO()
    Console(file=out, width=150).print(requests_table(turns((4, 4), (0.3, 4))))
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert ["2", "on", "0.300", "s", "20.0", "ms", "4,000", "3,984", "10", "12", "10.0", "12.0",
            "750.0", "ms"] in lines  # fmt: skip


def test_an_answer_of_one_token_has_no_tbt():
    single = answer(1.0, gaps_s=())
    assert single.tbt_s == 0.0
    report = make_report(
        [Turn(number=1, cached=single, uncached=single)], num_wrong=0, num_rounding=0
    )
    assert not any(row.name.startswith("TBT") for row in report.rows)


def test_a_spread_adds_its_readers_and_the_goal_that_every_node_holds_the_document():
    asked = turns((4, 4), (0.3, 4), (0.3, 4))
    spread = Spread(answers=(answer(0.5), answer(0.7)), num_holding=2, num_nodes=2)
    for num_holding, missed in ((1, ["nodes that hold the document"]), (2, [])):
        spread = replace(spread, num_holding=num_holding)
        report = make_report(asked, num_wrong=0, num_rounding=0, spread=spread)
        assert [row.name for row in report.missed] == missed
        readers = [row for row in report.rows if "reader" in row.name]
        assert [row.ratio for row in readers] == [0.125, 0.175]
        assert "0.075 and 0.075 (goal <= 0.3: held)" in ratio_line(report), "of turns alone"
    out = io.StringIO()
    Console(file=out, width=200).print(requests_table(asked, spread))
    assert "reader 2" in out.getvalue()
