"""The image and the compose file, read as a container engine would read them. No engine runs here.

What can be tried without one is tried: the health check's program, the settings that the files give, and the script
that makes the database roles, against a real PostgreSQL.
"""

import http.server
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest
import typer
import yaml

from gateway.cli import cli as command_line
from gateway.settings import Settings, load
from ledger.store.row_security import GATEWAY_ROLE
from tests.servers.postgres import QUICK, PostgresServer, database_of

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = typer.main.get_command(command_line).commands  # type: ignore[attr-defined]

INSTRUCTIONS = {"FROM", "WORKDIR", "RUN", "COPY", "ENV", "USER", "VOLUME", "EXPOSE", "HEALTHCHECK", "STOPSIGNAL"}
INSTRUCTIONS |= {"ENTRYPOINT", "CMD"}


class Instruction(NamedTuple):
    word: str
    flags: tuple[str, ...]
    rest: str


def stages() -> list[list[Instruction]]:
    """The Dockerfile's stages, each from its FROM on."""
    text = re.sub(r"\\\n\s*", " ", (ROOT / "Dockerfile").read_text())
    found: list[list[Instruction]] = []
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        word, _, rest = line.strip().partition(" ")
        assert word in INSTRUCTIONS, line
        flags = re.match(r"(?:--\S+\s+)*", rest)
        assert flags is not None
        instruction = Instruction(word, tuple(flags[0].split()), rest[flags.end() :].strip())
        if word == "FROM":
            found.append([])
        found[-1].append(instruction)
    return found


STAGES = stages()
IMAGE = STAGES[-1]


def only(word: str) -> Instruction:
    (found,) = [instruction for instruction in IMAGE if instruction.word == word]
    return found


def exec_form(text: str) -> list[str]:
    """A command without a shell, which would not pass signals on."""
    words = json.loads(text)
    assert isinstance(words, list)
    assert all(isinstance(word, str) for word in words)
    return words


IMAGE_ENV = dict(pair.split("=", 1) for pair in shlex.split(only("ENV").rest))
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if service["image"] == "farebox"}
PASSWORDS = {"POSTGRES_PASSWORD": "0wner", "GATEWAY_PASSWORD": "g4teway"}


def filled_in(value: Any) -> str:
    """A value as compose hands it over, with our passwords in the environment and nothing else."""

    def replace(match: re.Match[str]) -> str:
        name, operator, word = match[1], match[2], match[3]
        if name in PASSWORDS:
            return PASSWORDS[name]
        assert operator == ":-", f"{name} has no default, and nobody sets it"
        return word or ""

    return re.sub(r"\$\{(\w+)(?:(:-|:\?)([^}]*))?\}", replace, str(value))


# The image.


def test_the_image_is_built_in_two_stages_and_runs_as_an_ordinary_user() -> None:
    assert len(STAGES) == 2
    user = only("USER").rest
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", user)
    assert user.split(":")[0] in next(step.rest for step in IMAGE if step.word == "RUN")
    order = [step.word for step in IMAGE]
    assert order.index("USER") < order.index("ENTRYPOINT")
    assert "pip" not in "".join(step.rest for step in IMAGE if step.word == "RUN")


def test_only_hashed_packages_go_into_the_image() -> None:
    installs = [step.rest for stage in STAGES for step in stage if "pip install" in step.rest]
    assert len(installs) == 2
    assert "--require-hashes -r requirements.txt" in installs[0]
    assert "--no-deps --no-build-isolation" in installs[1]


def test_what_is_copied_is_there_and_is_sent_to_the_engine() -> None:
    """`.dockerignore` hides everything but what it names."""
    lines = (ROOT / ".dockerignore").read_text().split()
    assert lines[0] == "*"
    shown = {line.removeprefix("!") for line in lines if line.startswith("!")}
    hidden = [line for line in lines[1:] if not line.startswith("!")]
    names = {match[1] for stage in STAGES for step in stage if (match := re.search(r" AS (\w+)$", step.rest))}
    for stage in STAGES:
        for step in (step for step in stage if step.word == "COPY"):
            *sources, _ = step.rest.split()
            if step.flags:
                assert step.flags == (f"--from={next(iter(names))}",)
                continue
            for source in sources:
                assert (ROOT / source).exists(), source
                assert source in shown, f".dockerignore hides {source}"
                assert not any(fnmatch(source, pattern) for pattern in hidden)


def test_everything_that_the_wheel_is_built_from_is_in_the_image() -> None:
    copied = {name for step in STAGES[0] if step.word == "COPY" for name in step.rest.split()[:-1]}
    project = (ROOT / "pyproject.toml").read_text()
    packages = re.search(r"packages = \[(.*)\]", project)
    assert packages is not None
    assert set(re.findall(r'"(\w+)"', packages[1])) < copied
    assert {"pyproject.toml", "README.md", "LICENSE", "requirements.txt"} < copied


