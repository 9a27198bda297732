"""The command line as its users run it: real processes, a real file, real signals."""

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import httpx
import pytest

from gateway.cli import main
from gateway.settings import Settings
from gateway.supervisor import Supervisor
from tests.gateway.conftest import STORES
from tests.gateway.rig import DATABASE

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 60
INSTALLED = {"base_url", "live_key", "test_key", "admin_key", "tenant_id", "app_id", "user"}
QUESTION = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello!"}]}


def environment(folder: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FAREBOX_", "OPENAI_"))}
    return {**kept, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder), **more}


NOBODY_THERE = "postgresql://a:hunter2@127.0.0.1:1/c"
on_every_store = pytest.mark.parametrize("store", STORES, indirect=True)


class Run(Protocol):
    """Run a command to its end: its output; all of it, when it is to fail with *code*."""

    def __call__(self, *arguments: str, code: int = 0, **environ: str) -> str: ...


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """In this process, because a new one takes a second to import everything."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("FAREBOX_", "OPENAI_"))]:
        monkeypatch.delenv(name)
    if (tmp_path / DATABASE).exists():
        monkeypatch.setenv("FAREBOX_DATABASE_URL", (tmp_path / DATABASE).read_text())

    def run(*arguments: str, code: int = 0, **environ: str) -> str:
        with monkeypatch.context() as given:
            given.setattr(sys, "argv", ["farebox", *arguments])
            for name, value in environ.items():
                given.setenv(name, value)
            with pytest.raises(SystemExit) as end:
                main()
        printed = capsys.readouterr()
        assert (end.value.code or 0) == code, printed
        return printed.out if code == 0 else printed.out + printed.err

    return run


@contextlib.contextmanager
def started(folder: Path, *arguments: str, line: str, **more: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A command that serves, and the line of its output that has *line* in it, as soon as it comes."""
    out = folder / f"{'-'.join(arguments[:1])}-{time.monotonic_ns()}.out"
    with out.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "gateway.cli", *arguments],
            cwd=folder,
            env=environment(folder, **more),
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:

        def found() -> list[str]:
            assert process.poll() is None, out.read_text()
            return [text for text in out.read_text().splitlines() if line in text]

        until(found)
        yield process, found()[0]
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(WAIT_S)


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


