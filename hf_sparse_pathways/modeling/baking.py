"""One domain's neurons as a plain model of the base's architecture.

Every block is cut and repaired as for partial loading (``ffn/reduction.py``). Blocks whose width
one field of the configuration decides (``fields.py``) get one width: the widest one's number of
kept neurons, rounded up; the others are filled up with zeros. A bias needs a place: where the
architecture's leaves have none, a switch of the configuration may give them one, and every other
bias that it adds is zero.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hf_sparse_pathways.errors import (
    PathwaysError,
    UnknownNameError,
    UnsupportedModelError,
    named,
    option,
)
from hf_sparse_pathways.ffn.block_pathway import BlockPathway
from hf_sparse_pathways.ffn.blocks import FfnBlock, find_blocks
from hf_sparse_pathways.ffn.reduction import ReducedBlock
from hf_sparse_pathways.modeling.expert_baking import bake_experts
from hf_sparse_pathways.modeling.fields import (
    Outline,
    find_bias_switch,
    find_width_fields,
    set_field,
)
from hf_sparse_pathways.pathways.pathway import Pathway, Pathways

BIASES = ("keep", "drop")
"""What may become of a pathway's bias."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """What a base's configuration has to say so that its model has the shape of a pathway.

    Attributes:
        fields: Field -> value, of what differs from the base's.
        widths: FFN block -> number of neurons.
    """

    fields: Mapping[str, Any]
    widths: Mapping[str, int]

    def apply(self, config: Any) -> None:
        """Change a configuration, in place."""
        for field, value in self.fields.items():
            set_field(config, field, value)


def has_place_for_bias(model: Any) -> bool:
    """Whether the outgoing leaves of a dense model's FFN blocks have biases, or may have them."""
    without = [block.name for block in find_blocks(model) if not _has_bias(block)]
    before = Outline.of(model.config)
    return not without or find_bias_switch(model.config, before, without) is not None


