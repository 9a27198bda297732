"""Runs the examples of one page in their order, in a process and a folder of their own: see `tests/test_docs.py`.

It reads the examples as JSON and writes what became of each. Those in Python share one namespace, and those in shell
what they export, as on the page.
"""

import contextlib
import io
import json
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

SHELL_TIMEOUT_S = 60
EXPORTED = Path("exported.sh")
SESSION = f"""[ -f {EXPORTED} ] && . ./{EXPORTED}
trap 'export -p > {EXPORTED}' EXIT
"""
"""What makes several shells, one after the other, look like one."""


def main() -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    results = []
    for language, mark, text in json.load(sys.stdin):
        if language == "python":
            results.append(run_python(text, namespace))
        elif language == "sh":
            results.append(run_shell(text))
        else:
            Path(mark).write_text(text)
            results.append({"failure": None, "output": ""})
    json.dump(results, sys.stdout)


def run_python(text: str, namespace: dict[str, Any]) -> dict[str, str | None]:
    output = io.StringIO()
    failure = None
    try:
        with contextlib.redirect_stdout(output):
            exec(compile(text, "<page>", "exec"), namespace)
    except Exception:
        failure = traceback.format_exc()
    return {"failure": failure, "output": output.getvalue()}


def run_shell(text: str) -> dict[str, str | None]:
    done = subprocess.run(
        ["sh", "-euc", SESSION + text], capture_output=True, text=True, timeout=SHELL_TIMEOUT_S, check=False
    )
    failure = f"exit code {done.returncode}\n{done.stdout}{done.stderr}" if done.returncode else None
    return {"failure": failure, "output": done.stdout}


if __name__ == "__main__":
    main()
