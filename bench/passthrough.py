"""The bare pass-through: the gateway's server and its upstream client, and nothing between them. What metering adds
is measured against this.

    python -m bench.passthrough --port 9200 --upstream http://127.0.0.1:9100/v1
"""

import argparse
from typing import Final

import uvicorn

from gateway.proxy.exchange import Receive, Scope, Send
from gateway.proxy.upstream import HTTPUpstream, UpstreamRequest

ANSWER_BYTES_MAX: Final = 64 * 2**20


class PassThrough:
    """Forwards each request body and passes the answer on, whole or as it comes."""

    def __init__(self, upstream: HTTPUpstream) -> None:
        self._upstream = upstream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        stream = b'"stream":true' in body
        response = await self._upstream.send(
            UpstreamRequest(path="/chat/completions", body=body, stream=stream, request_id="bench")
        )
        if not stream:
            answer = await response.read(ANSWER_BYTES_MAX)
            headers = [*response.headers, (b"content-length", b"%d" % len(answer))]
            await send({"type": "http.response.start", "status": response.status, "headers": headers})
            await send({"type": "http.response.body", "body": answer})
            return
        await send({"type": "http.response.start", "status": response.status, "headers": response.headers})
        async for chunk in response.chunks():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream", required=True)
    options = parser.parse_args()
    app = PassThrough(HTTPUpstream(name="mock", base_url=options.upstream, api_key=None))
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=options.port,
        loop="uvloop",
        http="httptools",
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
    )


if __name__ == "__main__":
    main()
