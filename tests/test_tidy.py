"""The house itself: what is written about it is so, and nothing lies about that should not.

Each test is a rule of CONTRIBUTING.md; a failure names the file and says what to do.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path

import click
import pytest

from snowskin.tools.protos import PROTO_ROOT, drift

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("transport", "kvstore", "engines", "tools")
MAX_LINES = 600
# Files that may be longer, each with its reason.
LONGER: dict[str, str] = {}
FORBIDDEN_NAMES = ("utils", "common", "helpers", "types", "managers")
# What decides, and so must be named in the contract "Decisions are pure" once it exists.
PURE = (
    "engines/conductor/admission.py",
    "engines/conductor/cost_model.py",
    "engines/conductor/policies",
    "engines/conductor/request.py",
    "engines/conductor/state.py",
    "engines/conductor/view.py",
    "kvstore/client/breaker.py",
    "kvstore/client/conversation.py",
    "kvstore/client/machine.py",
    "kvstore/client/pieces.py",
    "kvstore/directory/presence.py",
    "kvstore/directory/view.py",
    "kvstore/eviction",
    "kvstore/index",
    "kvstore/lease.py",
    "kvstore/messages.py",
    "kvstore/node/events.py",
    "kvstore/node/inspection.py",
    "kvstore/node/state.py",
    "kvstore/pool/allocator.py",
    "kvstore/quota.py",
    "kvstore/session.py",
    "transport/advertisement.py",
    "transport/choice.py",
    "transport/frames.py",
    "transport/paths.py",
    "transport/pull.py",
    "transport/routes.py",
    "transport/stripes.py",
    "transport/topology.py",
    "transport/traffic.py",
    "transport/words.py",
)
# Paths of one machine, and addresses of package indexes, have no place in a file that travels. The
# one address allowed is where PyTorch publishes its CPU wheels, an option for users.
OF_ONE_MACHINE = re.compile(
    r"(?<![\w.~])/(?:work|farm|root|home)/\w|" + "bash" + r"_jobs|file:///\w"
)
INDEX_ADDRESS = re.compile(
    r"(?:index-url|find-links)[= ]+\W?\w+://(?!download\.pytorch\.org/whl/cpu)"
    r"|\bpypi\.(?:org|python)|pythonhosted"
)


def git_files() -> list[Path]:
    """Files that are tracked or about to be: what is in the tree and not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    paths = (ROOT / name for name in sorted(set(listed)) if name)
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def files():
    return git_files()


@pytest.fixture(scope="module")
def modules(files):
    """Our own Python files, the generated ones left out."""
    return [path for path in files if path.suffix == ".py" and PROTO_ROOT not in path.parents]


@pytest.fixture(scope="module")
def texts(files):
    """Every text file's lines; what is not UTF-8 is data."""
    found = {}
    for path in files:
        try:
            found[name_of(path)] = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
    return found


def packages() -> set[str]:
    return {
        f"{name_of(path.parent)}/"
        for floor in FLOORS
        for path in (ROOT / floor).rglob("__init__.py")
        if path.parent != ROOT / floor
    }


def test_the_map_names_every_package():
    text = (ROOT / "docs" / "architecture.md").read_text()
    missing = sorted(name for name in packages() if f"`{name}`" not in text)
    assert not missing, f"docs/architecture.md says nothing about {missing}: name each as `path/`"


def test_everything_the_map_names_exists():
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`((?:transport|kvstore|engines|tools|proto|tests)/[\w./-]*)`", text))
    gone = sorted(name for name in named if not (ROOT / name).exists())
    assert not gone, f"docs/architecture.md names {gone}, which do not exist"


def test_every_module_says_what_it_is_for(modules):
    silent = [
        name_of(path) for path in modules if not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent, f"no docstring at the top: {silent}"


def test_no_file_is_long_without_a_reason(modules):
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in modules}
    long = {name: n for name, n in lengths.items() if n > MAX_LINES and name not in LONGER}
    assert not long, f"over {MAX_LINES} lines: {long}: split it, or say why in LONGER"
    stale = [name for name in LONGER if lengths.get(name, 0) <= MAX_LINES]
    assert not stale, f"LONGER excuses {stale}, which need no excuse"


def test_no_module_has_a_name_that_says_nothing(modules):
    vague = [name_of(path) for path in modules if path.stem in FORBIDDEN_NAMES]
    assert not vague, f"name these by what is in them: {vague}"


def test_nothing_is_left_undone(modules):
    marks = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|X" + r"XX)\b|NotImplemented" + "Error")
    undone = [
        f"{name_of(path)}:{number}"
        for path in modules
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if marks.search(line)
    ]
    assert not undone, f"finish or delete: {undone}"


