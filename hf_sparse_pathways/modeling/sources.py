"""Which tensors of a checkpoint become which parameter of a model, before anything is read.

Transformers renames tensors, and puts some together on the way, such as those of single experts
into a packed one.
"""

import copy
import re
from collections import defaultdict
from typing import Any

from torch import nn
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
"""What an expert's number stands behind in the name of its own tensor."""


def find_sources(model: nn.Module, keys: list[str], mapping: list[Any]) -> dict[str, list[str]]:
    """Return which tensors of a checkpoint become which parameter as they are, by its name."""
    return _renamed(model, keys, mapping, converted=False)


def find_expert_sources(
    model: nn.Module, keys: list[str], mapping: list[Any]
) -> tuple[dict[str, list[str]], dict[str, dict[int, list[str]]]]:
    """Return which tensors become a packed parameter: as they are, and one per expert by number."""
    numbered: dict[str, dict[int, list[str]]] = {}
    for name, found in _renamed(model, keys, mapping, converted=True).items():
        own = numbered.setdefault(name, {})
        for key in found:
            number = _EXPERT.search(key)
            own.setdefault(-1 if number is None else int(number[1]), []).append(key)
    return find_sources(model, keys, mapping), numbered


def _renamed(
    model: nn.Module, keys: list[str], mapping: list[Any], *, converted: bool
) -> dict[str, list[str]]:
    """Return which tensors of a checkpoint belong to which parameter.

    Args:
        model: The model.
        keys: The tensors' names.
        mapping: How Transformers renames and converts them.
        converted: Whether those that are converted on the way are wanted, or the others.
    """
    mapping = copy.deepcopy(mapping)  # renaming leaves traces in it
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    expected = model.state_dict()
    prefix = getattr(model, "base_model_prefix", "")
    found = defaultdict(list)
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:
            name, pattern = rename_source_key(key, [], [], prefix, expected)
        if (pattern is not None) == converted:
            found[name].append(key)
    return found
