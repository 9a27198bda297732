"""Requests to Stripe's API and its answers, as it reads and writes them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from tests.servers.stripe_objects import Object, new_id
from tests.servers.stripe_store import Refused


@dataclass(frozen=True)
class Asked:
    """A request as it came; *params* are nested as Stripe reads them, lists as dicts by their index."""

    method: str
    path: str
    params: Mapping[str, Any]
    idempotency_key: str | None = None
    version: str | None = None
    authorization: str | None = None


@dataclass(frozen=True)
class Answer:
    status: int
    body: Object
    replayed: bool = False


def read_form(text: str) -> dict[str, Any]:
    """`a[b][0]=c` as `{"a": {"b": {"0": "c"}}}`; of `a[]=b` the places count from 0."""
    params: dict[str, Any] = {}
    for name, value in parse_qsl(text, keep_blank_values=True):
        *outer, last = re.findall(r"[^\[\]]+|(?<=\[)(?=\])", name)
        place = params
        for key in outer:
            place = place.setdefault(key, {})
        place[last or str(len(place))] = value
    return params


def known(params: Mapping[str, Any], *names: str) -> None:
    for name in params:
        if name not in names:
            message = f"Received unknown parameter: {name}"
            raise Refused(400, message, code="parameter_unknown", param=name)


def required(params: Mapping[str, Any], *names: str) -> None:
    for name in names:
        if params.get(name) in (None, "", {}):
            raise Refused(400, f"Missing required param: {name}.", code="parameter_missing", param=name)


def request_id() -> str:
    return new_id("req_")[:18]
