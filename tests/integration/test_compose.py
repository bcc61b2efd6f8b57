"""docker-compose.yml, Dockerfile and deploy/: read as they are, linted, their commands started as plain processes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import httpx
import pytest
import yaml

from snowskin.kvstore.config import explain
from snowskin.tools import healthy
from snowskin.tools.cluster import served_model
from snowskin.tools.cluster.tables import SETTINGS
from snowskin.tools.kvctl.output import KvctlSettings
from tests.support.compose import ComposeRun, instructions, interpolate, last, seconds
from tests.support.tiny_model import make_tiny_model

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).resolve().parents[2]
OTHERS = ("prometheus",)  # images that are not ours
OURS = ("node", "conductor", "prefill", "decode")
BUILD_WHEEL = "import sys; from setuptools import build_meta as b; b.build_wheel(sys.argv[1])"
SECRET_NAME = re.compile(r"PASSW|SECRET|TOKEN|CREDENTIAL|API_?KEY", re.IGNORECASE)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def place():
    """A folder with a short path: a Unix socket lies in it."""
    with tempfile.TemporaryDirectory(prefix="compose-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def dockerfile():
    return instructions((ROOT / "Dockerfile").read_text())


def compose(**environment):
    return interpolate(yaml.safe_load((ROOT / "docker-compose.yml").read_text()), environment)


# --- the files


def test_the_compose_file_keeps_to_the_schema():
    ran = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec",
         "docker-compose.yml"], cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_dockerfile_passes_its_linter():
    hadolint = shutil.which("hadolint") or shutil.which(
        "hadolint", path=str(Path(sys.executable).parent)
    )
    if hadolint is None:
        pytest.skip(
            "NO HADOLINT HERE: the Dockerfile is not linted; it is a wheel for Linux x86-64"
        )
    ran = subprocess.run(
        [hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_image_is_pinned_without_rights_and_without_secrets(dockerfile):
    images = [rest.split()[0] for word, rest in dockerfile if word == "FROM"]
    assert images
    for image in images:
        assert re.search(r":\d+\.\d+\.\d+", image), f"{image} is not pinned"
    after_last_from = dockerfile[
        max(i for i, (word, _) in enumerate(dockerfile) if word == "FROM") :
    ]
    uid, _, gid = last(after_last_from, "USER").partition(":")
    assert int(uid) > 0
    assert int(gid) > 0
    assert last(after_last_from, "STOPSIGNAL") == "SIGTERM"
    for word, rest in dockerfile:
        if word in ("ENV", "ARG", "LABEL"):
            assert not SECRET_NAME.search(rest), rest
    assert "curl" not in last(after_last_from, "HEALTHCHECK")
    addresses = re.findall(r"https?://[^\s\"']+", str(dockerfile))
    allowed = ("https://download.pytorch.org/whl/cpu", "http://127.0.0.1:8080/healthz")
    assert set(addresses) <= set(allowed)


def copied(dockerfile):
    """Sources of the first stage's COPY instructions."""
    return [
        source
        for word, rest in dockerfile
        if word == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    ]


def test_what_is_copied_exists_and_is_let_through(dockerfile):
    let_through = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in let_through
    for source in copied(dockerfile):
        assert (ROOT / source).exists(), source
        assert f"!{source}" in let_through, f".dockerignore keeps {source} out"
    extra = {line[1:] for line in let_through if line.startswith("!")} - set(copied(dockerfile))
    assert not extra, f".dockerignore lets {extra} through, which nothing copies"


