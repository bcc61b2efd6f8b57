"""Builds ucx-py 0.45 from its source: its wheels are on no index that everybody can reach.

Rules kept here: what is built is the tag, unchanged but for its build back end, which needs packages of its own makers;
it links to the `libucx-cu12` wheel of the environment it is built for, found again by a path relative to itself; the
build's own packages go into an environment that pip makes and throws away.

    python -m snowskin.tools.ucx_py                        # into this environment
    python -m snowskin.tools.ucx_py --source DIR-OR-URL    # from a copy of the repository
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

from snowskin.transport.errors import SnowskinError

SOURCE = "https://github.com/rapidsai/ucx-py"
TAG = "v0.45.00"
VERSION = "0.45.0"
TIMEOUT_S = 900
UCX_WHEELS = ("libucx-cu12", "libucx-cu13")

# UCX from 1.21 on compares signs where ucx-py asks for -Werror; `ucp/_libs/*.so` lies beside `libucx/lib`.
COMPILER = {"CFLAGS": "-Wno-sign-compare", "LDFLAGS": "-Wl,-rpath,$ORIGIN/../../libucx/lib"}


class UcxPyNotBuilt(SnowskinError):
    """ucx-py could not be built here."""

    status = "FAILED_PRECONDITION"


def build_system(pyproject: str, *, ucx: str) -> str:
    """ucx-py's pyproject.toml with setuptools as its back end, built against the wheel `ucx` (`name==version`)."""
    table = re.compile(r"^\[build-system\]\n.*?(?=^\[)", re.MULTILINE | re.DOTALL)
    requires = f'requires = ["setuptools>=64", "cython>=3.0.0", "{ucx}"]'
    ours = f'[build-system]\nbuild-backend = "setuptools.build_meta"\n{requires}\n\n'
    replaced, count = table.subn(ours, pyproject)
    if count != 1:
        raise UcxPyNotBuilt("the source's pyproject.toml has no [build-system]", hint=f"use {TAG}")
    return replaced


def installed_ucx() -> str:
    """`name==version` of UCX's wheel in this environment."""
    for name in UCX_WHEELS:
        try:
            return f"{name}=={version(name)}"
        except PackageNotFoundError:
            continue
    raise UcxPyNotBuilt("no UCX to build against", hint="pip install 'snowskin[ucx]'")


def fetch(source: str, tag: str, folder: Path) -> None:
    """Clones `source`, an address or a path of a git repository, at `tag`; the newest commit where `tag` is empty."""
    options = ["--depth", "1", *(["--branch", tag] if tag else [])]
    _run(["git", "-c", "advice.detachedHead=false", "clone", *options, source, str(folder)])
    found = (folder / "VERSION").read_text().strip()
    if found != VERSION:
        raise UcxPyNotBuilt(f"{source} is at version {found}", hint=f"give the tag {TAG}")


def build(source: str, tag: str) -> None:
    """Builds ucx-py and installs it into this environment."""
    ucx = installed_ucx()
    with tempfile.TemporaryDirectory(prefix="snowskin-ucx-py-") as temporary:
        folder = Path(temporary) / "ucx-py"
        fetch(source, tag, folder)
        pyproject = folder / "pyproject.toml"
        pyproject.write_text(build_system(pyproject.read_text(), ucx=ucx))
        _run([sys.executable, "-m", "pip", "install", "--no-deps", str(folder)], **COMPILER)


def _run(command: list[str], **environment: str) -> None:
    try:
        ended = subprocess.run(
            command, env=os.environ | environment, timeout=TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UcxPyNotBuilt(f"{command[0]}: {error}") from error
    if ended.returncode:
        raise UcxPyNotBuilt(
            f"{' '.join(command[:4])} ended with {ended.returncode}",
            hint="it needs git and a C compiler; its own words are above",
        )


@click.command()
@click.option(
    "--source", default=SOURCE, show_default=True, help="Address or path of the git repository."
)
@click.option(
    "--tag", default=TAG, show_default=True, help="What to build; empty: the newest commit."
)
def main(source: str, tag: str) -> None:
    """Build ucx-py 0.45 and install it into this environment."""
    try:
        build(source, tag)
    except UcxPyNotBuilt as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"ucx-py {VERSION} is installed, against {installed_ucx()}")


if __name__ == "__main__":
    main()
