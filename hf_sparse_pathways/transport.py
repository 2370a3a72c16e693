"""What goes wrong on the way to the Hub, as one of this package's errors."""

from collections.abc import Iterator
from contextlib import contextmanager

from hf_sparse_pathways.errors import HubError
from hf_sparse_pathways.tokens import hide_tokens

_TRANSPORT = ("huggingface_hub", "httpx", "httpx2")
"""Packages whose errors come from there."""


@contextmanager
def hub_errors(what: str = "") -> Iterator[None]:
    """Within the block, errors of the Hub, and of reading and writing files, are ``HubError``.

    Args:
        what: What then fails, as the begin of a sentence.
    """
    try:
        yield
    except Exception as error:
        own = type(error).__module__.partition(".")[0]
        if own not in _TRANSPORT and not isinstance(error, OSError):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        told = " ".join(lines) or type(error).__name__
        hidden = hide_tokens(told)
        cause = error if hidden == told else None
        raise HubError(f"{what}: {hidden}" if what else hidden) from cause
