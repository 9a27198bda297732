"""A chat request as the simulated upstream understands it, and the `simulate` object by which a test directs it."""

import re
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

TOKENS_MAX: Final = 100_000
"""Of one answer, all its choices together."""
CHUNK_BYTES_MAX: Final = 16 * 1024 * 1024
TEXT_LENGTH_MAX: Final = 256 * 1024
EXTRA_BYTES_MAX: Final = 64 * 1024
_DelayMs = Annotated[int, Meta(ge=0, le=60_000)]
_Count = Annotated[int, Meta(ge=0, le=TOKENS_MAX)]


class Directive(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The request's `simulate` object. Without it the answer is quick, short and faultless.

    Attributes:
        text: the answer, in each choice.
        tokens: the answer's length instead, in simulated tokens.
        chunk_bytes: the answer is one content chunk of so many bytes.
        usage: what to report, exactly so; null reports none.
        in_choice_chunk: a stream reports its usage in its last chunk with a choice, asked for or not.
        hidden_reasoning_tokens: of each choice; they count towards its limit and in its usage and do not show.
        extra: fields to add to the body, or to every chunk.
        echo: the body as it was received, in the field `echo` of the answer or of the stream's first chunk.
        first_byte_delay_ms, chunk_delay_ms: before anything is sent, and between two events of a stream.
        status, retry_after: answer with this error.
        refuse: close the connection before any byte.
        cut_after_chunks, hang_after_chunks: after so many events of a stream (the one with the role and `[DONE]` count
            too); any other body breaks off in its middle. 0 is before any byte.
        malformed_sse: after the second event come some that are broken.
        no_done: the stream ends cleanly, but without `[DONE]`.
        split_bytes: every byte is sent alone.
        gzip: compress the body, asked for or not. On a socket only.
    """

    text: Annotated[str, Meta(max_length=TEXT_LENGTH_MAX)] | None = None
    tokens: _Count | None = None
    chunk_bytes: Annotated[int, Meta(ge=1, le=CHUNK_BYTES_MAX)] | None = None
    usage: dict[str, Any] | UnsetType | None = UNSET
    in_choice_chunk: bool = False
    hidden_reasoning_tokens: _Count = 0
    extra: dict[str, Any] = {}
    echo: bool = False
    first_byte_delay_ms: _DelayMs = 0
    chunk_delay_ms: _DelayMs = 0
    status: Annotated[int, Meta(ge=400, le=599)] | None = None
    retry_after: Annotated[int, Meta(ge=0, le=86_400)] | None = None
    refuse: bool = False
    cut_after_chunks: Annotated[int, Meta(ge=0)] | None = None
    hang_after_chunks: Annotated[int, Meta(ge=0)] | None = None
    malformed_sse: bool = False
    no_done: bool = False
    split_bytes: bool = False
    gzip: bool = False


class Message(msgspec.Struct, frozen=True):
    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[Any] | None = None

    @property
    def text(self) -> str:
        """The text of its parts."""
        if isinstance(self.content, str):
            return self.content
        texts = (part.get("text") for part in self.content or [])
        return " ".join(text for text in texts if isinstance(text, str))


class Function(msgspec.Struct, frozen=True):
    name: Annotated[str, Meta(min_length=1, max_length=64)]
    parameters: dict[str, Any] | None = None


class Tool(msgspec.Struct, frozen=True):
    type: str
    function: Function | None = None


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None


_Limit = Annotated[int, Meta(ge=1, le=1_000_000_000)]


class ChatRequest(msgspec.Struct, frozen=True):
    """The fields that change the answer. All others are ignored, as are those of a later version of the API."""

    model: Annotated[str, Meta(min_length=1, max_length=256)]
    messages: Annotated[list[Message], Meta(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    max_tokens: _Limit | None = None
    max_completion_tokens: _Limit | None = None
    stop: str | Annotated[list[str], Meta(max_length=4)] | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    simulate: Directive = Directive()

    @property
    def tokens_limit(self) -> int:
        """Of each choice."""
        return self.max_completion_tokens or self.max_tokens or TOKENS_MAX


class RequestRefused(Exception):
    """A 400 in OpenAI's words."""

    def __init__(self, message: str, *, param: str | None, code: str | None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


_DECODER: Final = msgspec.json.Decoder(ChatRequest)
_PLACE: Final = re.compile(r"(?P<what>.*?)(?: - at `\$\.?(?P<place>.*)`)?", re.DOTALL)
_MISSING: Final = re.compile(r"Object missing required field `(.*)`")
_UNKNOWN: Final = re.compile(r"Object contains unknown field `(.*)`")


def parse(body: bytes) -> ChatRequest:
    """Read a request.

    Raises:
        RequestRefused: it is not one; *param* says where.
    """
    try:
        request = _DECODER.decode(body)
    except msgspec.ValidationError as error:
        raise _refusal(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        message = "We could not parse the JSON body of your request."
        raise RequestRefused(message, param=None, code=None) from error
    if request.stream_options is not None and not request.stream:
        message = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
        raise RequestRefused(message, param="stream_options", code=None)
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        message = "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported."
        raise RequestRefused(message, param="max_tokens", code="invalid_parameter_combination")
    if request.top_logprobs is not None and not request.logprobs:
        message = "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled."
        raise RequestRefused(message, param="top_logprobs", code=None)
    if len(msgspec.json.encode(request.simulate.extra)) > EXTRA_BYTES_MAX:
        message = f"'simulate.extra' is longer than {EXTRA_BYTES_MAX} bytes."
        raise RequestRefused(message, param="simulate.extra", code="invalid_value")
    return request


def _refusal(complaint: str) -> RequestRefused:
    match = _PLACE.fullmatch(complaint)
    what, place = (match["what"], match["place"] or "") if match else (complaint, "")
    if missing := _MISSING.fullmatch(what):
        param = f"{place}.{missing[1]}".lstrip(".")
        return RequestRefused(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    if unknown := _UNKNOWN.fullmatch(what):
        param = f"{place}.{unknown[1]}".lstrip(".")
        return RequestRefused(f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")
    of = f" for '{place}'" if place else ""
    return RequestRefused(f"Invalid value{of}: {what}.", param=place or None, code="invalid_value")