def test_what_is_copied_is_enough_to_build_the_whole_wheel(dockerfile, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    no_caches = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info")
    for name in copied(dockerfile):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=no_caches)
        else:
            shutil.copy(ROOT / name, source / name)
    ran = subprocess.run(
        [sys.executable, "-c", BUILD_WHEEL, str(tmp_path)],
        cwd=source, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    (wheel,) = tmp_path.glob("snowskin-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {
        f"snowskin/{path.relative_to(ROOT).as_posix()}"
        for floor in ("transport", "kvstore", "engines", "tools")
        for path in (ROOT / floor).rglob("*.py")
    }
    assert modules <= names
    assert any(name.startswith("snowskin/v1/") for name in names)
    assert any(name.endswith("LICENSE") for name in names)


def test_every_role_runs_with_as_little_as_it_needs(dockerfile):
    services = compose()["services"]
    assert set(services) == {*OURS, "model", *OTHERS}
    for name in (*OURS, "model"):
        service = services[name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["user"] == last(dockerfile, "USER")
        assert service["ulimits"]["memlock"] == -1
        # the drain, and as long again to close what is open
        grace_s = seconds(service["stop_grace_period"])
        assert grace_s >= 2 * float(service["environment"]["SNOWSKIN_DRAIN_S"])
        assert not {"privileged", "ipc", "pid", "network_mode"} & set(service)
    for service in services.values():
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), f"{port} is open to everybody"
        assert not SECRET_NAME.search(str(service.get("environment", "")))
        assert re.search(r":v?\d+\.\d+\.\d+", service["image"]) or "build" in service


@pytest.mark.parametrize("name", OURS)
def test_each_role_accepts_its_settings_as_they_are_written(name, monkeypatch):
    """With 0.0.0.0 in them, which the processes below do not get: --insecure must be there, and is enough."""
    service = compose()["services"][name]
    for variable, value in service["environment"].items():
        monkeypatch.setenv(variable, value)
    role, *flags = service["command"]
    told = {
        each.name: each.value for each in explain(SETTINGS[role](), table=role, arguments=flags)
    }
    SETTINGS[role]()(**told)
    assert told["host"] == "0.0.0.0"
    assert told["http_port"] == 8080


def test_only_the_node_may_write_where_the_door_is():
    def door(name):
        mounts = compose()["services"][name]["volumes"]
        (mount,) = (each for each in mounts if each.startswith("door:"))
        return mount

    assert door("node") == "door:/run/snowskin"
    assert door("prefill") == door("decode") == "door:/run/snowskin:ro"


def test_a_model_of_the_users_is_mounted_and_without_one_a_volume_is():
    def mount(**environment):
        return compose(**environment)["services"]["decode"]["volumes"][0]

    assert mount() == "models:/models"
    assert mount(MODEL_DIR="/data/llama") == "/data/llama:/models/served"


def test_prometheus_asks_every_role():
    config = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())
    ((look_up,),) = ([each["dns_sd_configs"][0]] for each in config["scrape_configs"])
    services = compose()["services"]
    assert set(look_up["names"]) == set(OURS)
    for name in OURS:
        assert services[name]["environment"]["SNOWSKIN_HTTP_PORT"] == str(look_up["port"])
    assert (
        "./deploy/prometheus.yml:/etc/prometheus/prometheus.yml:ro"
        in (services["prometheus"]["volumes"])
    )


# --- the commands


def test_the_commands_serve_as_they_are_written_and_stop_in_time(model, place):
    environment = {
        "MODEL_DIR": str(model), "DRAM_NBYTES": "64MiB", "KV_MEMORY_NBYTES": "32MiB", "THREADS": "1",
    }  # fmt: skip
    with ComposeRun(ROOT, place, environment, leave_out=OTHERS) as run:
        run.wait_healthy()
        services = run.services
        published = services["conductor"].spec["ports"][0]
        assert published == "127.0.0.1:8000:8080"
        http = f"http://{services['conductor'].address}:8080"
        body = {"model": "served", "prompt": "a b " * 40, "max_tokens": 8, "temperature": 0}
        with httpx.Client(base_url=http, timeout=30, trust_env=False) as client:
            body["model"] = client.get("/v1/models").json()["data"][0]["id"]
            first = client.post("/v1/completions", json=body).json()
            again = client.post("/v1/completions", json=body).json()
        assert first["choices"][0]["text"] == again["choices"][0]["text"]
        assert first["usage"]["completion_tokens"] == 8
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0

        for name in OURS:  # as deploy/prometheus.yml says
            scraped = httpx.get(f"http://{services[name].address}:8080/metrics", trust_env=False)
            assert scraped.status_code == 200, (name, run.log(services[name]))
            assert f"snowskin_{name}_" in scraped.text
        assert (place / "volumes" / "door" / "node.sock").is_socket()
        port = KvctlSettings().conductor.rpartition(":")[2]
        assert f"--port={port}" in services["conductor"].spec["command"], "kvctl's default"

        ended = run.stop()
    assert {name: status for name, (status, _) in ended.items()} == dict.fromkeys(
        ("model", *OURS), 0
    )
    assert not (place / "volumes" / "door" / "node.sock").exists()


# --- what the files call


def test_a_health_check_says_what_was_answered():
    assert healthy.main([]) == 2
    assert healthy.ask("ftp://127.0.0.1/")[0] is False
    healthy_, said = healthy.ask("http://127.0.0.1:1/healthz")
    assert not healthy_
    assert "refused" in said


def test_a_model_is_made_where_none_lies_and_nothing_else_is_touched(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("snowskin.engines.model.random_model.make_random_model", make_tiny_model)
    assert served_model.main([str(tmp_path / "served")]) == 0
    assert (tmp_path / "served" / "config.json").is_file()
    assert "made a random one" in capsys.readouterr().out
    assert served_model.main([str(tmp_path / "served")]) == 0
    assert "serving the model" in capsys.readouterr().out
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    monkeypatch.undo()
    assert served_model.main([str(other)]) == 1
    assert "MODEL_DIR" in capsys.readouterr().err
    assert [path.name for path in other.iterdir()] == ["notes.txt"]
    assert served_model.main([]) == 2
