"""OpenAI's wire format: an answer as the bytes of a body or of a stream's events.

Source: https://platform.openai.com/docs/api-reference/chat (the objects `chat.completion` and `chat.completion.chunk`).
"""

from collections.abc import Iterator
from typing import Any, Final

import msgspec
from msgspec import UNSET

from gateway.proxy.simulated.answer import Choice, prompt_tokens
from gateway.proxy.simulated.request import ChatRequest

_CREATED_FROM: Final = 1_700_000_000
_CREATED_RANGE_S: Final = 10_000_000
_DONE: Final = b"data: [DONE]\n\n"

# status -> type, code, message
_FAILURES: Final = {
    401: ("invalid_request_error", "invalid_api_key", "Incorrect API key provided."),
    403: ("invalid_request_error", "permission_denied", "You do not have access to this."),
    404: ("invalid_request_error", "model_not_found", "The model does not exist or you do not have access to it."),
    429: ("requests", "rate_limit_exceeded", "Rate limit reached. Please try again later."),
    503: ("server_error", None, "The engine is currently overloaded, please try again later."),
}
_CALLERS_FAULT: Final = ("invalid_request_error", None, "The request is invalid.")
_SERVERS_FAULT: Final = (
    "server_error",
    None,
    "The server had an error while processing your request. Sorry about that!",
)

_encode: Final = msgspec.json.Encoder().encode


def error_body(
    message: str, *, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> bytes:
    """OpenAI's error envelope."""
    return _encode({"error": {"message": message, "type": kind, "param": param, "code": code}})


def failure_body(status: int) -> bytes:
    """What OpenAI says with a status."""
    kind, code, message = _FAILURES.get(status, _CALLERS_FAULT if status < 500 else _SERVERS_FAULT)
    return error_body(message, kind=kind, code=code)


def model_body(name: str) -> bytes:
    """One model."""
    return _encode(_model(name))


def models_body(names: tuple[str, ...]) -> bytes:
    """The list of models."""
    return _encode({"object": "list", "data": [_model(name) for name in names]})


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": _CREATED_FROM, "owned_by": "simulated"}


class Completion(msgspec.Struct, frozen=True):
    """The answer to one request.

    Attributes:
        received: the request's bytes.
        digest: of these; ids and times come from it.
    """

    request: ChatRequest
    choices: tuple[Choice, ...]
    received: bytes
    digest: bytes

    def body(self) -> bytes:
        """A `chat.completion`."""
        choices = [
            {
                "index": index,
                "message": self._message(choice),
                "logprobs": self._logprobs(choice, choice.tokens),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(self.choices)
        ]
        body = self._envelope("chat.completion") | {"choices": choices}
        usage = self._usage()
        if usage is not None:
            body["usage"] = usage
        return _encode(body | self._extra())

    def events(self) -> Iterator[bytes]:
        """A series of `chat.completion.chunk` and `[DONE]`, one after the other: never all in memory."""
        directive = self.request.simulate
        usage = self._usage()
        options = self.request.stream_options
        include_usage = options is not None and bool(options.include_usage)
        envelope = self._envelope("chat.completion.chunk") | {"choices": []}
        if include_usage:
            envelope["usage"] = None
        envelope |= directive.extra
        only_once = self._extra()
        choices_open = len(self.choices)
        for choice in self._deltas():
            chunk = envelope | only_once | {"choices": [choice]}
            only_once = {}
            choices_open -= choice["finish_reason"] is not None
            if directive.in_choice_chunk and not choices_open:
                chunk["usage"] = usage
            yield _event(chunk)
        if include_usage and usage is not None and not directive.in_choice_chunk:
            yield _event(envelope | {"usage": usage})
        if not directive.no_done:
            yield _DONE

    def _deltas(self) -> Iterator[dict[str, Any]]:
        """The choices of the chunks; several take turns."""
        turns = [self._deltas_of(index, choice) for index, choice in enumerate(self.choices)]
        while turns:
            ended = []
            for turn in turns:
                delta = next(turn, None)
                if delta is None:
                    ended.append(turn)
                else:
                    yield delta
            turns = [turn for turn in turns if turn not in ended] if ended else turns

    def _deltas_of(self, index: int, choice: Choice) -> Iterator[dict[str, Any]]:
        call = choice.tool_call
        opening: dict[str, Any] = {"role": "assistant", "content": "" if call is None else None}
        if call is not None:
            function = {"name": call.name, "arguments": ""}
            opening["tool_calls"] = [{"index": 0, "id": call.id, "type": "function", "function": function}]
        yield _choice(index, opening | {"refusal": None})
        for token in choice.tokens:
            if call is None:
                yield _choice(index, {"content": token}, logprobs=self._logprobs(choice, (token,)))
            else:
                yield _choice(index, {"tool_calls": [{"index": 0, "function": {"arguments": token}}]})
        yield _choice(index, {}, finish_reason=choice.finish_reason)

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self.digest.hex()[:29]}",
            "object": kind,
            "created": _CREATED_FROM + int.from_bytes(self.digest[:4]) % _CREATED_RANGE_S,
            "model": self.request.model,
            "service_tier": "default",
            "system_fingerprint": "fp_simulated",
        }

    def _extra(self) -> dict[str, Any]:
        directive = self.request.simulate
        return directive.extra | ({"echo": msgspec.Raw(self.received)} if directive.echo else {})

    def _message(self, choice: Choice) -> dict[str, Any]:
        text = "".join(choice.tokens)
        call = choice.tool_call
        if call is None:
            return {"role": "assistant", "content": text, "refusal": None, "annotations": []}
        called = {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": text}}
        return {"role": "assistant", "content": None, "tool_calls": [called], "refusal": None, "annotations": []}

    def _logprobs(self, choice: Choice, tokens: tuple[str, ...]) -> dict[str, Any] | None:
        if not self.request.logprobs or choice.tool_call is not None:
            return None
        ranks = range(self.request.top_logprobs or 0)
        content = [
            _logprob(token, 0) | {"top_logprobs": [_logprob(token + "~" * rank, rank) for rank in ranks]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _usage(self) -> dict[str, Any] | None:
        reported = self.request.simulate.usage
        if reported is not UNSET:
            return reported
        prompt = prompt_tokens(self.request)
        completion = sum(choice.tokens_count for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": sum(choice.reasoning_tokens for choice in self.choices),
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }


def _choice(index: int, delta: dict[str, Any], *, logprobs: Any = None, finish_reason: str | None = None) -> Any:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _logprob(token: str, rank: int) -> dict[str, Any]:
    return {"token": token, "logprob": -0.01 - rank, "bytes": list(token.encode())}


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + _encode(chunk) + b"\n\n"
