"""What ``pathways.json`` and ``profile.json`` say: the base and the domains, checked by value.

Names of a base and its blocks stand in messages, tables and cards, so they are one line of plain
characters. Of a provenance only what the package reads again is checked; the rest is anybody's.
"""

from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import Any

from hf_sparse_pathways.display import plain
from hf_sparse_pathways.errors import ArtefactError
from hf_sparse_pathways.ffn.kept_experts import ExpertsShape
from hf_sparse_pathways.limits import (
    MOST_BLOCKS,
    MOST_DOMAINS,
    MOST_NAME,
    MOST_PATH,
    MOST_WIDTH,
)
from hf_sparse_pathways.pathways.base import BaseModel, BlockShape

DIGESTS = tuple(
    f"{use}{name}" for use in ("", "validation_", "router_") for name in ("digests", "cut_digests")
)

_TEXT_FIELDS: dict[str, type[Any]] = {
    **dict.fromkeys(DIGESTS, list),
    "source": str,
    "tokens": int,
    "documents": int,
}
"""What is read again of the description of a text; any of it may be missing."""


def base_to_json(base: BaseModel) -> dict[str, Any]:
    """Return a base's identity as JSON values."""
    data = asdict(base)
    if base.neuron_order is None:
        del data["neuron_order"]
    if not base.experts:
        del data["experts"]
    for layer in data.get("experts", ()):
        if layer["channels"] == 1:
            del layer["channels"]
    return data


def base_from_json(data: dict[str, Any]) -> BaseModel:
    """Return a base's identity from JSON values.

    Raises:
        ArtefactError: A value is missing, unknown, or of the wrong kind.
    """
    try:
        blocks, routed, experts = data["blocks"], data["routed"], data.get("experts", [])
        for parts in (blocks, experts):
            if not isinstance(parts, list) or len(parts) > MOST_BLOCKS:
                raise TypeError(f"it has no list of at most {MOST_BLOCKS} blocks or experts")
        if not blocks and not experts:
            raise TypeError("it has neither blocks nor experts")
        if not isinstance(routed, list):
            raise TypeError("its list of routed experts is none")
        if not isinstance(data["name"], str) or len(data["name"]) > MOST_PATH:
            raise TypeError("its name is no text, or too long")
        marks = (data["revision"], data.get("neuron_order"))
        check_names([data["model_type"], *routed, *(mark for mark in marks if mark is not None)])
        shapes = tuple(_block_shape(block) for block in blocks)
        routed_shapes = tuple(_experts_shape(layer) for layer in experts)
        parts = {"blocks": shapes, "routed": tuple(routed), "experts": routed_shapes}
        return BaseModel(**{**data, **parts})
    except (KeyError, TypeError) as error:
        told = plain(str(error))
        raise ArtefactError(f"The base's description does not fit: {told}.") from error


def check_names(names: Iterable[Any]) -> None:
    """Check that names can stand in a message, a table and a card.

    Raises:
        ArtefactError: One is no text, is too long, or has control characters or markup.
    """
    for name in names:
        known = isinstance(name, str) and len(name) <= MOST_NAME and name.isprintable()
        if not known or any(mark in name for mark in "`<>[]|"):
            raise ArtefactError(
                f"{str(name)[:MOST_NAME]!r} is no name: it has to be a text of at most {MOST_NAME} "
                "plain characters."
            )


def _experts_shape(data: dict[str, Any]) -> ExpertsShape:
    check_names([data["name"]])
    data = {"channels": 1, **data}
    numbers = {field.name: data[field.name] for field in fields(ExpertsShape)[1:]}
    if not all(type(number) is int and 0 < number <= MOST_WIDTH for number in numbers.values()):
        raise ArtefactError(f"Routed experts have impossible numbers: {numbers}.")
    groups, top_groups = numbers["groups"], numbers["top_groups"]
    few = numbers["top_k"] > numbers["experts"] or top_groups > groups
    channels = numbers["channels"]
    uneven = numbers["experts"] % groups or numbers["experts"] % channels
    if few or uneven or numbers["top_k"] % channels:
        raise ArtefactError(f"Routed experts have numbers that do not fit together: {numbers}.")
    return ExpertsShape(**data)


def _block_shape(data: dict[str, Any]) -> BlockShape:
    check_names([data["name"]])
    widths = [data[field.name] for field in fields(BlockShape) if field.name != "name"]
    if not all(type(width) is int and 0 < width <= MOST_WIDTH for width in widths):
        raise ArtefactError(f"An FFN block has impossible widths: {widths}.")
    return BlockShape(**data)


def check_entries(entries: Any) -> None:
    """Check the description of a list of domains or controls.

    Raises:
        ArtefactError: They are no list, or too many, or a name is none, or a provenance no object,
            or one in which there is something else than the package has put there.
    """
    if not isinstance(entries, list) or len(entries) > MOST_DOMAINS:
        raise ArtefactError(f"The domains or controls are no list of at most {MOST_DOMAINS}.")
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("provenance"), dict):
            raise ArtefactError("An entry of the domains or controls has no provenance.")
        check_names([entry.get("name")])
        made = entry["provenance"]
        check_text(entry["name"], made.get("text", {}))
        if not isinstance(made.get("healing", []), list):
            raise ArtefactError(f"Of {entry['name']!r} the healing is no list.")


def check_text(name: str, text: Any) -> None:
    """Check what a provenance says of the text that was calibrated on.

    Raises:
        ArtefactError: It is no object, or digests of documents are no list of texts.
    """
    if not isinstance(text, dict):
        raise ArtefactError(f"What {name!r} says of its text is no object.")
    for key, kind in _TEXT_FIELDS.items():
        value = text.get(key, kind())
        fits = isinstance(value, kind) and not isinstance(value, bool)
        if not fits or (kind is list and not all(isinstance(one, str) for one in value)):
            raise ArtefactError(f"What {name!r} says of its text does not fit: {key}.")
    datasets = text.get("datasets", [])
    if not isinstance(datasets, list) or not all(isinstance(one, dict) for one in datasets):
        raise ArtefactError(f"What {name!r} says of its text does not fit: datasets.")
