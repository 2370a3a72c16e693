"""One request's generation: tokens come in on a worker's thread, text goes out in the event loop.

The tokenizer's own stream turns tokens into text as soon as it is certain, and what could be the
beginning of a stop string is held back. Whoever stops a generation (a stop string, a client that
has gone, the server's end) sets a flag, which ``generate`` asks after every token.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import FloatTensor, LongTensor, Tensor
from transformers.generation.stopping_criteria import StoppingCriteria
from transformers.generation.streamers import BaseStreamer


class StopStrings:
    """Text up to the first of some strings.

    Attributes:
        found: Whether one was found.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.found = False
        self._strings = strings
        self._held = ""

    def feed(self, text: str) -> str:
        """Take more text; return what is certainly shown of all so far, and was not yet."""
        if self.found:
            return ""
        self._held += text
        places = [self._held.find(string) for string in self._strings]
        hits = [place for place in places if place >= 0]
        self.found = bool(hits)
        shown = min(hits) if hits else len(self._held) - self._doubtful()
        text, self._held = self._held[:shown], "" if hits else self._held[shown:]
        return text

    def rest(self) -> str:
        """Return what was held back, when no more text comes."""
        text, self._held = self._held, ""
        return text

    def _doubtful(self) -> int:
        """Return how many characters at the end could begin a stop string."""
        most = min(len(self._held), max(map(len, self._strings), default=1) - 1)
        for count in range(most, 0, -1):
            if any(string.startswith(self._held[-count:]) for string in self._strings):
                return count
        return 0


class Generation(BaseStreamer, StoppingCriteria):
    """Takes tokens from ``generate``, gives text to whoever awaits it.

    Attributes:
        tokens: How many were generated so far.
        finish_reason: ``"stop"`` once it has ended by itself or at a stop string.
    """

    def __init__(
        self, tokenizer: Any, prompt: Sequence[int], *, ends: Collection[int], stops: Sequence[str]
    ) -> None:
        """Prepare a generation; to be called in the event loop that will await the text.

        Args:
            tokenizer: A fast one.
            prompt: The tokens before it: the first word's space depends on them.
            ends: Tokens that end it and are not shown.
            stops: Strings that end it and are not shown.
        """
        self.tokens = 0
        self.finish_reason = "length"
        self._ends = ends
        self._text = StopStrings(stops)
        self._backend = tokenizer.backend_tokenizer
        self._decoder = DecodeStream(list(prompt), skip_special_tokens=True)
        self._in_prompt = True
        self._stopped = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[str | Exception | None] = asyncio.Queue()

    # -- on the worker's thread -------------------------------------------------------------

    @property
    def stopped(self) -> bool:
        """Whether nobody wants more of it."""
        return self._stopped.is_set()

    def put(self, value: Tensor) -> None:
        """Take the tokens of one step; ``generate`` puts the prompt first."""
        if self._in_prompt:
            self._in_prompt = False
            return
        for token in value.flatten().tolist():
            self.tokens += 1
            if token in self._ends:
                self.finish_reason = "stop"
                continue
            text = self._decoder.step(self._backend, token)
            self._send(self._text.feed(text or ""))
            if self._text.found:
                self.finish_reason = "stop"
                self.stop()

    def end(self) -> None:
        """Take the end of the tokens."""
        self._send(self._text.rest())

    def close(self, error: Exception | None = None) -> None:
        """Say that nothing more comes, and why if it is not as it should be."""
        self._loop.call_soon_threadsafe(self._queue.put_nowait, error)

    def _send(self, text: str) -> None:
        if text:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, text)

    def __call__(self, input_ids: LongTensor, scores: FloatTensor, **_: Any) -> Any:  # noqa: ARG002
        """Tell ``generate`` whether to stop."""
        return torch.full((len(input_ids),), self.stopped, device=input_ids.device)

    # -- in the event loop ------------------------------------------------------------------

    def stop(self) -> None:
        """Ask for no more tokens; from any thread."""
        self._stopped.set()

    async def pieces(self) -> AsyncIterator[str]:
        """Yield the text as it comes.

        Raises:
            Exception: What ``generate`` raised.
        """
        while True:
            item = await self._queue.get()
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            yield item
