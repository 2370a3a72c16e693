"""What is sent back: OpenAI's JSON objects, whole or as the events of a stream."""

import json
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from hf_sparse_pathways.serving.requests import RequestError


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer, of a chat or of a plain text.

    Attributes:
        model: The model's name, as it was asked for.
        chat: Whether it is a message of a chat.
        prompt_tokens: Tokens of the prompt.
        name: Its own.
        created: Unix time.
    """

    model: str
    chat: bool
    prompt_tokens: int
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, finish_reason: str, tokens: int) -> dict[str, Any]:
        """Return the answer in one object."""
        said: dict[str, Any] = {"text": text}
        if self.chat:
            said = {"message": {"role": "assistant", "content": text}}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._object(kind, [choice]), "usage": self.usage(tokens)}

    def piece(self, text: str, finish_reason: str | None = None) -> dict[str, Any]:
        """Return an object of a stream."""
        said: dict[str, Any] = {"text": text}
        if self.chat:
            said = {"delta": {"content": text} if finish_reason is None else {}}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}
        return self._object(self._streamed, [choice])

    def first(self) -> dict[str, Any]:
        """Return the object with which the stream of a chat begins."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._object(self._streamed, [choice])

    def counted(self, tokens: int) -> dict[str, Any]:
        """Return the object with which a stream ends that counts the tokens."""
        return {**self._object(self._streamed, []), "usage": self.usage(tokens)}

    def usage(self, tokens: int) -> dict[str, int]:
        """Return the numbers of tokens."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self.prompt_tokens + tokens,
        }

    @property
    def _streamed(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.name}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def model_list(names: Iterable[str], created: int) -> dict[str, Any]:
    """Return the list of the models that may be asked for."""
    data = [
        {"id": name, "object": "model", "created": created, "owned_by": "hf-sparse-pathways"}
        for name in names
    ]
    return {"object": "list", "data": data}


def error_object(error: Exception) -> dict[str, Any]:
    """Return what a client is told of an error; of an unforeseen one only that there was one."""
    if isinstance(error, RequestError):
        kind = "invalid_request_error" if error.status < 500 else "server_error"
        told = {"message": str(error), "type": kind, "param": error.param, "code": error.code}
    else:
        message = "The server failed to generate; its log says why."
        told = {"message": message, "type": "server_error", "param": None, "code": None}
    return {"error": told}


def event(values: dict[str, Any]) -> str:
    """Return an object as an event of a stream."""
    return f"data: {json.dumps(values, ensure_ascii=False)}\n\n"


LAST_EVENT = "data: [DONE]\n\n"
