"""Which fields of a configuration decide the FFN blocks' widths, and whether they have biases.

There is no table of models. A field is changed, the model is built without memory (on the meta
device), and the shapes of its tensors are compared with those before. A field decides a width if
doubling it doubles the neurons of some blocks and changes nothing else. A switch gives biases if it
adds biases and nothing else: zeros in those of them that are not wanted change nothing.
"""

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Self

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from hf_sparse_pathways.errors import UnsupportedModelError
from hf_sparse_pathways.ffn.blocks import survey_model

REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What configurations and models raise when a field has a value that they do not take."""


@dataclass(frozen=True, kw_only=True)
class Outline:
    """The shapes of a model that was not given memory.

    Attributes:
        shapes: Parameter -> its shape; those that are tied once.
        widths: FFN block -> d_ff.
        leaves: FFN block -> names of its leaves' tensors.
        outgoing: FFN block -> name of its outgoing leaf.
    """

    shapes: Mapping[str, tuple[int, ...]]
    widths: Mapping[str, int]
    leaves: Mapping[str, frozenset[str]]
    outgoing: Mapping[str, str]

    @classmethod
    def of(cls, config: Any) -> Self:
        """Build a configuration's model on the meta device and look at it."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        blocks = survey_model(model).blocks
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        layouts = {b.name: (*b.layout.incoming, b.layout.outgoing) for b in blocks}
        return cls(
            shapes=shapes,
            widths={block.name: block.d_ff for block in blocks},
            leaves={
                name: frozenset(
                    f"{name}.{leaf}.{part}"
                    for leaf in leaves
                    for part in ("weight", "bias")
                    if f"{name}.{leaf}.{part}" in shapes
                )
                for name, leaves in layouts.items()
            },
            outgoing={block.name: f"{block.name}.{block.layout.outgoing}" for block in blocks},
        )

    @classmethod
    def with_field(cls, config: Any, field: str, value: Any) -> Self | None:
        """Look at a configuration with another value of a field; None if it refuses that."""
        trial = copy.deepcopy(config)
        try:
            set_field(trial, field, value)
            return cls.of(trial)
        except REFUSALS:
            return None

    def differing(self, other: Self) -> set[str]:
        """Return the parameters that both have, in different shapes."""
        both = self.shapes.keys() & other.shapes.keys()
        return {name for name in both if self.shapes[name] != other.shapes[name]}


@dataclass(frozen=True, kw_only=True)
class WidthField:
    """A field that decides how many neurons some FFN blocks have, and nothing else.

    Attributes:
        name: Of the field.
        blocks: Names of the blocks.
        ratio: Neurons of each block per unit of the field.
    """

    name: str
    blocks: frozenset[str]
    ratio: Fraction


def set_field(config: Any, field: str, value: Any) -> None:
    """Set a field of a causal LM's configuration, in place; in its text part if it has parts."""
    setattr(config.get_text_config(decoder=True), field, value)


def find_width_fields(config: Any, before: Outline, names: Collection[str]) -> list[WidthField]:
    """Find the fields that decide the widths of some blocks.

    Args:
        config: The model's.
        before: Its outline.
        names: The blocks.

    Raises:
        UnsupportedModelError: No field decides the width of one of them alone.
    """
    missing, found, shared = set(names), list[WidthField](), dict[str, str]()
    for field, value in _numbers(config, before):
        if not missing:
            break
        doubled = 2 * (value or max(before.widths.values()))
        after = Outline.with_field(config, field, doubled)
        changed = _changed_widths(before, after) & missing
        if after is None or not changed:
            continue
        width = _width_field(field, value, before, after)
        if width is None:
            others = before.differing(after).difference(*(before.leaves[n] for n in changed))
            example = min(others, default="the number of modules")
            shared |= dict.fromkeys(changed, f"{field!r} also decides {example}")
        else:
            found.append(width)
            missing -= width.blocks
    if missing:
        name = min(missing)
        detail = f" ({shared[name]})" if name in shared else ""
        raise UnsupportedModelError(
            f"{name} cannot be made narrower: no field of {type(config).__name__} decides its "
            f"width and nothing else{detail}. Build pathways that keep all of its neurons "
            "(--sparsity takes one value per block), or serve the model with this package."
        )
    return found


def find_bias_switch(
    config: Any, before: Outline, names: Collection[str]
) -> tuple[str, bool] | None:
    """Find the switch that gives some blocks' outgoing leaves a bias.

    Args:
        config: The model's.
        before: Its outline.
        names: The blocks.

    Returns:
        Field and value, of the switch that adds fewest biases elsewhere; None if there is none.
    """
    found: list[tuple[int, str, bool]] = []
    for field, value in _fields(config):
        if not isinstance(value, bool) or "bias" not in field:
            continue
        after = Outline.with_field(config, field, not value)
        if after is None or before.differing(after) or before.shapes.keys() - after.shapes.keys():
            continue
        added = after.shapes.keys() - before.shapes.keys()
        wanted = {f"{before.outgoing[name]}.bias" for name in names}
        if wanted <= added and all(name.endswith(".bias") for name in added):
            found.append((len(added), field, not value))
    return min(found)[1:] if found else None


def _fields(config: Any) -> Iterator[tuple[str, Any]]:
    yield from config.get_text_config(decoder=True).to_dict().items()


def _numbers(config: Any, before: Outline) -> list[tuple[str, int | None]]:
    """Return the fields that may decide a width: those whose value is one, then unset ones."""
    widths = set(before.widths.values())
    numbers = [
        (field, value)
        for field, value in _fields(config)
        if value is None or (type(value) is int and value > 1)
    ]
    # Transformers warns of ids of special tokens that are not in the vocabulary.
    fields = [item for item in numbers if not item[0].endswith("token_id")]
    return sorted(fields, key=lambda item: (item[1] not in widths, item[1] is not None))


def _changed_widths(before: Outline, after: Outline | None) -> set[str]:
    """Return the blocks that have another number of neurons."""
    if after is None or before.widths.keys() != after.widths.keys():
        return set()
    return {name for name, d_ff in before.widths.items() if after.widths[name] != d_ff}


def _width_field(
    field: str, value: int | None, before: Outline, after: Outline
) -> WidthField | None:
    """Return what a doubled field decides, or None if it is not the widths of blocks alone."""
    blocks = _changed_widths(before, after)
    leaves = frozenset[str]().union(*(before.leaves[name] for name in blocks))
    if before.shapes.keys() != after.shapes.keys() or not before.differing(after) <= leaves:
        return None
    doubled = 2 * (value or max(before.widths.values()))
    ratios = {Fraction(after.widths[name], doubled) for name in blocks}
    if len(ratios) != 1:
        return None
    ratio = ratios.pop()
    if value is not None and any(before.widths[name] != ratio * value for name in blocks):
        return None
    return WidthField(name=field, blocks=frozenset(blocks), ratio=ratio)
