"""`farebox demo`: one command, and a curl line that works."""

import json
import shlex
import subprocess
from decimal import Decimal
from pathlib import Path

import httpx

from tests.e2e.farebox import Process

FIELDS = {"base_url", "live_key", "test_key", "admin_key", "tenant_id", "app_id", "user"}


def test_the_demo_prints_one_line_of_json_when_it_accepts_connections(tmp_path: Path) -> None:
    with Process("gateway.cli", "demo", "--port", "0", "--json", log=tmp_path / "demo", cwd=tmp_path) as demo:
        installed = json.loads(demo.line_with("base_url", of=lambda: demo.out))
        assert installed.keys() == FIELDS
        assert installed["base_url"].endswith("/v1")
        for key in ("live_key", "test_key"):
            answer = httpx.post(
                f"{installed['base_url']}/chat/completions",
                headers={"Authorization": f"Bearer {installed[key]}", "X-Quota-User": installed["user"]},
                json={"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello!"}]},
            )
            assert answer.status_code == 200, answer.text
            usage = answer.json()["usage"]
            assert Decimal(usage["cost"]) + Decimal(usage["balance"]) == 1000
            assert "x-ratelimit-limit" not in answer.headers, "the demo's rate limit is off"
        assert demo.stop() == 0, demo.err
        assert len(demo.out.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"demo.out", "demo.err"}, "nothing is left behind"


def test_the_demos_curl_line_works(tmp_path: Path) -> None:
    with Process("gateway.cli", "demo", "--port", "0", log=tmp_path / "demo", cwd=tmp_path) as demo:
        line = demo.line_with("curl ", of=lambda: demo.out)
        done = subprocess.run(shlex.split(line), capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert answer["choices"][0]["message"]["content"] == 'You said: "Hello!". This answer is simulated.'
        assert Decimal(answer["usage"]["cost"]) > 0
        assert demo.stop() == 0, demo.err
