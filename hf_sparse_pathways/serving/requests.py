"""What a request may say: the fields of OpenAI's that are computed here, and no others.

A field that is left out (or null) has its usual default. One that is unknown, or that would change
the answer and is not computed, is refused with its name: a client never gets something else than
it asked for.
"""

from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hf_sparse_pathways.errors import PathwaysError

_Text = Annotated[str, Field(min_length=1)]


class RequestError(PathwaysError):
    """A request that cannot be answered, with what the client is told.

    Attributes:
        status: Of the HTTP response.
        param: The field that is wrong, if it is one.
        code: OpenAI's word for what is wrong, if there is one.
    """

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(_Strict):
    """How a stream is sent.

    Attributes:
        include_usage: Whether its last event counts the tokens.
    """

    include_usage: bool | None = None


class GenerationRequest(_Strict):
    """What both kinds of requests have.

    Attributes:
        model: The served model's name, or ``name@domain``.
        stream: Whether the text is sent while it is generated.
        stream_options: How.
        temperature: 0 is greedy; by default the model's generation configuration's, else 1.
        top_p: Sample from the fewest tokens of this probability; by default as above.
        max_tokens: Most new tokens.
        stop: Where the text ends, without these strings.
        seed: The same seed gives the same text again.
        n: The number of texts.
    """

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    stop: _Text | Annotated[list[_Text], Field(max_length=4)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: Literal[1] | None = None

    @property
    def new_tokens(self) -> int | None:
        """Most new tokens, None if nothing is said."""
        return self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings at which the text ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class TextPart(_Strict):
    """A part of a message.

    Attributes:
        type: Its kind.
        text: Its text.
    """

    type: Literal["text"]
    text: str


class Message(_Strict):
    """A message of a chat.

    Attributes:
        role: Who says it.
        content: Its text, whole or in parts.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def to_dict(self) -> dict[str, str]:
        """Return it as chat templates take it."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": self.role, "content": text}


class ChatRequest(GenerationRequest):
    """A request to go on with a chat.

    Attributes:
        messages: The chat so far.
        max_completion_tokens: Another name of ``max_tokens``.
    """

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def new_tokens(self) -> int | None:
        """Most new tokens, None if nothing is said."""
        return self.max_completion_tokens or self.max_tokens

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        if self.max_tokens and self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are two names of one limit")
        return self


class CompletionRequest(GenerationRequest):
    """A request to continue a text.

    Attributes:
        prompt: The text.
    """

    prompt: str


Asked = TypeVar("Asked", bound=GenerationRequest)


def parse_request(kind: type[Asked], body: bytes) -> Asked:
    """Read a request's body.

    Args:
        kind: What it should hold.
        body: JSON.

    Raises:
        RequestError: It does not.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    param = ".".join(map(str, first["loc"])) or None
    told = f"{param or 'The body'}: {first['msg']}."
    if first["type"] == "extra_forbidden":
        told = f"{param} is not supported here: leave it out."
        if len(first["loc"]) == 1:
            told += f" Known: {', '.join(kind.model_fields)}."
    raise RequestError(told, param=param, code="invalid_request")
