"""OpenAI's SDKs, both major versions in use, work unchanged: base URL, key and header are all that differ."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import pytest

from tests.e2e.clients.sdk import World
from tests.e2e.farebox import ROOT, Farebox, Gateway, Upstream, environment, installed

SCRIPT: Final = Path(__file__).parent / "clients" / "sdk.py"
OPENAI2: Final = ROOT / ".venv" / "clients" / "openai2"
SCRIPT_S: Final = 120
CHECKS: Final = sorted(
    node.name
    for node in ast.parse(SCRIPT.read_text()).body
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("check_")
)


@dataclass(frozen=True, slots=True)
class Report:
    """What one version of the SDK said of each check."""

    version: str
    failures: dict[str, str | None]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Farebox, Gateway, Gateway]]:
    """A gateway, and one on the same file that lets one request a minute through."""
    folder = tmp_path_factory.mktemp("sdk")
    with Upstream(folder) as upstream, installed(folder / "installation", upstream.url) as farebox:
        yield farebox, farebox.serve(), farebox.serve(FAREBOX_RATE_LIMIT_PER_MINUTE="1")
        farebox.verify()


@pytest.fixture(scope="module", params=["2", "3"])
def report(request: pytest.FixtureRequest, served: tuple[Farebox, Gateway, Gateway]) -> Report:
    farebox, gateway, limited = served
    major = request.param
    world = World(
        base_url=gateway.base_url,
        limited_url=limited.base_url,
        live_key=farebox.live_key,
        # The limit is a key's; each version has one to itself.
        limited_key=farebox.live_key if major == "2" else farebox.test_key,
        admin_key=farebox.admin_key,
        user=farebox.user,
        pauper="pauper",
    )
    path = os.pathsep.join([str(OPENAI2), str(ROOT)] if major == "2" else [str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT), json.dumps(asdict(world))],
        env={**environment(), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=SCRIPT_S,
        check=False,
    )
    assert done.returncode == 0, f"make setup prepares the SDKs\n{done.stderr}"
    version, *checks = (json.loads(line) for line in done.stdout.splitlines())
    assert version["version"].startswith(f"{major}."), f"make setup prepares the SDKs: {version}"
    return Report(version["version"], {line["check"]: line["failure"] for line in checks})


@pytest.mark.parametrize("check", CHECKS)
def test_the_sdk_works_unchanged(report: Report, check: str) -> None:
    failure = report.failures[check]
    assert failure is None, f"openai {report.version}\n{failure}"
