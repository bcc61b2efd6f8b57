"""What is shipped: the wheel holds every module, the sdist can build that wheel, the scripts start."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("transport", "kvstore", "engines", "tools")
BUILD_TIMEOUT_S = 50
# Through the build backend itself: `pip wheel` does the same behind a network look-up.
BUILD_SDIST = "import sys; from setuptools import build_meta as b; b.build_sdist(sys.argv[1])"


def source_files():
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    return [Path(name) for name in sorted(set(listed)) if name and (ROOT / name).is_file()]


def run(*command, cwd):
    ran = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The unpacked source distribution, built from a copy so that the checkout stays clean."""
    scratch = tmp_path_factory.mktemp("sdist")
    copy = scratch / "checkout"
    for path in source_files():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, copy / path)
    run(sys.executable, "-c", BUILD_SDIST, str(scratch), cwd=copy)
    (archive,) = scratch.glob("snowskin-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(scratch / "unpacked", filter="data")
    (unpacked,) = (scratch / "unpacked").iterdir()
    return unpacked


@pytest.fixture(scope="module")
def wheel_names(sdist):
    """File names in the wheel that pip builds from the source distribution."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet")
    target = sdist.parent / "wheel"
    run(*pip, "--no-deps", "--no-build-isolation", "-w", str(target), ".", cwd=sdist)
    (wheel,) = target.glob("snowskin-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def shipped_as(path: Path) -> str:
    """Where a file of the checkout lies in an installation."""
    if path.parts[0] == "proto":
        return Path(*path.parts[1:]).as_posix()
    return f"snowskin/{path.as_posix()}"


def test_the_wheel_holds_every_module_and_nothing_else(wheel_names):
    folders = (*FLOORS, "proto")
    code = [p for p in source_files() if p.parts[0] in folders and p.suffix in (".py", ".pyi")]
    wanted = {shipped_as(path) for path in code}
    shipped = {name for name in wheel_names if name.endswith((".py", ".pyi"))}
    assert shipped == wanted
    tops = {name.split("/")[0] for name in wheel_names}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"snowskin"}


def test_the_wheel_holds_data_types_and_licence(wheel_names):
    for floor in FLOORS:
        assert f"snowskin/{floor}/py.typed" in wheel_names
    assert "snowskin/v1/py.typed" in wheel_names
    data = {shipped_as(p) for p in source_files() if p.suffix == ".json" and p.parts[0] in FLOORS}
    assert data <= wheel_names
    assert any(name.endswith("licenses/LICENSE") for name in wheel_names)


def test_the_sdist_holds_the_protos_and_the_documents(sdist):
    wanted = [p for p in source_files() if p.suffix == ".proto" or p.parts[0] == "docs"]
    missing = [str(path) for path in wanted if not (sdist / path).is_file()]
    assert not missing, f"MANIFEST.in forgets {missing}"
    for name in ("README.md", "LICENSE", "CHANGELOG.md", "constraints.txt"):
        assert (sdist / name).is_file()


def test_installed_scripts_point_at_something_that_can_be_called():
    scripts = [e for e in entry_points(group="console_scripts") if e.value.startswith("snowskin.")]
    assert {script.name for script in scripts} == {"snowskin", "kvctl"}
    for script in scripts:
        assert callable(getattr(importlib.import_module(script.module), script.attr))