def find_form(
    model: Any, kept: Sequence[int], biased: Sequence[bool], multiple_of: int = 1
) -> Form:
    """Find how a configuration says a pathway's widths and biases.

    Args:
        model: The dense model.
        kept: Number of neurons that stay, per FFN block.
        biased: Whether a bias is added, per FFN block.
        multiple_of: Widths that change are rounded up to multiples of this.

    Raises:
        UnsupportedModelError: It cannot.
    """
    blocks, config = find_blocks(model), model.config
    numbers = {block.name: number for block, number in zip(blocks, kept, strict=True)}
    narrower = [block.name for block in blocks if numbers[block.name] < block.d_ff]
    _check_separable([block for block in blocks if block.name in narrower])
    before = Outline.of(config)
    fields: dict[str, Any] = {}
    widths = dict(before.widths)
    for field in find_width_fields(config, before, narrower):
        widest = max(numbers[name] for name in field.blocks)
        step = math.lcm(multiple_of, field.ratio.numerator)
        width = -(-widest // step) * step
        d_ff = min(before.widths[name] for name in field.blocks)
        if width >= d_ff:
            raise PathwaysError(_why_not_narrower(field.name, widest, width, d_ff))
        widths |= dict.fromkeys(field.blocks, width)
        fields[field.name] = int(width / field.ratio)
    pairs = zip(blocks, biased, strict=True)
    without = [block.name for block, bias in pairs if bias and not _has_bias(block)]
    return Form(fields={**fields, **_bias_fields(config, before, without)}, widths=widths)


def _bias_fields(config: Any, before: Outline, names: Sequence[str]) -> dict[str, bool]:
    """Return the switch that gives some blocks' outgoing leaves biases, if there are such blocks.

    Raises:
        UnsupportedModelError: There is no such switch.
    """
    if not names:
        return {}
    switch = find_bias_switch(config, before, names)
    if switch is None:
        raise UnsupportedModelError(
            f"The pathway adds a bias to {names[0]}, and a {type(config).__name__} has no place "
            f"for one there. Choose {named('bias', 'drop')} to leave it out, which changes the "
            f"output, or build pathways with {named('compensation', 'refit')}."
        )
    return dict([switch])


def bake(model: Any, domain: str, *, multiple_of: int = 1) -> tuple[Any, Form]:
    """Return a plain model that computes a domain's pathway, and what its configuration says. Pure.

    It has weights of its own where they differ, and shares all others.

    Args:
        model: A model with pathways.
        domain: One of its domains.
        multiple_of: Widths are rounded up to multiples of this.

    Raises:
        UnknownNameError: There is no such domain.
        UnsupportedModelError: The architecture has no form for it.
        PathwaysError: One domain's neurons were loaded alone, or widths would not be narrower.
    """
    if model.config.ffn is not None:
        raise UnsupportedModelError(
            f"The FFNs of this model are {model.config.ffn.kind} layers, which no plain "
            "architecture has. Save it with its pathways, and load it with domain= for one alone."
        )
    pathway = model.pathways.subset([domain])[domain]
    parts = _parts(pathway, domain)
    plain = model.to_dense()
    _check_plain(plain, parts)
    blocks = find_blocks(plain)
    biased = [part.bias is not None for part in parts]
    form = find_form(plain, [part.kept for part in parts], biased, multiple_of)
    for block, part in zip(blocks, parts, strict=True):
        reduced = ReducedBlock(block, part)
        reduced.finish()
        reduced.widen(form.widths[block.name])
    if pathway.experts:
        fields = bake_experts(plain, domain, pathway.experts)
        form = replace(form, fields={**form.fields, **fields})
    form.apply(plain.config)
    plain.config.__dict__.pop("neuron_order", None)
    _add_missing_biases(plain)
    return plain, form


def without_bias(pathways: Pathways) -> Pathways:
    """Return pathways without their biases; themselves if they have none. Pure."""
    parts = {name: _parts(pathway, name) for name, pathway in pathways.by_domain.items()}
    if not any(part.bias is not None for own in parts.values() for part in own):
        return pathways
    bare = {
        name: replace(pathway, blocks=tuple(replace(part, bias=None) for part in parts[name]))
        for name, pathway in pathways.by_domain.items()
    }
    return replace(pathways, by_domain=bare, controls={})


def _parts(pathway: Pathway, name: str) -> tuple[BlockPathway, ...]:
    """Return what is kept of each block, where that is the same for all tokens."""
    return pathway.unclustered(
        name, "A plain FFN computes the same for all: export a pathway that does."
    )


def check_bias(bias: str) -> None:
    """Check that a name says what may become of a bias.

    Raises:
        UnknownNameError: It does not.
    """
    if bias not in BIASES:
        raise UnknownNameError("bias", bias, BIASES)


def _has_bias(block: FfnBlock) -> bool:
    return block.outgoing._parameters.get("bias") is not None


def _check_separable(blocks: Sequence[FfnBlock]) -> None:
    """Check that neurons can be taken out of some blocks.

    Raises:
        UnsupportedModelError: They cannot.
    """
    for block in blocks:
        if block.entangled is not None:
            raise UnsupportedModelError(
                f"{block.name} cannot be made narrower: {block.entangled}, so removed neurons "
                "have to be computed all the same. Serve the model with this package."
            )


def _check_plain(model: Any, parts: Sequence[BlockPathway]) -> None:
    """Check that there are weights to cut, and that all of a pathway can be put into them.

    Raises:
        UnsupportedModelError: There are not, or it cannot.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            "The weights are quantised, and compensation is added into plain ones. Export the "
            "model in its own dtype, and quantise what is exported."
        )
    if any(part.bypass is not None for part in parts):
        raise UnsupportedModelError(
            "The pathway has a linear bypass around its FFN blocks, for which a plain FFN has no "
            f"place. Build pathways with {named('compensation', 'refit+bias')}, or serve the "
            "model with this package."
        )


def _why_not_narrower(field: str, widest: int, width: int, d_ff: int) -> str:
    rounded = "" if width == widest else f", {width} when rounded up"
    return (
        f"The blocks whose width is {field!r} would be no narrower than the base's {d_ff} "
        f"neurons: the widest keeps {widest}{rounded}. Select anew with one width for all of them "
        f"(profile=, --widths reselect), choose a smaller {option('multiple_of')}, or build "
        f"pathways with {named('allocation', 'uniform')}."
    )


@torch.no_grad()
def _add_missing_biases(model: Any) -> None:
    """Give a model the biases that its configuration says it has, in place; zeros."""
    shapes = Outline.of(model.config).shapes
    for name in shapes.keys() - {name for name, _ in model.named_parameters()}:
        leaf = model.get_submodule(name.removesuffix(".bias"))
        zeros = torch.zeros(shapes[name]).to(leaf.get_parameter("weight"))
        leaf._parameters["bias"] = nn.Parameter(zeros)
