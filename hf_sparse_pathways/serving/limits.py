"""What a server does at most."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server does at most.

    Attributes:
        workers: Requests that are generated at a time.
        requests: Requests that are generated or wait.
        tokens: New tokens of one request.
    """

    workers: int = 4
    requests: int = 64
    tokens: int = 4096
