"""Run the simulated upstream: `python -m gateway.proxy.simulated --port N`."""

import argparse
import contextlib
from pathlib import Path

import uvloop

from gateway.proxy.simulated.server import serve_simulated


async def _serve(host: str, port: int, log: Path | None) -> None:
    with contextlib.ExitStack() as stack:
        if log is None:
            server = await serve_simulated(host, port)
        else:
            file = stack.enter_context(log.open("a", buffering=1, encoding="utf-8"))
            server = await serve_simulated(host, port, witness=lambda event, name: print(event, name, file=file))
        print(server.url, flush=True)  # noqa: T201
        await server.serve_forever()


def main() -> None:
    """Serve until interrupted; the base URL goes to standard output as soon as it accepts connections."""
    parser = argparse.ArgumentParser(prog="python -m gateway.proxy.simulated", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=0, help="port to listen on (default: a free one)")
    parser.add_argument("--log", type=Path, help="append what comes and goes to this file: an event and a request id")
    arguments = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(_serve(arguments.host, arguments.port, arguments.log))


if __name__ == "__main__":
    main()
