"""A transcript of HTTP, as a walk-through shows it: requests with their bodies, and what must come back.

    POST /v1/usage
    Idempotency-Key: usage:msg-1
    {"customer_id": "cus_...", "billable_metric_key": "chat_message", "units": 1}
    -> 202 {"credits_used": 1000}

An answer may have more members than are shown. `cus_...` is the customer that was created; `<name>` is what the test
says, or what an earlier answer had as `"<name>"`.
"""

import json
import re
from typing import Any

import httpx

REQUEST = re.compile(
    r"^(GET|POST|PATCH|DELETE) (\S+)((?:\n[\w-]+: .+)*)((?:\n(?!->).*)*)\n-> (\d+)((?:\n?(?!\n).*)*)", re.MULTILINE
)


class Transcript:
    """Runs transcripts one after the other against one gateway."""

    def __init__(self, base_url: str, key: str, **names: str) -> None:
        self._client = httpx.Client(base_url=base_url, headers={"Authorization": f"Bearer {key}"}, timeout=30)
        self.names = names

    def run(self, text: str, **names: str) -> Any:
        """Every request in its order; the last answer's body."""
        self.names |= names
        body: Any = None
        found = list(REQUEST.finditer(text))
        assert len(found) == text.count("-> "), "a request of the transcript was not understood"
        for match in found:
            method, path, headers, sent, status, wanted = match.groups()
            lines = (line.partition(": ") for line in self._named(headers).strip().splitlines())
            answer = self._client.request(
                method,
                self._named(path),
                headers={name: value for name, _, value in lines},
                content=self._named(sent).strip() or None,
            )
            assert answer.status_code == int(status), f"{method} {path}: {answer.status_code} {answer.text}"
            body = answer.json()
            if wanted.strip():
                self._compare(json.loads(self._named(wanted, keep=True)), body, f"{method} {path}")
        return body

    def close(self) -> None:
        self._client.close()

    def _named(self, text: str, *, keep: bool = False) -> str:
        """*text* with the names put in; with *keep*, those that nobody has said yet stay."""
        for name, value in self.names.items():
            text = text.replace(name if name.endswith("...") else f"<{name}>", value)
        assert keep or not re.search(r"<\w+>|\.\.\.", text), text
        return text

    def _compare(self, wanted: Any, given: Any, place: str) -> None:
        if isinstance(wanted, dict):
            for name, value in wanted.items():
                assert name in given, f"{place}: no {name} in {given}"
                self._compare(value, given[name], f"{place} {name}")
        elif isinstance(wanted, list):
            assert len(wanted) == len(given), f"{place}: {given}"
            for index, (one, other) in enumerate(zip(wanted, given, strict=True)):
                self._compare(one, other, f"{place} {index}")
        elif isinstance(wanted, str) and (wanted.endswith("...") or wanted.startswith("<")):
            self.names[wanted if wanted.endswith("...") else wanted.strip("<>")] = given
        else:
            assert wanted == given, f"{place}: {given}"
