"""One effect and one answer for one idempotency key, whoever repeats it and however often.

How it works. The key comes as the header `Idempotency-Key` or as `idempotency_key` in the body; its scope is tenant,
mode and operation, so that it survives a change of API keys. What moves credits hands the key to the ledger, which
keeps it with its effect for ever. What writes the gateway's own tables keeps key and answer in the same transaction
here: whoever comes second waits for the first, then reads the answer. A refusal is not kept: repeat it when the cause
is gone.
"""

import hashlib
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import msgspec
from fastapi import Request, Response
from pydantic import BaseModel
from sqlalchemy import select, update
from sqlmodel import col

from gateway.api.access import EXTRA_HEADERS
from gateway.api.services import Services
from gateway.api.wire import Body
from gateway.database import Joined, Transactions, insert_new, of
from gateway.errors import idempotency_key_reused, invalid_request
from gateway.identity.principals import Principal
from gateway.tables import KeptAnswer
from ledger.commands import Key

KEY_LENGTH_MAX: Final = 255
HEADER: Final = "idempotency-key"

V = TypeVar("V", bound=BaseModel)


def key_of(request: Request, body: Body | None, operation: str, *, about: str = "", change: bool = False) -> Key | None:
    """The request's idempotency key, None where it has none.

    Args:
        about: what the path says, when the same body means another thing on another path.
        change: what the body leaves out stays as it is, so that to send a default is to ask for something.

    Raises:
        ApiError: 400 for a malformed key, and for two that differ.
    """
    sent = request.headers.getlist(HEADER)
    if body is not None and body.idempotency_key is not None:
        sent.append(body.idempotency_key)
    if not sent:
        return None
    if len(set(sent)) > 1:
        raise invalid_request("The request carries two different idempotency keys.", param="idempotency_key")
    return key_named(sent[0], body, operation, about=about, change=change)


def key_named(key: str, body: Body | None, operation: str, *, about: str = "", change: bool = False) -> Key:
    """The idempotency key *key* of what *body* asks for.

    Raises:
        ApiError: 400 for a malformed key.
    """
    if not 1 <= len(key) <= KEY_LENGTH_MAX or not (key.isascii() and key.isprintable()) or key != key.strip():
        raise invalid_request(
            f"An idempotency key has 1 to {KEY_LENGTH_MAX} printable ASCII characters.", param="idempotency_key"
        )
    return Key(operation=operation, key=key, digest=_digest(body, about, change=change))


def _digest(body: Body | None, about: str, *, change: bool) -> str:
    """Stands for what was asked. What was not sent does not count, so that new fields change no digest; nor does what
    is left at its default, where to send that is the same."""
    asked: dict[str, Any] = {}
    if body is not None:
        asked = body.model_dump(
            mode="json", exclude={"idempotency_key"}, exclude_unset=change, exclude_defaults=not change
        )
    return hashlib.sha256(msgspec.json.encode([about, asked], order="deterministic")).hexdigest()


def mark_replayed(request: Request) -> None:
    request.scope.setdefault(EXTRA_HEADERS, []).append((b"x-idempotent-replayed", b"true"))


async def once(
    request: Request,
    response: Response,
    services: Services,
    principal: Principal,
    *,
    key: Key | None,
    act: Callable[[Transactions], Awaitable[V]],
    view: type[V],
    keep: Callable[[V], V] = lambda answer: answer,
) -> V:
    """Do *act* in one transaction with its key, or answer as it did before, with the same status.

    Args:
        act: may set the response's status.
        keep: what is kept of the answer, where a part of it is a secret.

    Raises:
        ApiError: 422 when the key stands for another request; what *act* raises, and then nothing is kept.
    """
    if key is None:
        return await act(services.database)
    row = {"tenant": principal.tenant_id, "mode": principal.mode, "operation": key.operation, "key": key.key}
    matches = [getattr(KeptAnswer, column) == value for column, value in row.items()]
    rows = of(principal.tenant_id, principal.mode)
    async with services.database.write(rows) as connection:
        claim = insert_new(KeptAnswer, connection.dialect.name)
        claimed = await connection.execute(
            claim, {**row, "digest": key.digest, "answer": None, "created_at_us": services.now_us()}
        )
        if claimed.rowcount:
            answer = await act(Joined(connection, rows))
            kept = {"status": response.status_code, "body": keep(answer).model_dump(mode="json")}
            await connection.execute(update(KeptAnswer).where(*matches).values(answer=kept))
            return answer
        query = select(col(KeptAnswer.digest), col(KeptAnswer.answer)).where(*matches)
        digest, kept = (await connection.execute(query)).one()
    if digest != key.digest:
        raise idempotency_key_reused()
    mark_replayed(request)
    response.status_code = kept["status"]
    return view.model_validate(kept["body"])