def test_every_api_has_a_contract_suite(modules):
    apis = [path for path in modules if path.name == "api.py"]
    missing = [
        name_of(path)
        for path in apis
        if not (ROOT / "tests" / "contract" / f"test_{path.parent.name}.py").is_file()
    ]
    assert not missing, f"no tests/contract/test_<folder>.py for {missing}"


def test_generated_code_is_not_stale():
    assert drift(PROTO_ROOT) == [], "make protos"


def test_every_module_that_decides_is_held_to_be_pure():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = (c for c in settings["contracts"] if c["name"] == "Decisions are pure")
    wanted = {
        "snowskin." + name.removesuffix(".py").replace("/", ".")
        for name in PURE
        if (ROOT / name).exists()
    }
    assert set(contract["source_modules"]) == wanted, (
        "pyproject.toml, contract 'Decisions are pure'"
    )


@pytest.mark.parametrize("pattern", [OF_ONE_MACHINE, INDEX_ADDRESS])
def test_no_file_names_one_machine_or_a_package_index(texts, pattern):
    # LICENSE is quoted text; a test of the rule has to name what the rule forbids
    found = [
        f"{name}:{number}: {line.strip()[:80]}"
        for name, lines in texts.items()
        for number, line in enumerate(lines, 1)
        if name != "tests/test_tidy.py" and pattern.search(line)
    ]
    assert not found, "\n".join(found)


def test_the_rule_about_machines_and_indexes_bites():
    slash = "/"
    assert OF_ONE_MACHINE.search(f"cd {slash}work{slash}main")
    assert OF_ONE_MACHINE.search(f"'{slash}home{slash}me'")
    assert not OF_ONE_MACHINE.search(f"docs/home/page, ~{slash}work{slash}x")
    assert INDEX_ADDRESS.search("--index-url " + "https://example.org/simple")
    assert INDEX_ADDRESS.search("https://" + "pypi.org/simple")
    assert not INDEX_ADDRESS.search("--index-url https://download.pytorch.org/whl/cpu torch")


def commands_in(page: str) -> set[str]:
    """Commands of a page: what stands in code blocks and backticks, without its options."""
    text = (ROOT / page).read_text()
    blocks = re.findall(r"^(?: {4}|\t)(.*)$", text, re.M)
    blocks += [
        line
        for block in re.findall(r"^```.*?\n(.*?)^```", text, re.M | re.S)
        for line in block.splitlines()
    ]
    blocks += re.findall(r"`([^`\n]+)`", text)
    parts = (part for line in blocks for part in re.split(r"[;&|#]+", line))
    return {part.strip().removeprefix("$ ") for part in parts if part.strip()}


PAGES = ["README.md", "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_of_a_page_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    used = {
        word
        for command in commands_in(page)
        if (words := command.split())[0] == "make"
        for word in words[1:]
        if re.fullmatch(r"[a-z-]+", word)
    }
    assert used, f"{page} shows no make target"
    assert used <= targets, f"{page}: no such target: {sorted(used - targets)}"


@pytest.mark.parametrize("page", PAGES)
def test_modules_that_a_page_runs_exist(page):
    ran = {m for c in commands_in(page) for m in re.findall(r"-m (snowskin(?:\.\w+)+)", c)}
    missing = sorted(name for name in ran if importlib.util.find_spec(name) is None)
    assert not missing, f"{page}: {missing}"


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("program", ["snowskin", "kvctl"])
def test_subcommands_that_a_page_shows_exist(page, program):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module = importlib.import_module(scripts[program].split(":")[0])
    groups = [value for value in vars(module).values() if isinstance(value, click.Group)]
    inner = {id(command) for group in groups for command in group.commands.values()}
    (group,) = (group for group in groups if id(group) not in inner)
    ctx = click.Context(group)
    known = set(group.list_commands(ctx))
    call = re.compile(rf"(?:^|\s|/){program} +(?:--?\S+ +)*([a-z][a-z-]*)\b")
    used = {name for c in commands_in(page) for name in call.findall(c)}
    assert used <= known, f"{page}: {program} has no {sorted(used - known)}; it has {sorted(known)}"
    assert all(group.get_command(ctx, name) for name in used)


def test_ci_runs_the_documented_command():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111, ".ci/run is not executable"
    assert re.search(r"^exec make test$", script.read_text(), re.M)


def test_every_dependency_has_an_exact_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {}
    for line in lines:
        if not line.startswith("#"):
            match = re.fullmatch(r"([\w.-]+)==([\w.]+)", line)
            assert match, f"constraints.txt: names and versions only, not {line!r}"
            pinned[plain(match[1])] = match[2]
    names = {plain(re.split(r"[<>=\[; ]", dependency)[0]) for dependency in wanted}
    assert names - pinned.keys() == {"setuptools"}, "constraints.txt"  # it follows the machine


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
