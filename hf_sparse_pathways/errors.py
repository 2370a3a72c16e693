"""Errors a user can act on; every message says what was given, what fits, and what to do."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class PathwaysError(ValueError):
    """Base of every error this package raises on purpose."""


class UnknownNameError(PathwaysError):
    """A name was asked for that does not exist."""

    def __init__(self, kind: str, name: object, known: Iterable[str]) -> None:
        names = list(known)
        close = get_close_matches(str(name), names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        listed = ", ".join(map(repr, names)) if names else "none"
        super().__init__(f"Unknown {kind} {name!r}.{hint} Known: {listed}.")


class UnsupportedModelError(PathwaysError):
    """The model has no FFN block, or its state does not allow what was asked."""


class MismatchError(PathwaysError):
    """Pathways, masks or a profile were made for a model of another shape."""


class ArtefactError(PathwaysError):
    """A saved file is missing, corrupt, truncated, or of a newer format."""


class HubError(PathwaysError):
    """The Hub cannot be reached, or refuses: no such repository or revision, no right to write."""


class TextError(PathwaysError):
    """A text source cannot be read, or holds too little text."""


def named(argument: str, value: object) -> str:
    """Return a setting as Python and as the command line spell it: ``keep='lora' (--keep lora)``.

    Args:
        argument: The argument's name; the option has the same, with dashes.
        value: Its value; True and False stand for the option and its ``--no-`` form.
    """
    option = argument.replace("_", "-")
    if isinstance(value, bool):
        return f"{argument}={value} (--{'' if value else 'no-'}{option})"
    return f"{argument}={value!r} (--{option} {value})"


def option(argument: str) -> str:
    """Return an argument as Python and as the command line call it: ``tokens (--tokens)``."""
    return f"{argument} (--{argument.replace('_', '-')})"


_TRANSPORT = ("huggingface_hub", "httpx", "httpx2")
"""Packages whose errors come from the way to the Hub."""


@contextmanager
def hub_errors(what: str = "") -> Iterator[None]:
    """Within the block, what goes wrong on the way to the Hub is one of this package's errors.

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
        raise HubError(f"{what}: {told}" if what else told) from error
