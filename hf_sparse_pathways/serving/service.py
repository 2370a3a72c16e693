"""A model with pathways at work for many clients: names, limits, and a few threads.

Every request is generated alone on one of a few threads with a domain of its own, since the choice
of a domain is the thread's: its text does not depend on what else is running, as it would in a
padded batch. Which domain that is says the model's name in the request: ``name@code``.
"""

import copy
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from jinja2 import TemplateError

from hf_sparse_pathways.errors import PathwaysError, UnknownNameError
from hf_sparse_pathways.measure.speed.workloads import most_tokens
from hf_sparse_pathways.modeling.domains import UNSET, Unset
from hf_sparse_pathways.pathways.names import AUTO, PROMPT
from hf_sparse_pathways.serving.generation import Generation
from hf_sparse_pathways.serving.limits import Limits
from hf_sparse_pathways.serving.requests import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    RequestError,
)
from hf_sparse_pathways.serving.sampling import Sampling

COMPLETION_TOKENS = 16
"""New tokens of a completion that does not say how many: OpenAI's default."""

_LOG = logging.getLogger(__name__)


class Service:
    """A model, its tokenizer, and the threads that generate.

    Attributes:
        names: What requests may call the model, and the domain that each name means.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        limits: Limits | None = None,
        *,
        guard: bool = False,
    ) -> None:
        """Get ready to serve.

        Args:
            model: A ``SparsePathwaysForCausalLM``.
            tokenizer: Its tokenizer, a fast one.
            name: What requests call it.
            limits: What is done at most.
            guard: Whether text that leaves its domain goes on with the dense model, where the
                domain's text is known.

        Raises:
            PathwaysError: The tokenizer cannot stream, or a guard would know no domain's text.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise PathwaysError(
                f"{type(tokenizer).__name__} cannot turn single tokens into text, which streaming "
                "needs. Use a fast tokenizer (one with a tokenizer.json)."
            )
        self.names: dict[str, str | Unset] = {name: UNSET}
        decided = [AUTO] * model.has_router + [PROMPT] * model.picks_neurons
        self.names |= {f"{name}@{domain}": domain for domain in (*model.domains, *decided)}
        self.limits = limits or Limits()
        self._model, self._tokenizer = model, tokenizer
        _ = model.execution  # what is timed for it, before threads disturb each other
        self._config = _greedy(model.generation_config)
        self._positions = most_tokens(model)
        self._guarded = self._find_guarded() if guard else frozenset()
        self._workers = ThreadPoolExecutor(self.limits.workers, "generate")
        self._active: set[Generation] = set()

    def encode(self, request: GenerationRequest) -> list[int]:
        """Return the tokens of a request's prompt.

        Raises:
            RequestError: The model is unknown, there is no chat template or it refuses the
                messages, or the prompt and what is asked for do not fit.
        """
        if request.model not in self.names:
            told = str(UnknownNameError("model", request.model, self.names))
            raise RequestError(told, status=404, param="model", code="model_not_found")
        if isinstance(request, ChatRequest):
            prompt = self._encode_chat(request)
        else:
            assert isinstance(request, CompletionRequest)  # there are no others
            prompt = self._tokenizer(request.prompt)["input_ids"]
        if not prompt:
            raise RequestError("The prompt is empty.", param="prompt")
        self._check_length(request, len(prompt))
        return prompt

    def start(self, request: GenerationRequest, prompt: Sequence[int]) -> Generation:
        """Begin to generate as soon as a thread is free; to be called in the event loop.

        Raises:
            RequestError: Too many requests are waiting.
        """
        if len(self._active) >= self.limits.requests:
            raise RequestError(
                f"{self.limits.requests} requests are waiting already. Try again later.",
                status=503,
                code="overloaded",
            )
        ends = _as_list(self._config.eos_token_id)
        made = Generation(self._tokenizer, prompt, ends=ends, stops=request.stops)
        self._active.add(made)
        self._workers.submit(self._run, made, request, prompt)
        return made

    def close(self) -> None:
        """Stop all that is running, and wait until it has."""
        for generation in tuple(self._active):
            generation.stop()
        self._workers.shutdown()

    def _find_guarded(self) -> frozenset[str]:
        """Return the names of models whose text is watched.

        Raises:
            PathwaysError: No domain's text is known.
        """
        self._model.text_router.check()
        known = {AUTO, *self._model.pathways.routed}
        usual = self._model.config.default_domain
        meant = {n: usual if isinstance(d, Unset) else d for n, d in self.names.items()}
        return frozenset(name for name, domain in meant.items() if domain in known)

    def _run(self, made: Generation, request: GenerationRequest, prompt: Sequence[int]) -> None:
        """Generate, on a worker's thread."""
        error: Exception | None = None
        try:
            if not made.stopped:
                self._generate(made, request, prompt)
        except Exception as raised:  # noqa: BLE001  whatever it is, the client hears of it
            _LOG.exception("A request failed.")
            error = raised
        finally:
            self._active.discard(made)
            made.close(error)

    def _generate(
        self, made: Generation, request: GenerationRequest, prompt: Sequence[int]
    ) -> None:
        ids = torch.tensor([prompt], device=self._model.device)
        config = copy.copy(self._config)
        config.max_new_tokens = self._new_tokens(request, len(prompt))
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            domain=self.names[request.model],
            guard=request.model in self._guarded,
            generation_config=config,
            logits_processor=self._sampling(request).processors(ids.device),
            stopping_criteria=[made],
            streamer=made,
        )

    def _encode_chat(self, request: ChatRequest) -> list[int]:
        if self._tokenizer.chat_template is None:
            raise RequestError(
                "This model has no chat template, so it cannot tell messages apart. Send text to "
                "/v1/completions instead.",
                param="messages",
            )
        messages = [message.to_dict() for message in request.messages]
        try:
            encoded = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True
            )
        except TemplateError as error:
            raise RequestError(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error
        return encoded["input_ids"]

    def _new_tokens(self, request: GenerationRequest, prompt: int) -> int:
        """Return the most new tokens: as asked for, or as many as there is room for."""
        usual = COMPLETION_TOKENS if isinstance(request, CompletionRequest) else self.limits.tokens
        room = usual if self._positions is None else self._positions - prompt
        return request.new_tokens or min(usual, room, self.limits.tokens)

    def _check_length(self, request: GenerationRequest, prompt: int) -> None:
        asked = request.new_tokens or 1
        if asked > self.limits.tokens:
            raise RequestError(
                f"{asked} new tokens are more than this server's limit of {self.limits.tokens}.",
                param="max_tokens",
            )
        if self._positions is not None and prompt + asked > self._positions:
            raise RequestError(
                f"The prompt has {prompt} tokens, {asked} new one(s) are asked for, and the model "
                f"has {self._positions} positions. Shorten the prompt, or ask for less.",
                code="context_length_exceeded",
            )

    def _sampling(self, request: GenerationRequest) -> Sampling:
        """Return how a request's tokens are drawn; the model's own configuration is the default."""
        own = self._model.generation_config
        usual = {"temperature": own.temperature, "top_p": own.top_p, "top_k": own.top_k}
        asked = {"temperature": request.temperature, "top_p": request.top_p, "seed": request.seed}
        said = {name: value for name, value in asked.items() if value is not None}
        kept = {name: value for name, value in usual.items() if value is not None}
        return Sampling(**{**kept, **said})


def _greedy(config: Any) -> Any:
    """Return a generation configuration that leaves drawing and lengths to each request."""
    config = copy.deepcopy(config)
    config.update(do_sample=False, num_beams=1, max_length=None, max_new_tokens=None)
    config.update(temperature=None, top_p=None, top_k=None)
    if config.pad_token_id is None:
        config.pad_token_id = next(iter(_as_list(config.eos_token_id)), None)
    return config


def _as_list(tokens: int | list[int] | None) -> list[int]:
    return [] if tokens is None else tokens if isinstance(tokens, list) else [tokens]
