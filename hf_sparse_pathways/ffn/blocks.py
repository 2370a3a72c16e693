"""Find the FFN blocks of a causal LM's text decoder, or say why a layer has none.

Every module below a numbered layer of the text decoder is compared with the layout table. A match
is a block, unless it lies in a norm or a router; a layer without one is refused with its children's
names. Routed experts (packed 3-D parameters, or anything below ``experts``) are listed apart: those
that ``experts`` knows, and those that stay dense.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_sparse_pathways.errors import UnsupportedModelError
from hf_sparse_pathways.ffn.clusters import Kept
from hf_sparse_pathways.ffn.experts import RoutedExperts, list_candidates, list_linear, match_routed
from hf_sparse_pathways.ffn.layouts import Layout, find_child, linear_widths, match_layout
from hf_sparse_pathways.ffn.sharding import is_sharded
from hf_sparse_pathways.sgatlin.layer import FfnLayer


@dataclass(frozen=True, kw_only=True)
class FfnBlock:
    """One FFN block of a live model.

    Attributes:
        name: Qualified name of the module that holds the leaves.
        layer: The decoder layer that it lies in.
        parent: That module.
        layout: The names of its leaves.
        d_in: Input width of the incoming leaves (d_model).
        d_ff: Number of neurons.
        d_out: Output width of the outgoing leaf (d_model).
        entangled: Why the neurons cannot be computed apart from each other (a norm over d_ff,
            say), or None. Such a block is always masked: it equals the dense block with the
            removed neurons' columns of the outgoing leaf zeroed.
    """

    name: str
    layer: nn.Module
    parent: nn.Module
    layout: Layout
    d_in: int
    d_ff: int
    d_out: int
    entangled: str | None

    @property
    def incoming(self) -> tuple[nn.Module, ...]:
        """The leaves from d_model to d_ff."""
        return tuple(self.parent.get_submodule(name) for name in self.layout.incoming)

    @property
    def outgoing(self) -> nn.Module:
        """The leaf from d_ff to d_model; its input is the activation."""
        return self.parent.get_submodule(self.layout.outgoing)

    @property
    def branches(self) -> int:
        """Rows of the incoming leaves per neuron: 2 with a gate, else 1."""
        return 2 if self.layout.fused else len(self.layout.incoming)

    @property
    def leaves(self) -> tuple[nn.Module, ...]:
        """The incoming leaves and the outgoing one."""
        return (*self.incoming, self.outgoing)

    def check_leaves(self, part: Kept) -> None:
        """Check that what a pathway changes of the incoming leaves fits them.

        Raises:
            MismatchError: It does not.
        """
        part.check_leaves(self.name, len(self.layout.incoming), fused=self.layout.fused)


@dataclass(frozen=True)
class Refused:
    """A decoder layer (or part of one) in which no neurons can be skipped, and why."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What was found in a model.

    Attributes:
        blocks: The FFN blocks, in the order of the layers.
        experts: Routed experts among which pathways can choose.
        routed: Names of all modules with routed experts.
        dense: Those of them that stay dense, and why.
        refused: Layers without an FFN block.
    """

    blocks: tuple[FfnBlock, ...]
    experts: tuple[RoutedExperts, ...]
    routed: tuple[str, ...]
    dense: tuple[Refused, ...]
    refused: tuple[Refused, ...]


def find_blocks(model: nn.Module) -> tuple[FfnBlock, ...]:
    """Return the FFN blocks of a causal LM in layer order; none where all FFNs are routed experts.

    Raises:
        UnsupportedModelError: There are neither blocks nor experts that fit; the message names
            what the layers hold instead.
    """
    survey = survey_model(model)
    if survey.blocks or survey.experts:
        return survey.blocks
    layer = next((module for module in model.modules() if isinstance(module, FfnLayer)), None)
    if layer is not None:
        raise UnsupportedModelError(
            f"The FFNs of this {type(model).__name__} are {layer.config.kind} layers, which have "
            "no neurons that could be chosen for a domain. Take a model with dense FFNs, or with "
            "sgatlin layers."
        )
    refusals = survey.dense or survey.refused
    reasons = "; ".join(f"{refused.name}: {refused.reason}" for refused in refusals[:2])
    hint = "Routed experts fit where they are as in hf_sparse_pathways/ffn/expert_layouts.py."
    if not survey.routed:
        hint = (
            "Supported are dense FFNs whose linear leaves are named as in "
            "hf_sparse_pathways/ffn/layouts.py; quantised, adapter-wrapped or sharded leaves do "
            "not fit: load the plain weights, or merge the adapter first."
        )
    raise UnsupportedModelError(
        f"{type(model).__name__} has no FFN block whose neurons can be skipped ({reasons}). {hint}"
    )


def has_parts(model: nn.Module) -> bool:
    """Whether there are FFN blocks or routed experts that pathways can keep in part."""
    survey = survey_model(model)
    return bool(survey.blocks or survey.experts)


def survey_model(model: nn.Module) -> Survey:
    """Look at every layer of the text decoder. Pure."""
    blocks: list[FfnBlock] = []
    experts: list[RoutedExperts] = []
    dense: list[Refused] = []
    routed: list[str] = []
    refused: list[Refused] = []
    for layer_name, layer in _decoder_layers(model):
        found = [
            _describe(f"{layer_name}.{path}" if path else layer_name, layer, module, layout)
            for path, module, layout in _matches(layer)
        ]
        candidates = [*list_candidates(layer_name, layer)]
        for name, parent, module in candidates:
            matched = match_routed(name, parent, module)
            if isinstance(matched, RoutedExperts):
                experts.append(matched)
            else:
                dense.append(Refused(name, matched))
            routed.append(name)
        linear = [*list_linear(layer_name, layer)]
        experts.extend(linear)
        routed.extend(one.name for one in linear)
        blocks.extend(found)
        if not found:
            refused.append(Refused(layer_name, _why_nothing(layer, bool(candidates or linear))))
    return Survey(
        blocks=_without_shared(blocks),
        experts=tuple(experts),
        routed=tuple(routed),
        dense=tuple(dense),
        refused=tuple(refused),
    )


def _decoder_layers(model: Any) -> list[tuple[str, nn.Module]]:
    """Return the named layers of the text decoder, of all of its stacks that have FFN blocks.

    A stack is an outermost ModuleList that does not belong to another modality's encoder. If none
    has a block, the longest is returned, for its layers to be refused by name.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if not isinstance(decoder, nn.Module) or not any(
        isinstance(module, nn.ModuleList) for module in decoder.modules()
    ):
        decoder = model
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    named = list(decoder.named_modules(prefix=prefix))
    foreign = tuple(f"{name}." for name, module in named if _is_foreign(module, decoder))
    stacks = [
        (name, module)
        for name, module in named
        if isinstance(module, nn.ModuleList)
        and not any(part.isdigit() for part in name.split("."))
        and not name.startswith(foreign)
    ]
    if not stacks:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of decoder layers; its children are "
            f"{_children(decoder)}. Only decoders built from a ModuleList of layers fit."
        )
    matching = [(name, stack) for name, stack in stacks if _has_ffn(stack)]
    chosen = matching or [max(stacks, key=lambda item: len(item[1]))]
    return [(f"{name}.{i}", layer) for name, stack in chosen for i, layer in enumerate(stack)]


