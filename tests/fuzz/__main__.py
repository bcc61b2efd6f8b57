"""The coverage-guided fuzzer (atheris, on libFuzzer): `python -m tests.fuzz [TARGET]... --seconds 60`.

Rules kept here: each target runs in a process of its own, because libFuzzer ends the process; what breaks one is left
as a file, and its path and traceback are printed; a run that ends well is noted by `write_result` where wanted.
Needs atheris (the extra `fuzz`), which is not among the development tools: it has no wheels for every platform.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from tests.support.results import write_result

ROOT = Path(__file__).resolve().parents[2]
MAX_INPUT_NBYTES = 4096
START_S = 60.0


def fuzz_inside(target: str, arguments: list[str]) -> None:
    """Fuzzes until libFuzzer ends the process."""
    atheris = importlib.import_module("atheris")  # optional, and without types
    with atheris.instrument_imports(include=["snowskin.transport"]):
        from tests.fuzz.targets import TARGETS
    atheris.Setup([sys.argv[0], *arguments], TARGETS[target])
    atheris.Fuzz()


def fuzz(target: str, seconds: int) -> dict[str, int]:
    """Runs one target; how many inputs it was given and how many places in the code they reached.

    Raises:
        AssertionError: an input broke it; the message has the end of the output, which names the file.
    """
    from tests.fuzz.targets import SEEDS

    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(SEEDS[target]):
            (Path(folder) / f"seed-{number}").write_bytes(seed)
        done = subprocess.run(
            [
                *(sys.executable, "-m", "tests.fuzz", "--inside", target, "--"),
                f"-max_total_time={seconds}",
                f"-max_len={MAX_INPUT_NBYTES}",
                "-print_final_stats=1",
                f"-artifact_prefix={tempfile.gettempdir()}/snowskin-fuzz-{target}-",
                folder,
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds + START_S,
            check=False,
        )
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{target} was broken:\n{output[-6000:]}"
    executed = re.search(r"number_of_executed_units: (\d+)", output)
    places = re.findall(r"cov: (\d+)", output)
    assert executed, output[-2000:]
    assert places, output[-2000:]
    return {"num_inputs": int(executed[1]), "num_places": int(places[-1]), "seconds": seconds}


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[TARGET]...")
@click.option("--seconds", default=60, show_default=True, help="For each target.")
@click.option("--inside", hidden=True, help="Fuzz this one, in this process.")
def main(arguments: tuple[str, ...], seconds: int, inside: str | None) -> None:
    """Fuzzes the transport's parsers and state machines, all of them unless some are named."""
    if importlib.util.find_spec("atheris") is None:
        raise click.ClickException("NO FUZZER HERE: pip install -e '.[fuzz]'")
    if inside is not None:
        fuzz_inside(inside, list(arguments))
    from tests.fuzz.targets import TARGETS

    if unknown := set(arguments) - TARGETS.keys():
        raise click.BadParameter(f"{unknown} are no targets; known are {sorted(TARGETS)}")
    results = {}
    for target in arguments or TARGETS:
        results[target] = fuzz(target, seconds)
        click.echo(f"{target}: {results[target]}")
    write_result("fuzz", **results)


if __name__ == "__main__":
    main()
