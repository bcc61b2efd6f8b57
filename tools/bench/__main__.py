"""`python -m snowskin.tools.bench`: runs a benchmark, shows its table, keeps its JSON.

Rules kept here: a benchmark is a command by its name in the registry; the exit status says whether
it ran, and with `--strict` whether its goals hold: numbers of a busy host are no verdict by default.
"""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from snowskin.tools.bench import registry
from snowskin.tools.bench.report import (
    Report,
    compare,
    host_differences,
    read_report,
    table_of,
)
from snowskin.transport.errors import SnowskinError

DEFAULT_RUNS = registry.BenchOptions().runs
WIDTH_OF_A_FILE = 160  # columns, where the output is no terminal


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH_OF_A_FILE)


def _run_and_show(name: str, options: registry.BenchOptions) -> Report:
    bench = registry.load(name)
    console = _console()
    console.print(bench.QUESTION, markup=False)
    report = bench.run(options)
    console.print(table_of(report))
    for note in report.notes:
        console.print(note, style="bold red" if note.startswith("MISSING") else None, markup=False)
    return report


class _Benches(click.Group):
    """The benchmarks of the registry as commands, beside those declared below."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*sorted(registry.BENCHES), *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in registry.BENCHES:
            return _bench_command(cmd_name)
        return super().get_command(ctx, cmd_name)


def _bench_command(name: str) -> click.Command:
    @click.command(name, help=f"Run the benchmark {name!r} and show its table.")
    @click.option(
        "--json",
        "json_path",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Also write the report to this file.",
    )
    @click.option(
        "--runs",
        type=click.IntRange(min=1),
        default=DEFAULT_RUNS,
        show_default=True,
        help="Rounds of each case; the table shows their median and spread.",
    )
    @click.option("--smoke", is_flag=True, help="Smallest sizes only: does it work, not how fast.")
    @click.option(
        "--peers-python",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="Python of the environment that other systems are installed in (make bench-peers).",
    )
    @click.option("--strict", is_flag=True, help="Exit with 1 where a goal does not hold.")
    def command(
        json_path: Path | None, runs: int, smoke: bool, strict: bool, peers_python: Path | None
    ) -> None:
        options = registry.BenchOptions(runs=runs, smoke=smoke, peers_python=peers_python)
        try:
            report = _run_and_show(name, options)
            if json_path is not None:
                report.write(json_path)
        except SnowskinError as error:
            raise click.ClickException(str(error)) from error
        if strict and report.missed:
            missed = "; ".join(f"{row.name}: {row.goal}" for row in report.missed)
            raise click.ClickException(f"{len(report.missed)} goals do not hold: {missed}")

    return command


@click.group(cls=_Benches)
def main() -> None:
    """Benchmarks: one question each, our number beside a reference of the same run."""


@main.command("smoke")
def run_all_briefly() -> None:
    """Run every benchmark once, as small as it goes."""
    for name in sorted(registry.BENCHES):
        try:
            _run_and_show(name, registry.BenchOptions(runs=1, smoke=True))
        except SnowskinError as error:
            raise click.ClickException(f"{name}: {error}") from error


@main.command("compare")
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
def compare_files(before: Path, after: Path) -> None:
    """Show two JSON reports side by side."""
    try:
        a, b = read_report(before), read_report(after)
    except SnowskinError as error:
        raise click.ClickException(str(error)) from error
    console = _console()
    console.print(compare(a, b))
    for line in host_differences(a.host, b.host):
        console.print(f"not the same host or versions: {line}", markup=False)


if __name__ == "__main__":
    main(prog_name="python -m snowskin.tools.bench")
