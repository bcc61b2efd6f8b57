"""Bench reports: the numbers of a row, the exact shape of the file, and what is refused."""

from __future__ import annotations

import dataclasses
import io
import json
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from snowskin.kvstore.clock import ManualClock
from snowskin.tools.bench.host import HostFacts, cpu_model, host_facts
from snowskin.tools.bench.report import (
    Goal,
    Report,
    ReportBroken,
    Row,
    compare,
    host_differences,
    make_paired_row,
    make_row,
    measure,
    read_report,
    show_number,
    spread_of,
    table_of,
)

HOST = HostFacts(
    num_cores=2,
    cpu_model="Some CPU",
    memory_nbytes=1 << 33,
    kernel="Linux 6.1",
    python="3.11.7",
    versions={"torch": "2.13.0"},
)
AT_LEAST = Goal(of="ratio", relation=">=", bound=0.85)


def report(*rows, host=HOST):
    return Report(bench="spine", host=host, rows=rows)


def shown(table):
    stream = io.StringIO()
    Console(file=stream, width=200).print(table)
    return stream.getvalue()


def test_a_row_is_median_spread_and_ratio_of_medians():
    row = make_row("pull 1 MiB", [3.0, 1.0, 2.0, 9.0, 2.0], "ms", reference=("memcpy", [4.0, 4.0]))
    assert (row.value, row.spread, row.runs) == (2.0, 1.0, 5)
    assert (row.reference, row.reference_value, row.ratio) == ("memcpy", 4.0, 0.5)
    assert (row.goal, row.holds) == (None, None)


def test_one_sample_has_no_spread():
    assert spread_of([4.0]) == 0.0


@pytest.mark.parametrize(("samples", "holds"), [([0.85], True), ([0.84], False)])
def test_a_goal_is_judged_on_the_ratio(samples, holds):
    row = make_row("pull", samples, "GB/s", reference=("memcpy", [1.0]), goal=AT_LEAST)
    assert (row.goal, row.holds) == ("ratio >= 0.85", holds)


@pytest.mark.parametrize(("samples", "holds"), [([100.0], True), ([100.1], False)])
def test_a_goal_is_judged_on_the_value(samples, holds):
    row = make_row("fixed", samples, "us", goal=Goal(of="value", relation="<=", bound=100))
    assert (row.goal, row.holds) == ("value <= 100", holds)


def test_a_goal_on_a_missing_ratio_does_not_hold():
    assert make_row("pull", [1.0], "GB/s", goal=AT_LEAST).holds is False
    assert make_row("pull", [1.0], "s", reference=("x", [0.0]), goal=AT_LEAST).ratio is None


def test_a_paired_ratio_is_the_median_of_the_rounds_and_not_of_the_medians():
    slow_minute = [1.0, 10.0, 10.0]
    row = make_paired_row("pull", slow_minute, "s", reference=("memcpy", [2.0, 5.0, 2.0]))
    assert (row.value, row.reference_value, row.ratio) == (10.0, 2.0, 2.0)


def test_a_paired_ratio_needs_a_reference_of_the_same_rounds():
    with pytest.raises(ValueError, match="shorter"):
        make_paired_row("pull", [1.0, 2.0], "s", reference=("memcpy", [1.0]))


def test_notes_travel_with_the_rows(tmp_path):
    noted = dataclasses.replace(report(), notes=("MISSING: nixl",))
    noted.write(tmp_path / "a.json")
    assert read_report(tmp_path / "a.json") == noted


def test_the_file_has_exactly_the_promised_shape():
    row = make_row("pull", [1.0], "s", reference=("memcpy", [2.0]), goal=AT_LEAST)
    document = json.loads(report(row).as_json())
    assert document == {
        "bench": "spine",
        "host": dataclasses.asdict(HOST),
        "rows": [
            {
                "name": "pull",
                "value": 1.0,
                "unit": "s",
                "reference": "memcpy",
                "reference_value": 2.0,
                "ratio": 0.5,
                "goal": "ratio >= 0.85",
                "holds": False,
                "runs": 1,
                "spread": 0.0,
            }
        ],
        "notes": [],
    }
    assert list(document["rows"][0]) == [field.name for field in dataclasses.fields(Row)]


numbers = st.floats(allow_nan=False, allow_infinity=False)