def _is_foreign(module: nn.Module, decoder: nn.Module) -> bool:
    """Whether a module encodes another modality than text."""
    modalities = getattr(type(module), "input_modalities", None)
    if module is decoder or modalities is None or not isinstance(modalities, (str, tuple, list)):
        return False
    return "text" not in ((modalities,) if isinstance(modalities, str) else modalities)


def _has_ffn(stack: nn.ModuleList) -> bool:
    """Whether a stack's layers have FFN blocks, or layers of this package in their place."""
    replaced = any(isinstance(module, FfnLayer) for module in stack.modules())
    return replaced or any(map(_matches, stack))


def _matches(layer: nn.Module) -> list[tuple[str, nn.Module, Layout]]:
    """Return what follows a layout in a layer: its path in the layer, the module, the layout."""
    return [
        (path, module, layout)
        for path, module in layer.named_modules()
        if not _is_elsewhere(path) and (layout := match_layout(module)) is not None
    ]


def _is_elsewhere(path: str) -> bool:
    """Whether a path in a layer leads into routed experts, a router or a norm."""
    return any(
        part in ("experts", "gate") or "norm" in part or "router" in part
        for part in path.split(".")
    )


def _describe(name: str, layer: nn.Module, parent: nn.Module, layout: Layout) -> FfnBlock:
    incoming = linear_widths(find_child(parent, layout.incoming[0]))
    outgoing = linear_widths(find_child(parent, layout.outgoing))
    if incoming is None or outgoing is None:
        raise UnsupportedModelError(f"{name} changed while it was looked at.")
    if is_sharded(find_child(parent, layout.outgoing)):
        raise UnsupportedModelError(
            f"{name} is sharded over several processes (tp_plan), so its neurons cannot be looked "
            "at or chosen. Do that on the whole model; one with pathways is then loaded with "
            "from_pretrained(folder, tp_plan='auto')."
        )
    if getattr(parent, "slow_but_exact", False) and getattr(parent, "pretraining_tp", 1) > 1:
        raise UnsupportedModelError(
            f"{name} reads slices of its weights itself (slow_but_exact with pretraining_tp > 1). "
            "Load the model with slow_but_exact=False."
        )
    return FfnBlock(
        name=name,
        layer=layer,
        parent=parent,
        layout=layout,
        d_in=incoming[0],
        d_ff=outgoing[0],
        d_out=outgoing[1],
        entangled=_entanglement(parent, layout, outgoing[0]),
    )


def _entanglement(parent: nn.Module, layout: Layout, d_ff: int) -> str | None:
    """Say what, between the leaves, mixes neurons or adds to all of them; None if nothing does."""
    if getattr(parent, "activation_sparsity", 0.0):
        return "its activation thresholds each neuron by statistics of all of them"
    leaves = tuple(f"{name}." for name in (*layout.incoming, layout.outgoing))
    for name, module in parent.named_modules():
        if not name or f"{name}.".startswith(leaves):
            continue
        widths = linear_widths(module)
        if widths is not None and widths[1] == d_ff * (2 if layout.fused else 1) != widths[0]:
            return f"its child {name!r} adds to every neuron"
        vector = any(
            parameter.dim() == 1 and parameter.shape[0] == d_ff
            for parameter in module.parameters(recurse=False)
        )
        if widths is None and vector:
            return f"its child {name!r} works on all neurons at once"
    return None


def _why_nothing(layer: nn.Module, routed: bool) -> str:
    if routed:
        return "it has routed experts only"
    return f"its children are {_children(layer)}"


def _children(module: nn.Module) -> str:
    """Render the direct children and, in brackets, theirs."""
    parts = []
    for name, child in module.named_children():
        inner = ", ".join(grandchild for grandchild, _ in child.named_children())
        parts.append(f"{name}({inner})" if inner else name)
    return ", ".join(parts) or "none"


def _without_shared(blocks: list[FfnBlock]) -> tuple[FfnBlock, ...]:
    """Keep one entry for a module that several layers share."""
    unique = {id(block.parent): block for block in reversed(blocks)}
    return tuple(block for block in blocks if unique[id(block.parent)] is block)
