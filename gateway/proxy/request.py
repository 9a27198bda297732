"""A chat request as it came: the few fields that the meter needs, and the body to forward.

How it works. The body is taken apart at its top level only; each value stays the bytes that the client sent, so that
what we do not know passes untouched. What is forwarded is put together again from these values: a field that stands
twice stands once then, and the upstream cannot read another ``max_tokens`` than we did.
"""

from typing import Final, TypeVar

import msgspec

from gateway.errors import invalid_request

MODEL_LENGTH_MAX: Final = 256
CHOICES_MAX: Final = 128
OUTPUT_TOKENS_MAX: Final = 10_000_000
"""No model writes more; a larger limit is a mistake, and would only inflate the quote."""

LIMIT_FIELDS: Final = ("max_completion_tokens", "max_tokens")

T = TypeVar("T")

_TOP: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_LIST: Final = msgspec.json.Decoder(list[msgspec.Raw])
_TEXT: Final = msgspec.json.Decoder(str)
_WHOLE: Final = msgspec.json.Decoder(int | None)
_FLAG: Final = msgspec.json.Decoder(bool | None)
_OBJECT: Final = msgspec.json.Decoder(dict[str, msgspec.Raw] | None)
_WORDS: Final = msgspec.json.Decoder(list[str] | None)
_NULL: Final = msgspec.Raw(b"null")
_TRUE: Final = msgspec.Raw(b"true")


class ChatRequest(msgspec.Struct, frozen=True):
    """One chat completion.

    Attributes:
        fields: every top-level field, as it came.
        output_tokens_max: the client's own limit on one choice, None when it set none.
        limit_field: the field that the limit came in.
        wants_usage: the client asked for the usage chunk of a stream.
        audio: the answer may be audio.
    """

    fields: dict[str, msgspec.Raw]
    model: str
    messages: list[msgspec.Raw]
    stream: bool
    choices: int
    output_tokens_max: int | None
    limit_field: str | None
    wants_usage: bool
    audio: bool

    def part(self, name: str) -> msgspec.Raw | None:
        """A field as it came, such as ``tools``; None where it is missing or null."""
        raw = self.fields.get(name)
        return None if raw is None or bytes(raw) == b"null" else raw

    def body(self, *, model: str, ask_usage: bool, output_tokens_max: int | None, limit_field: str) -> bytes:
        """The JSON to forward.

        Args:
            ask_usage: ask a stream for its usage chunk; else ``stream_options`` is left out of it.
            output_tokens_max: a lower limit on a choice than the client's; it goes into the field that the client
                sent, else into *limit_field*.
        """
        fields = self.fields
        changes: dict[str, msgspec.Raw] = {}
        if model != self.model:
            changes["model"] = msgspec.Raw(msgspec.json.encode(model))
        if output_tokens_max is not None:
            limit = msgspec.Raw(str(output_tokens_max).encode())
            changes.update({name: limit for name in LIMIT_FIELDS if self.part(name) is not None})
            if self.limit_field is None:
                changes[limit_field] = limit
        if self.stream and ask_usage:
            options = _OBJECT.decode(fields.get("stream_options", _NULL)) or {}
            changes["stream_options"] = msgspec.Raw(msgspec.json.encode({**options, "include_usage": _TRUE}))
        forwarded = {**fields, **changes}
        if not ask_usage:
            forwarded.pop("stream_options", None)
        return msgspec.json.encode(forwarded)


def parse_chat(body: bytes) -> ChatRequest:
    """Take a chat request apart.

    Raises:
        ApiError: 400 `invalid_request`; its param names the field.
    """
    try:
        if not body.isascii():
            body.decode()  # What we do not read is looked at by nobody else before the upstream.
        fields = _TOP.decode(body)
    except (msgspec.ValidationError, RecursionError):
        raise invalid_request("The body must be a JSON object, not nested deeper than any request needs.") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise invalid_request("The body is not valid JSON in UTF-8.") from None
    model = _field(fields, "model", _TEXT, "a string")
    if not 0 < len(model) <= MODEL_LENGTH_MAX or not model.isprintable():
        raise invalid_request(f"model must be a name of 1 to {MODEL_LENGTH_MAX} characters.", param="model")
    messages = _field(fields, "messages", _LIST, "a list of messages")
    if not messages:
        raise invalid_request("messages must have at least one message.", param="messages")
    limits = {name: _whole(fields, name, 1, OUTPUT_TOKENS_MAX) for name in LIMIT_FIELDS}
    given = {name: limit for name, limit in limits.items() if limit is not None}
    options = _field(fields, "stream_options", _OBJECT, "an object", optional=True) or {}
    modalities = _field(fields, "modalities", _WORDS, "a list of strings", optional=True) or []
    return ChatRequest(
        fields=fields,
        model=model,
        messages=messages,
        stream=bool(_field(fields, "stream", _FLAG, "true or false", optional=True)),
        choices=_whole(fields, "n", 1, CHOICES_MAX) or 1,
        output_tokens_max=max(given.values(), default=None),
        limit_field=next(iter(given), None),
        wants_usage=bool(_field(options, "include_usage", _FLAG, "true or false", optional=True)),
        audio="audio" in modalities,
    )


def _field(
    fields: dict[str, msgspec.Raw], name: str, decoder: msgspec.json.Decoder[T], kind: str, *, optional: bool = False
) -> T:
    raw = fields.get(name)
    if raw is None and not optional:
        raise invalid_request(f"{name} is missing.", param=name)
    try:
        return decoder.decode(_NULL if raw is None else raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise invalid_request(f"{name} must be {kind}.", param=name) from None


def _whole(fields: dict[str, msgspec.Raw], name: str, least: int, most: int) -> int | None:
    kind = f"a whole number of {least} to {most}"
    number: int | None = _field(fields, name, _WHOLE, kind, optional=True)
    if number is not None and not least <= number <= most:
        raise invalid_request(f"{name} must be {kind}.", param=name)
    return number