def stop(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> int:
    process.send_signal(number)
    return process.wait(WAIT_S)


def headers(installed: dict[str, str], key: str = "live_key") -> dict[str, str]:
    return {"Authorization": f"Bearer {installed[key]}", "X-Quota-User": installed["user"]}


def test_help_is_everywhere_and_imports_nothing_that_is_slow(tmp_path: Path):
    code = """
import sys
from gateway.cli import main
commands = ["", "serve", "demo", "init", "migrate", "verify", "copy", "grant", "statement"]
commands += ["keys", "keys list", "keys create", "keys revoke"]
commands += ["tenants", "tenants list", "tenants create", "tenants change"]
commands += ["prices", "prices list", "prices show", "prices check"]
commands += ["stripe", "stripe reconcile", "accounting", "accounting export"]
for command in commands:
    sys.argv = ["farebox", *command.split(), "--help"]
    try:
        main()
    except SystemExit as end:
        assert not end.code
slow = {"fastapi", "sqlalchemy", "aiohttp", "genai_prices", "tiktoken", "uvicorn", "msgspec"} & sys.modules.keys()
assert not slow, slow
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: farebox") == 25


@on_every_store
def test_init_prints_what_is_needed_once(tmp_path: Path, run: Run):
    lines = run("init", "--json").splitlines()
    installed = json.loads(lines[0])
    assert len(lines) == 1
    assert installed.keys() == INSTALLED
    assert installed["base_url"] == "http://127.0.0.1:8080/v1"
    assert installed["live_key"].startswith("fb_live_")
    assert "first tenant already" in run("init", code=1)
    for mode in ("live", "test"):
        for owner in (installed["user"], installed["app_id"]):
            statement = json.loads(run("statement", owner, "--mode", mode, "--json"))
            assert statement["balance_decimal"] == "1000"
    assert "everything holds" in run("verify")


def test_demo_serves_what_it_prints_and_leaves_nothing(tmp_path: Path, run: Run):
    with started(tmp_path, "demo", "--port", "0", "--json", line="base_url") as (process, line):
        installed = json.loads(line)
        assert installed.keys() == INSTALLED
        for key in ("live_key", "test_key"):
            answer = httpx.post(
                f"{installed['base_url']}/chat/completions",
                json=QUESTION,
                headers=headers(installed, key),
                timeout=WAIT_S,
            )
            assert answer.status_code == 200, answer.text
            assert float(answer.json()["usage"]["balance"]) > 999
            developer = httpx.get(
                f"{installed['base_url']}/funding", headers=headers(installed, key), timeout=WAIT_S
            ).json()
            assert developer["developer"]["balance_decimal"] == "1000"
        assert not [name for name in answer.headers if name.startswith("x-ratelimit")]
        port = installed["base_url"].rpartition(":")[2].removesuffix("/v1")
        assert f"Port {port} on 127.0.0.1 cannot be listened on" in run("demo", "--port", port, code=1)
        assert stop(process) == 0
    assert not list(tmp_path.glob("farebox-demo-*"))


def test_the_demos_curl_line_works(tmp_path: Path):
    with started(tmp_path, "demo", "--port", "0", line="curl ") as (process, line):
        answer = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=WAIT_S, check=True)
        assert json.loads(answer.stdout)["choices"][0]["message"]["content"]
        assert stop(process, signal.SIGINT) == 0


def test_a_second_demo_on_the_same_database_prints_keys_that_work(tmp_path: Path, run: Run):
    shared = {"FAREBOX_DATABASE_URL": f"sqlite:///{tmp_path / 'kept.db'}"}
    users = []
    for _ in range(2):
        with started(tmp_path, "demo", "--port", "0", "--json", line="base_url", **shared) as (process, line):
            installed = json.loads(line)
            answer = httpx.post(
                f"{installed['base_url']}/chat/completions", json=QUESTION, headers=headers(installed), timeout=WAIT_S
            )
            assert answer.status_code == 200
            users.append((installed["tenant_id"], installed["app_id"], answer.json()["usage"]["balance"]))
            assert stop(process) == 0
    assert users[0] == users[1], "the same tenant, and the wallet was filled up"
    assert "everything holds" in run("verify", **shared)


def test_sigterm_lets_a_stream_finish_and_turns_new_requests_away(tmp_path: Path):
    with started(tmp_path, "demo", "--port", "0", "--json", line="base_url") as (process, line):
        installed = json.loads(line)
        slow = {**QUESTION, "stream": True, "simulate": {"tokens": 20, "chunk_delay_ms": 30}}
        with (
            httpx.Client(base_url=installed["base_url"], headers=headers(installed), timeout=WAIT_S) as client,
            client.stream("POST", "/chat/completions", json=slow) as answer,
        ):
            lines = answer.iter_lines()
            assert next(lines).startswith("data:")
            process.send_signal(signal.SIGTERM)
            rest = [text for text in lines if text]
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{installed['base_url']}/models", headers=headers(installed), timeout=WAIT_S)
        assert rest[-1] == "data: [DONE]"
        assert process.wait(WAIT_S) == 0


def test_a_stream_that_outlives_the_grace_is_charged_for_what_was_delivered(tmp_path: Path, run: Run):
    kept = {"FAREBOX_DATABASE_URL": f"sqlite:///{tmp_path / 'kept.db'}", "FAREBOX_SHUTDOWN_GRACE_S": "1"}
    with started(tmp_path, "demo", "--port", "0", "--json", line="base_url", **kept) as (process, line):
        installed = json.loads(line)
        endless = {**QUESTION, "stream": True, "simulate": {"tokens": 2000, "chunk_delay_ms": 50}}
        with (
            httpx.Client(base_url=installed["base_url"], headers=headers(installed), timeout=WAIT_S) as client,
            client.stream("POST", "/chat/completions", json=endless) as answer,
        ):
            lines = answer.iter_lines()
            assert next(lines).startswith("data:")
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(httpx.RemoteProtocolError):
                assert "data: [DONE]" not in list(lines)
        assert process.wait(WAIT_S) == 0
    statement = json.loads(run("statement", installed["user"], "--json", **kept))
    assert statement["data"][0]["type"] == "charge"
    assert "everything holds" in run("verify", **kept)


def test_serve_migrates_its_file_and_several_workers_share_the_work(tmp_path: Path, run: Run):
    installed = json.loads(run("init", "--json"))
    arguments = ("serve", "--port", "0", "--workers", "2")
    with started(tmp_path, *arguments, line="Farebox serves") as (process, line):
        base_url = line.rpartition(" ")[2]
        for _ in range(6):
            answer = httpx.post(
                f"{base_url}/chat/completions", json=QUESTION, headers=headers(installed, "test_key"), timeout=WAIT_S
            )
            assert answer.status_code == 200
        metrics = httpx.get(f"{base_url.removesuffix('/v1')}/metrics", timeout=WAIT_S).text
        assert 'farebox_requests_total{method="POST",route="/v1/chat/completions",status="200"} 6.0' in metrics
        worker = children(process.pid)[0]
        os.kill(worker, signal.SIGKILL)
        until(lambda: len(set(children(process.pid)) - {worker}) == 2)
        answer = httpx.post(f"{base_url}/chat/completions", json=QUESTION, headers=headers(installed, "test_key"))
        assert answer.status_code == 200
        orphans = children(process.pid)
        assert stop(process) == 0
        assert not [orphan for orphan in orphans if alive(orphan)]
    assert "everything holds" in run("verify")


def test_serve_warns_where_no_money_comes_for_live_credits(tmp_path: Path):
    stripe = {"FAREBOX_STRIPE_SECRET_KEY": "sk_test_a", "FAREBOX_STRIPE_WEBHOOK_SECRET": "whsec_a"}
    with started(tmp_path, "serve", "--port", "0", line="Stripe's key is a test key", **stripe) as (process, line):
        assert "no money comes for it" in line
        assert stop(process) == 0


def test_workers_that_cannot_start_are_not_announced(tmp_path: Path):
    (tmp_path / "farebox.toml").write_text('models = [{name = "a", price = {input = "99999999999", output = "1"}}]')
    command = (sys.executable, "-m", "gateway.cli", "serve", "--port", "0", "--workers", "2")
    config = {"FAREBOX_CONFIG": "farebox.toml", "FAREBOX_DEFAULT_UPSTREAM": "simulated"}
    environ = environment(tmp_path, **config)
    done = subprocess.run(
        command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False, timeout=WAIT_S
    )
    assert done.returncode == 1
    assert "the price of a" in done.stderr
    assert "Farebox serves" not in done.stderr


def test_a_supervisor_that_is_to_stop_starts_no_further_worker():
    with socket.socket() as listener:
        supervisor = Supervisor(Settings(workers=2), listener)
        supervisor._stop(signal.SIGTERM, None)
        supervisor._fork()
        assert not supervisor._workers


def test_workers_do_not_outlive_a_supervisor_that_was_killed(tmp_path: Path):
    with started(tmp_path, "serve", "--port", "0", "--workers", "2", line="Farebox serves") as (process, _):
        workers = children(process.pid)
        stop(process, signal.SIGKILL)
        until(lambda: not [worker for worker in workers if alive(worker)])


def children(parent: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def alive(process: int) -> bool:
    """Whether it runs; a zombie that nobody has waited for does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_a_busy_port_is_told_before_anything_is_done(tmp_path: Path, run: Run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert "Choose another with --port" in run("serve", "--port", port, code=1)
    assert not list(tmp_path.glob("farebox.db*"))


@pytest.mark.parametrize(
    ("arguments", "environ", "code", "said"),
    [
        (("migrate",), {"FAREBOX_PORT": "many"}, 2, "FAREBOX_PORT"),
        (("migrate", "--config", "nowhere.toml"), {}, 2, "nowhere.toml"),
        (("serve",), {"FAREBOX_DATABASE_URL": "mysql://a:hunter2@b/c"}, 2, "postgresql://"),
        (("serve", "--port", "0"), {"FAREBOX_DATABASE_URL": NOBODY_THERE}, 1, "host and port"),
        (("migrate",), {"FAREBOX_DATABASE_URL": NOBODY_THERE}, 1, "host and port"),
        (("serve", "--port", "70000"), {}, 2, "--port"),
        (("nonsense",), {}, 2, "nonsense"),
        (("verify",), {}, 1, "farebox init"),
        (("grant", "alice", "1"), {}, 1, "farebox init"),
        (("grant", "alice", "a lot"), {}, 2, "a lot"),
        (("grant", "alice", "1", "--expires-at", "2036-01-01"), {}, 2, "time zone"),
        (("grant", "alice", "1", "--expires-at", "9999-12-31T23:59:59-14:00"), {}, 2, "9000"),
        (("migrate",), {"FAREBOX_DATABASE_URL": "sqlite:////dev/null/farebox.db"}, 1, "cannot be used"),
        (("prices", "show", "nobody-sells-this"), {}, 1, "nobody-sells-this"),
        (("keys", "create", "--scope", "everything"), {}, 2, "credits:read"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(
    run: Run, arguments: tuple[str, ...], environ: dict[str, str], code: int, said: str
):
    output = run(*arguments, code=code, **environ)
    assert said in output
    assert "hunter2" not in output


@on_every_store
def test_tenants_keys_and_grants(run: Run):
    installed = json.loads(run("init", "--json"))
    beta = json.loads(run("tenants", "create", "Beta", "--unfunded-limit", "5", "--json"))
    listed = json.loads(run("tenants", "list", "--json"))
    assert [tenant["unfunded_limit"] for tenant in listed] == [None, 5_000_000_000]
    assert "Beta" in run("tenants", "list")
    opened = run("tenants", "change", beta["id"], "--when-ledger-is-down", "open", "--open-allowance", "50")
    assert "up to 50 credits" in opened
    closed = run("tenants", "change", beta["id"], "--when-ledger-is-down", "closed")
    assert "refused" in closed
    giving = run("tenants", "change", beta["id"], "--default-grant", "2.5", "--default-grant-days", "30")
    assert "Each new customer gets 2.5 credits" in giving
    assert run("grant", "carol", "1", "--tenant", beta["id"]).strip().endswith("has 3.5.")
    assert "Each new customer" not in run("tenants", "change", beta["id"], "--default-grant", "0")
    assert run("grant", "dave", "1", "--tenant", beta["id"]).strip().endswith("has 1.")
    assert "--default-grant as well" in run("tenants", "change", beta["id"], "--default-grant-days", "1", code=2)

    key = json.loads(run("keys", "create", "--tenant", beta["id"], "--mode", "test", "--json"))
    assert key["key"].startswith("fb_test_")
    assert run("keys", "create", "--mode", "admin").startswith("fb_admin_")
    assert "Revoked" in run("keys", "revoke", key["id"], "--tenant", beta["id"])
    assert "There is no key" in run("keys", "revoke", key["id"], code=1)
    keys = json.loads(run("keys", "list", "--tenant", beta["id"], "--json"))
    assert [(one["id"], one["revoked_at_us"] is None) for one in keys] == [(key["id"], False)]

    for _ in range(2):
        granted = json.loads(run("grant", "alice", "12.5", "--key", "once", "--json"))
        assert granted["balance_decimal"] == "12.5"
    assert "key" in run("grant", "alice", "13", "--key", "once", code=1)
    assert "has 12.5" in run("statement", "alice")
    assert "There is no customer" in run("statement", "nobody", code=1)
    assert "1012.5" in run("grant", installed["app_id"], "12.5")


@on_every_store
def test_a_grant_that_no_wallet_can_hold_is_refused(run: Run):
    run("init")
    for arguments, said in (
        (("1", "--priority", "1000000000000000000000"), "priority"),
        (("4611686019",), "hold"),
        (("0",), "out of bounds"),
        (("1", "--expires-at", "2020-01-01T00:00:00Z"), "out of bounds"),
    ):
        assert said in run("grant", "alice", *arguments, code=2 if said == "hold" else 1)


def test_verify_finds_a_balance_that_was_edited(tmp_path: Path, run: Run):
    run("init")
    with sqlite3.connect(tmp_path / "farebox.db") as connection:
        changed = connection.execute(
            "UPDATE ledger_block SET granted = granted + 1, consumed = consumed + 1 WHERE source = 'welcome'"
        )
        assert changed.rowcount == 4
    connection.close()
    report = json.loads(run("verify", "--json", code=1))
    assert report["ok"] is False
    assert len(report["violations"]) >= 4
    assert "violations" in run("verify", code=1)


def test_prices_are_listed_shown_and_checked(tmp_path: Path, run: Run):
    config = tmp_path / "farebox.toml"
    config.write_text(
        """
        [[upstreams]]
        name = "mine"
        base_url = "http://127.0.0.1:9/v1"
        [[models]]
        name = "gpt-4o-mini"
        [[models]]
        name = "own"
        price = { input = "1.5", output = "2" }
        """
    )
    shown = json.loads(run("prices", "show", "gpt-4o-mini", "--json"))
    assert (shown["rates"]["input"], shown["rates"]["output"]) == ("0.15", "0.6")
    own = json.loads(run("prices", "list", "own", "--config", str(config), "--json"))
    assert [price["rates"]["input"] for price in own if price["model"] == "own"] == ["1.5"]
    assert "gpt-4o-mini" in run("prices", "list", "gpt-4o-mini")
    assert "have a price" in run("prices", "check", "--config", str(config))
    config.write_text(config.read_text() + '[[models]]\nname = "nobody-sells-this"\n')
    assert "nobody-sells-this" in run("prices", "check", "--config", str(config), code=1)