@given(
    rows=st.lists(
        st.builds(
            Row,
            name=st.text(max_size=20),
            value=numbers,
            unit=st.text(max_size=5),
            reference=st.none() | st.text(max_size=5),
            reference_value=st.none() | numbers,
            ratio=st.none() | numbers,
            goal=st.none() | st.text(max_size=5),
            holds=st.none() | st.booleans(),
            runs=st.integers(1, 100),
            spread=numbers,
        ),
        max_size=3,
    )
)
def test_what_is_written_is_read_again(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("reports") / "a.json"
    report(*rows).write(path)
    assert read_report(path) == report(*rows)


def test_a_number_that_is_none_is_refused():
    with pytest.raises(ValueError, match="not JSON compliant"):
        report(make_row("pull", [float("nan")], "s")).as_json()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"bench": "x"}', '{"bench": 1, "host": {}, "rows": []}', "[" * 100_000],
)
def test_what_is_no_report_is_refused_with_its_file(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ReportBroken, match=r"a\.json"):
        read_report(path)


def test_missing_files_and_folders_are_said(tmp_path):
    with pytest.raises(ReportBroken, match="No such file"):
        read_report(tmp_path / "none.json")
    with pytest.raises(ReportBroken, match="folder that exists"):
        report().write(tmp_path / "none" / "a.json")


def test_the_table_shows_ratios_first_and_a_missed_goal_loudly():
    row = make_row("pull 1 MiB", [1234.5], "us", reference=("memcpy", [2469.0]), goal=AT_LEAST)
    text = shown(table_of(report(row)))
    header, line = (line for line in text.splitlines() if "ratio" in line)
    assert header.split("┃")[1].strip() == "ratio"
    assert [cell.strip() for cell in line.split("│")[1:-1]] == [
        *("0.500", "ratio >= 0.85", "NO", "pull 1 MiB", "1,234", "us", "0", "1", "memcpy 2,469")
    ]


@pytest.mark.parametrize(
    ("number", "text"),
    [(None, ""), (0, "0"), (0.01234, "0.0123"), (1, "1.00"), (12345.6, "12,346"), (-2.5, "-2.50")],
)
def test_numbers_have_three_digits(number, text):
    assert show_number(number) == text


def test_cases_alternate_and_the_order_turns():
    order = []
    measure({name: partial(order.append, name) for name in "abc"}, 3)
    assert "".join(order[3:]) == "abcbcacab"  # after the warm-up round


def test_each_case_has_its_own_seconds():
    clock = ManualClock()
    cases = {"slow": lambda: clock.advance(2.0), "fast": lambda: clock.advance(0.5)}
    samples = measure(cases, 4, warmup_rounds=0, now_s=clock.now_s)
    assert samples == {"slow": [2.0] * 4, "fast": [0.5] * 4}


def test_comparing_matches_rows_by_name():
    a = report(make_row("one", [2.0], "s"), make_row("gone", [1.0], "s"))
    b = report(make_row("one", [1.0], "s"), make_row("new", [1.0], "ms"))
    lines = {
        cells[0]: cells[1:]
        for line in shown(compare(a, b)).splitlines()
        if (cells := [cell.strip() for cell in line.split("│")[1:-1]])
    }
    assert lines["one"] == ["", "", "2.00", "1.00", "0.500", "s"]
    assert lines["gone"] == ["", "", "1.00", "", "", "s"]
    assert lines["new"] == ["", "", "", "1.00", "", "ms"]


def test_values_of_different_units_are_not_divided():
    a, b = report(make_row("one", [2.0], "s")), report(make_row("one", [1.0], "ms"))
    (line,) = (line for line in shown(compare(a, b)).splitlines() if "one" in line)
    assert [cell.strip() for cell in line.split("│")][-3:-1] == ["", "s / ms"]


def test_different_hosts_and_versions_are_said():
    other = dataclasses.replace(HOST, num_cores=4, versions={"torch": "2.14.0", "numpy": "2"})
    assert host_differences(HOST, HOST) == []
    assert host_differences(HOST, other) == [
        "num_cores: A 2, B 4",
        "version of torch: A 2.13.0, B 2.14.0",
        "version of numpy: A none, B 2",
    ]


def test_host_facts_are_read_and_name_no_machine():
    facts = host_facts()
    assert facts.num_cores >= 1
    assert facts.memory_nbytes > 1 << 20
    assert facts.versions["numpy"]
    assert set(facts.as_json()) == {
        *("num_cores", "cpu_model", "memory_nbytes", "kernel", "python", "versions")
    }


def test_an_unreadable_cpu_is_unknown(tmp_path):
    assert cpu_model(tmp_path / "none") == "unknown"
    listed = tmp_path / "cpuinfo"
    listed.write_text("processor : 0\nmodel name\t: Fast CPU @ 3 GHz\n")
    assert cpu_model(listed) == "Fast CPU @ 3 GHz"
