"""The log: one JSON object a line, with no secret, prompt or answer in it.

How it works. What we log is chosen that way, and three things stand behind it, because an exception's text may quote
anything. Of an exception only the type, the places and the first line of its message are written: databases quote whole
rows in the lines below. The secrets that the settings hold are taken out by value, wherever they stand. And whatever
looks like a key or a password is masked by its form.
"""

import json
import logging
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from types import TracebackType
from typing import IO, Any, Final
from urllib.parse import unquote, urlsplit

import msgspec
import structlog
from pydantic import SecretStr

from gateway.proxy.journey import Journey
from gateway.settings import Settings

MESSAGE_LENGTH_MAX: Final = 300
"""Of an exception's message."""

EVENT_LENGTH_MAX: Final = 2000
"""Of what another library says in a line; asyncio quotes whole exceptions in it."""

SECRET_LENGTH_MIN: Final = 6
"""A shorter secret is no secret, and would be found in innocent words."""

CHATTY: Final = (
    *("uvicorn.error", "uvicorn", "asyncio", "alembic", "aiosqlite", "sqlalchemy"),
    *("urllib3", "httpx", "httpx2", "httpcore", "stripe"),
)
"""Libraries that tell at `info` what nobody asked for; some of them, the address of each request, and at `debug` all
that it says."""

_SCHEMES: Final = r"[a-z][a-z0-9+.-]*"
SECRETS: Final = re.compile(
    r"\b(fb_(?:live|test|admin)_[0-9a-z]{4})[0-9a-z_]+"
    r"|\b((?:sk|rk|pk|whsec|gsk|xai|hf|pplx|nvapi)[-_][A-Za-z0-9]{2})[A-Za-z0-9_-]{8,}"
    r"|\b((?:AIza|AKIA)[A-Za-z0-9]{2})[A-Za-z0-9_-]{8,}"
    rf"|((?i:{_SCHEMES})://[^\s:/@\"]*:)[^\s\"]+(?=@)"
    r"|(?i:(\b(?:bearer|basic)\s+\S{4}))\S+"
    r"|(?i:(\b(?:[a-z]*password|passwd|pwd|api[-_]?key|access[-_]?token|token|secret)[\"'\\]*\s*[=:]\s*[\"'\\]*))"
    r"[^\s\"'&,;)\\]+"
)


def masked(text: str) -> str:
    """*text* without the secret part of anything that looks like a key or a password."""
    return SECRETS.sub(lambda match: next(part for part in match.groups() if part is not None) + "…", text)


def secrets_of(settings: Settings) -> tuple[str, ...]:
    """Every secret in the settings, longest first, as it may stand in a text."""
    found = {secret for value in settings for secret in _secrets_in(value[1])}
    for url in (settings.database_url, settings.redis_url):
        if url is not None and (password := urlsplit(url).password):
            found |= {password, unquote(password)}
    written = {form for secret in found for form in (secret, json.dumps(secret)[1:-1])}
    return tuple(sorted((each for each in written if len(each) >= SECRET_LENGTH_MIN), key=len, reverse=True))


def _secrets_in(value: Any) -> Iterator[str]:
    """The secrets in a setting, however deep."""
    if isinstance(value, SecretStr):
        yield value.get_secret_value()
    elif isinstance(value, dict):
        for each in value.values():
            yield from _secrets_in(each)
    elif isinstance(value, tuple):
        for each in value:
            yield from _secrets_in(each)
    elif hasattr(value, "model_fields_set"):
        for _, each in value:
            yield from _secrets_in(each)


def configure_logging(level: str, *, stream: IO[str] | None = None, secrets: Iterable[str] = ()) -> None:
    """Send structlog's and the standard library's records to *stream* (stderr) as JSON, without any of *secrets*."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.ExceptionRenderer(_told),
    ]
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[structlog.stdlib.ExtraAdder(["websocket"]), *shared],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _Renderer(tuple(secrets))],
    )
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    logging.getLogger("opentelemetry").setLevel(logging.ERROR)  # It warns of each attempt to reach a collector.
    for chatty in CHATTY:
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))


class _Renderer:
    """The last step of every line."""

    def __init__(self, secrets: tuple[str, ...]) -> None:
        self._secrets = re.compile("|".join(map(re.escape, secrets))) if secrets else None

    def __call__(self, _logger: object, _name: str, event: Any) -> str:
        event.pop("color_message", None)
        event["event"] = str(event["event"])[:EVENT_LENGTH_MAX]
        written = structlog.processors.JSONRenderer(ensure_ascii=False)(_logger, _name, event)
        assert isinstance(written, str)
        return masked(self._secrets.sub("…", written) if self._secrets else written)


ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None]


def _told(exc_info: ExcInfo) -> str:
    """An exception and those that led to it: types, places and the first lines of their messages."""
    return "\n".join(_lines(exc_info[1], set()))


def _lines(error: BaseException, seen: set[int]) -> Iterator[str]:
    seen.add(id(error))
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None and id(before) not in seen:
        yield from _lines(before, seen)
        yield "which led to:"
    for frame in traceback.extract_tb(error.__traceback__):
        yield f"  {frame.filename}:{frame.lineno} in {frame.name}"
    message = str(error).split("\n", 1)[0][:MESSAGE_LENGTH_MAX]
    yield f"{type(error).__qualname__}: {message}"
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from _lines(each, seen)


class AccessLine(msgspec.Struct):
    """One proxied request in the access log. Whose it was stands in its receipt, which the id names."""

    timestamp: str
    request_id: str
    route: str
    status: int
    took_ms: float
    upstream_ms: float
    model: str | None
    stream: bool
    upstream: str | None
    ending: str | None
    code: str | None
    trace_id: str | None
    level: str = "info"
    logger: str = "farebox.access"
    event: str = "request"


class AccessLog:
    """Writes a line for each proxied request. About 5 us: it does not go the way of the other lines, which is longer.

    Args:
        stream: the log's own, so that its lines stand among the others.
    """

    def __init__(self, stream: IO[bytes] | None = None) -> None:
        self._stream = stream or sys.stderr.buffer

    def write(self, journey: Journey, route: str) -> None:
        """Nothing in the line is a secret: the model is one that is served, and yet its name is masked."""
        line = AccessLine(
            timestamp=datetime.now(UTC).isoformat(timespec="milliseconds"),
            request_id=journey.request_id,
            route=route,
            status=journey.status,
            took_ms=round(journey.took_s * 1000, 2),
            upstream_ms=round(journey.upstream_s * 1000, 2),
            model=None if journey.model is None else masked(journey.model),
            stream=journey.stream,
            upstream=journey.attempts[-1].upstream if journey.attempts else None,
            ending=journey.ending,
            code=journey.code,
            trace_id=journey.trace.trace_id,
        )
        self._stream.write(msgspec.json.encode(line) + b"\n")
        self._stream.flush()
