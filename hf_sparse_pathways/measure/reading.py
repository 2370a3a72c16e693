"""Reports back from the JSON that they were written as, by the types of their fields.

What stands in the JSON beside the fields (sums and summaries for other readers) is left out: it
follows from them.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from hf_sparse_pathways.errors import ArtefactError

T = TypeVar("T")


def read_report(kind: type[T], values: Any, what: str) -> T:
    """Return a report from JSON values.

    Args:
        kind: A dataclass whose fields are numbers, texts, dataclasses of the same kind, tuples,
            mappings from text, or optional.
        values: What ``to_dict`` of one gave.
        what: What it is, for the error: ``"an evaluation"``.

    Raises:
        ArtefactError: A value is missing or of the wrong kind.
    """
    try:
        return _restore(kind, values)
    except (TypeError, ValueError) as error:
        raise ArtefactError(
            f"This is no report of {what} ({error}). Give the JSON that the command has written."
        ) from error


def _restore(kind: Any, value: Any) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        (known,) = (own for own in inner if own is not NoneType)
        return None if value is None else _restore(known, value)
    if is_dataclass(kind):
        return _restore_fields(kind, _checked(value, dict))
    if origin is tuple:
        return _restore_tuple(inner, _checked(value, list | tuple))
    if origin is not None and issubclass(origin, Mapping):
        return {_checked(k, str): _restore(inner[1], v) for k, v in _checked(value, dict).items()}
    if origin is not None:
        return tuple(_restore(inner[0], own) for own in _checked(value, list | tuple))
    if kind is float:
        return float(_checked(value, float | int))
    return value if kind is Any else _checked(value, kind)


def _restore_fields(kind: Any, values: dict[str, Any]) -> Any:
    hints, known = _hints(kind), fields(kind)
    given = [field.name for field in known if field.name in values]
    optional = [f.name for f in known if (f.default, f.default_factory) != (MISSING, MISSING)]
    missing = {field.name for field in known} - {*given, *optional}
    if missing:
        raise TypeError(f"it lacks {', '.join(sorted(missing))}")
    return kind(**{name: _restore(hints[name], values[name]) for name in given})


def _restore_tuple(inner: tuple[Any, ...], values: Any) -> tuple[Any, ...]:
    if inner[-1] is Ellipsis:
        return tuple(_restore(inner[0], value) for value in values)
    return tuple(_restore(own, value) for own, value in zip(inner, values, strict=True))


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _checked(value: Any, kind: Any) -> Any:
    """Return a value, which has to be of a kind; True and False are no numbers."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{value!r:.60} in place of {getattr(kind, '__name__', kind)}")
    return value
