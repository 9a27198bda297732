"""localstripe, an independent fake of parts of Stripe's API, as a process of its own on the loopback."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Final

import httpx

from tests.servers.ports import free_port

START_S: Final = 30.0
STOP_S: Final = 10.0
POLL_S: Final = 0.02

# Its own program listens on every interface, and keeps what it knows in one file that all its processes share.
PROGRAM: Final = """
import sys
from aiohttp import web
from localstripe import resources, server
resources.Store.dump_to_disk = lambda self: None
web.run_app(server.app, host="127.0.0.1", port=int(sys.argv[1]), print=None, access_log=None)
"""


@contextlib.contextmanager
def localstripe() -> Iterator[str]:
    """Its address, while it runs; it knows nothing at first."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(port)], stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_S
        while not _answers(url):
            assert process.poll() is None, "localstripe did not start"
            assert time.monotonic() < deadline, "localstripe does not answer"
            time.sleep(POLL_S)
        yield url
    finally:
        process.terminate()
        process.wait(STOP_S)


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/v1/events", trust_env=False).status_code == 401
    return False