def test_the_image_serves_and_stops_on_sigterm() -> None:
    assert exec_form(only("ENTRYPOINT").rest) == ["farebox"]
    assert exec_form(only("CMD").rest)[0] in COMMANDS
    assert only("STOPSIGNAL").rest == "SIGTERM"
    assert only("EXPOSE").rest == IMAGE_ENV["FAREBOX_PORT"]


def test_the_image_keeps_what_must_be_kept_in_its_volume(monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings_of({}, monkeypatch)
    volume = only("VOLUME").rest
    assert given.database_url.startswith(f"sqlite:///{volume}/")
    assert given.journal_dir.is_relative_to(volume)


@pytest.fixture
def ready() -> Iterator[tuple[int, list[int]]]:
    """The port of something that answers the readiness probe, and the status that it answers with."""
    status = [200]

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status[0] if self.path == "/health/ready" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None: ...

    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port, status
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_health_check_tells_ready_from_not_ready(ready: tuple[int, list[int]]) -> None:
    port, status = ready
    check = only("HEALTHCHECK")
    assert any(flag.startswith("--timeout=") for flag in check.flags)
    program = exec_form(check.rest.removeprefix("CMD "))
    assert program[0] == "python"

    def run() -> int:
        environ = {**os.environ, "FAREBOX_PORT": str(port)}
        return subprocess.run([sys.executable, *program[1:]], env=environ, capture_output=True, check=False).returncode

    assert run() == 0
    status[0] = 503
    assert run() != 0


# The compose file.

SERVICE_KEYS = {"build", "cap_drop", "command", "depends_on", "environment", "healthcheck", "image", "init", "ports"}
SERVICE_KEYS |= {"read_only", "restart", "security_opt", "stop_grace_period", "tmpfs", "volumes"}
HEALTH_KEYS = {"test", "interval", "timeout", "start_period"}
CONDITIONS = {"service_started", "service_healthy", "service_completed_successfully"}


def settings_of(environment: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What a container of our image is set to."""
    for name in [name for name in os.environ if name.startswith(("FAREBOX_", "OPENAI_"))]:
        monkeypatch.delenv(name)
    for name, value in {**IMAGE_ENV, **environment}.items():
        if name.startswith("FAREBOX_"):
            assert name.removeprefix("FAREBOX_").lower() in Settings.model_fields, name
            monkeypatch.setenv(name, filled_in(value))
    return load()


def test_compose_has_no_key_that_is_not_one() -> None:
    assert COMPOSE.keys() == {"name", "services", "volumes"}
    for name, service in SERVICES.items():
        assert service.keys() <= SERVICE_KEYS, name
        assert service.get("healthcheck", {}).keys() <= HEALTH_KEYS, name


def test_services_start_in_their_order() -> None:
    """PostgreSQL is healthy, then the migration has run and ended, then the gateway starts."""
    for name, service in SERVICES.items():
        for needed, how in service.get("depends_on", {}).items():
            assert needed in SERVICES, f"{name} waits for {needed}, which is not there"
            assert how["condition"] in CONDITIONS
            if how["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[needed], f"{needed} never becomes healthy"
            if how["condition"] == "service_completed_successfully":
                assert SERVICES[needed]["restart"] == "no", f"{needed} would be started again"
    assert SERVICES["migrate"]["depends_on"]["postgres"]["condition"] == "service_healthy"
    assert SERVICES["gateway"]["depends_on"]["migrate"]["condition"] == "service_completed_successfully"
    assert SERVICES["gateway"]["depends_on"]["redis"]["condition"] == "service_started"


@pytest.mark.parametrize("name", OURS)
def test_a_container_of_ours_runs_a_command_of_ours_with_settings_of_ours(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = OURS[name]
    assert service["build"] == "."
    assert service["command"][0] in COMMANDS
    assert settings_of(service["environment"], monkeypatch).database_url.startswith("postgresql://")
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert {"/tmp"} <= set(service["tmpfs"])


def test_the_gateway_is_not_the_owner_of_its_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = settings_of(SERVICES["gateway"]["environment"], monkeypatch).database_url
    owner = settings_of(SERVICES["migrate"]["environment"], monkeypatch).database_url
    postgres = SERVICES["postgres"]["environment"]
    assert owner == f"postgresql://{postgres['POSTGRES_USER']}:0wner@postgres:5432/{postgres['POSTGRES_DB']}"
    assert gateway == f"postgresql://farebox_app:g4teway@postgres:5432/{postgres['POSTGRES_DB']}"


def test_the_gateway_has_time_to_stop_and_keeps_its_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    service = SERVICES["gateway"]
    given = settings_of(service["environment"], monkeypatch)
    assert int(service["stop_grace_period"].removesuffix("s")) > given.drain_delay_s + given.shutdown_grace_s
    kept = [mount.split(":")[1] for mount in service["volumes"]]
    assert any(given.journal_dir.is_relative_to(folder) for folder in kept)


def test_every_mount_and_every_host_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for service in SERVICES.values():
        for mount in service.get("volumes", ()):
            source = mount.split(":")[0]
            assert (ROOT / source).exists() if source.startswith("./") else source in COMPOSE["volumes"], mount
    for service in OURS.values():
        given = settings_of(service["environment"], monkeypatch)
        for url in filter(None, (given.database_url, given.redis_url)):
            assert re.split(r"[@/:]+", url)[-3] in SERVICES, "a host that no service has"


def test_nothing_listens_beyond_this_machine() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_no_secret_stands_in_the_file_and_none_has_a_default() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    for name in PASSWORDS:
        assert f"{name}: ${{{name}:?" in text
        assert f"{{{name}:-" not in text
    assert not re.search(r"PASSWORD: [^$]", text)


# The roles.


@pytest.fixture(scope="module")
def cluster() -> Iterator[PostgresServer]:
    """A server of its own, because roles belong to all databases of one; with the roles that compose makes."""
    server = PostgresServer(settings=QUICK).create().start()
    done = make_roles(server)
    assert done.returncode == 0, done.stderr
    assert "ecret" not in done.stdout + done.stderr
    yield server
    server.close()


def make_roles(server: PostgresServer) -> subprocess.CompletedProcess[str]:
    script = next(mount.split(":")[0] for mount in SERVICES["postgres"]["volumes"] if mount.startswith("./"))
    return subprocess.run(
        ["sh", ROOT / script],
        env={
            "PATH": f"{server.programs}:{os.environ['PATH']}",
            "PGHOST": "127.0.0.1",
            "PGPORT": str(server.port),
            "POSTGRES_USER": "postgres",
            "POSTGRES_DB": "postgres",
            "GATEWAY_PASSWORD": "it's-$ecret",
        },
        capture_output=True,
        text=True,
        check=False,
    )


def farebox(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one of our commands on a database, as a container would."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("FAREBOX_", "OPENAI_"))}
    return subprocess.run(
        [sys.executable, "-m", "gateway.cli", *arguments],
        env={**environ, "PYTHONPATH": str(ROOT), "FAREBOX_DATABASE_URL": url},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_roles_are_those_that_the_gateway_needs(cluster: PostgresServer) -> None:
    with psycopg.connect(cluster.url) as connection:
        found = connection.execute(
            "SELECT rolname, rolcanlogin, rolsuper OR rolcreatedb OR rolcreaterole OR rolreplication OR rolbypassrls,"
            " pg_has_role(oid, %s, 'USAGE') FROM pg_roles WHERE rolname LIKE 'farebox%%' ORDER BY 1",
            [GATEWAY_ROLE],
        ).fetchall()
    assert found == [("farebox_app", True, False, True), (GATEWAY_ROLE, False, False, True)]


def test_the_logins_role_can_be_made_after_a_migration(cluster: PostgresServer) -> None:
    with psycopg.connect(cluster.url, autocommit=True) as connection:
        connection.execute("DROP ROLE farebox_app")
    done = make_roles(cluster)
    assert done.returncode == 0, done.stderr
    test_the_roles_are_those_that_the_gateway_needs(cluster)


def test_the_owner_migrates_and_the_gateways_login_does_the_rest(cluster: PostgresServer) -> None:
    """The order of the compose file: the migration as the owner, then `init` as the gateway, which sees no rows
    before it names them, and edits no journal whatever it names."""
    owner = cluster.create_database()
    gateway = cluster.url_of(database_of(owner), user="farebox_app")
    assert "permission denied" in farebox(gateway, "init").stderr
    assert farebox(owner, "migrate").returncode == 0
    installed = farebox(gateway, "init", "--json")
    assert installed.returncode == 0, installed.stderr
    verified = farebox(gateway, "verify")
    assert "everything holds" in verified.stdout, verified.stderr
    with psycopg.connect(gateway, autocommit=True) as connection:
        for table in ("tenants", "api_keys", "ledger_wallet", "ledger_command"):
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,), table
        connection.execute("SELECT set_config('farebox.scopes', %s, false)", [f"{installed_tenant(installed)}/live"])
        assert connection.execute("SELECT count(*) > 0 FROM ledger_command").fetchone() == (True,)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("DELETE FROM ledger_command")


def installed_tenant(installed: subprocess.CompletedProcess[str]) -> str:
    tenant: str = json.loads(installed.stdout)["tenant_id"]
    return tenant
