"""The client is light, typed, and one in two forms."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

import farebox
from farebox import AsyncClient, AsyncReservation, Client, Reservation
from tests.e2e.farebox import ROOT, environment

IMPORTS = """
import sys
import httpx
before = {name.partition(".")[0] for name in sys.modules}
import farebox
after = {name.partition(".")[0] for name in sys.modules}
print(*sorted(after - before - sys.stdlib_module_names))
"""

USE = """
import farebox

client = farebox.Client()
granted: farebox.Granted = client.grant("alice", credits="0.5")
with client.reserve("alice", "image", 2) as task:
    settled: farebox.Settled = task.commit(2)
for line in client.transactions("alice"):
    amount: farebox.Credits = line.amount


async def main() -> None:
    client = farebox.AsyncClient()
    async with client.reserve("alice", "image", 2) as task:
        settled: farebox.Settled = await task.commit(2)
    held: farebox.AsyncReservation = await client.reserve("alice", credits=1)
    async for line in client.transactions("alice"):
        amount: farebox.Credits = line.amount
"""

WRONG = """
import farebox

client = farebox.Client()
client.grant("alice", credits=0.5)
client.grant(credits=1)
client.commit("rsv_1", unit=1)
client.credits("alice").balance = 1
client.no_such_call()
"""


def test_importing_it_imports_httpx_and_itself():
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], env=environment(), capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["farebox"]


def test_both_clients_have_the_same_methods_with_the_same_arguments():
    def methods(kind: type) -> dict[str, str]:
        public = {name: value for name, value in vars(kind).items() if not name.startswith("_") and callable(value)}
        return {name: str(inspect.signature(value).replace(return_annotation="")) for name, value in public.items()}

    assert methods(Client) == methods(AsyncClient)
    assert methods(Reservation) == methods(AsyncReservation)
    assert methods(Client).keys() >= {"grant", "credits", "check_entitlement", "record_usage", "reserve", "commit"}


def test_a_method_shows_the_arguments_that_it_takes():
    with Client("http://127.0.0.1:9/v1", "k") as client:
        assert [*inspect.signature(client.check_entitlement).parameters] == ["customer", "metric", "units"]
    assert [*inspect.signature(Reservation.release).parameters] == ["self", "idempotency_key"]


def test_every_method_says_what_it_does():
    for kind in (Client, AsyncClient):
        for name, value in vars(kind).items():
            if callable(value) and not name.startswith("_") and name != "close":
                assert inspect.getdoc(value), name


def test_the_core_neither_sends_nor_waits():
    package = Path(farebox.__file__).parent
    talks = {
        module.stem
        for module in package.glob("*.py")
        for node in ast.walk(ast.parse(module.read_text()))
        if isinstance(node, ast.Import) and {name.name for name in node.names} & {httpx.__name__}
    }
    assert talks == {"client", "async_client", "connection"}


def mypy(text: str, folder: Path) -> list[str]:
    (folder / "use.py").write_text(text)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--no-error-summary", "use.py"]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment(MYPYPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return done.stdout.splitlines()


def test_its_types_are_those_of_its_users(tmp_path: Path):
    assert (ROOT / "farebox" / "py.typed").exists()
    assert mypy(USE, tmp_path) == []
    lines = {int(line.split(":")[1]) for line in mypy(WRONG, tmp_path) if ": error:" in line}
    assert lines == {5, 6, 7, 8, 9}


def test_everything_that_is_exported_is_there():
    assert sorted(farebox.__all__) == farebox.__all__
    for name in farebox.__all__:
        assert hasattr(farebox, name)
    with pytest.raises(AttributeError):
        _ = farebox.gateway  # type: ignore[attr-defined]
