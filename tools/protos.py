"""Generates the Python of `proto/`; with `--check`, says whether the committed code is stale.

Rules kept here: the generator is the pinned grpcio-tools; generated files lie beside their .proto
and nothing else writes them; `--check` writes only into a temporary folder and fails on a changed,
missing or left-over file.
"""

from __future__ import annotations

import difflib
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

from snowskin.transport.errors import SnowskinError

PROTO_ROOT = Path(__file__).resolve().parent.parent / "proto"
GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")
GENERATOR_TIMEOUT_S = 120
MAX_DIFF_LINES = 12  # per file: enough to see what changed


class ProtosBroken(SnowskinError):
    """The .proto files cannot be compiled here."""

    status = "FAILED_PRECONDITION"


def proto_files(root: Path) -> list[Path]:
    """The .proto files below `root`, sorted, relative to it."""
    return sorted(path.relative_to(root) for path in root.rglob("*.proto"))


def generated_files(root: Path) -> dict[str, Path]:
    """The generated files below `root`, by their path relative to it."""
    found = (path for pattern in GENERATED for path in root.rglob(pattern))
    return {path.relative_to(root).as_posix(): path for path in sorted(found)}


def generate(root: Path, target: Path) -> list[str]:
    """Compiles every .proto below `root` into `target`; returns the generated paths.

    Raises:
        ProtosBroken: there is no .proto, grpcio-tools is missing, or protoc refused one.
    """
    sources = proto_files(root)
    if not sources:
        raise ProtosBroken(f"no .proto file below {root}", hint="run from a checkout")
    try:
        version("grpcio-tools")
    except PackageNotFoundError as error:
        raise ProtosBroken("grpcio-tools is not installed", hint="make setup") from error
    outputs = [f"--{kind}_out={target}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{root}", *outputs]
    ran = subprocess.run(
        [*command, *map(str, sources)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=GENERATOR_TIMEOUT_S,
        check=False,
    )
    if ran.returncode != 0:
        raise ProtosBroken(f"protoc failed: {ran.stderr.strip()}", hint="mend the .proto it names")
    return sorted(generated_files(target))


def drift(root: Path) -> list[str]:
    """What differs between the committed files and a fresh run: a report's lines, or none.

    Raises:
        ProtosBroken: as `generate`.
    """
    with tempfile.TemporaryDirectory(prefix="snowskin-protos-") as scratch:
        generate(root, Path(scratch))
        fresh = generated_files(Path(scratch))
        committed = generated_files(root)
        report: list[str] = []
        for name in sorted(fresh.keys() | committed.keys()):
            if name not in committed:
                report.append(f"missing: {name}")
            elif name not in fresh:
                report.append(f"left over, no .proto makes it: {name}")
            else:
                report += _difference(name, committed[name], fresh[name])
    return report


def _difference(name: str, committed: Path, fresh: Path) -> list[str]:
    old, new = committed.read_text(), fresh.read_text()
    if old == new:
        return []
    diff = difflib.unified_diff(
        old.splitlines(), new.splitlines(), "committed", "generated", lineterm="", n=0
    )
    changed = [f"    {line[:160]}" for line in diff][2:]
    rest = [f"    ... {len(changed) - MAX_DIFF_LINES} more lines"]
    return [
        f"stale: {name}",
        *changed[:MAX_DIFF_LINES],
        *(rest if changed[MAX_DIFF_LINES:] else []),
    ]


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; fail if generated code is stale.")
@click.option(
    "--root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=PROTO_ROOT,
    show_default="proto/ of this checkout",
    help="Folder whose .proto files are compiled; it is the import root as well.",
)
def main(check: bool, root: Path) -> None:
    """Generate the Python code of the .proto files, or check that it is up to date."""
    root = root.resolve()
    try:
        if not check:
            for name in generate(root, root):
                print(name)
            return
        report = drift(root)
    except ProtosBroken as error:
        raise click.ClickException(str(error)) from error
    if report:
        raise click.ClickException("\n".join(["generated code is stale: make protos", *report]))
    print(f"protos: {len(proto_files(root))} files, generated code is up to date")


if __name__ == "__main__":
    main()
