"""The model that is trained: the base's structure with FFN leaves that hold kept neurons only.

A pathway is fixed while it is healed, so nothing but its kept rows and columns is computed: every
FFN leaf of the student is a plain ``nn.Linear`` of them, refit and bias added in. All other
parameters are the base's own. The student's function is the pathway's (``check_student``), a step
costs what the pathway's FLOPs say, and what was learnt is folded back by ``folding.py``. The dense
partner is the student of a pathway that keeps everything.

Where a block's neurons cannot be computed apart (``FfnBlock.entangled``), the incoming leaves stay
whole and untrained, and the outgoing leaf reads the kept neurons of the activation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_sparse_pathways.discovery.passes import evaluation_mode
from hf_sparse_pathways.discovery.trials import run_model
from hf_sparse_pathways.discovery.windows import Batch
from hf_sparse_pathways.errors import UnsupportedModelError
from hf_sparse_pathways.ffn.block_pathway import BlockPathway, LowRank, as_matrix
from hf_sparse_pathways.ffn.blocks import FfnBlock, find_blocks
from hf_sparse_pathways.ffn.layouts import linear_weight
from hf_sparse_pathways.modeling.structure import copy_structure

_TOLERANCE = 1e-2


@dataclass(frozen=True, kw_only=True)
class StudentLeaf:
    """One FFN leaf of the student.

    Attributes:
        name: Its name in the base model.
        place: Name of the ``nn.Linear`` in the student.
        index: Which rows (incoming) or columns (outgoing) of the base's leaf it has, int64.
        incoming: Whether it is an incoming leaf.
        width: All rows, or columns, of the base's leaf.
        trained: Whether it may be.
    """

    name: str
    place: str
    index: Tensor
    incoming: bool
    width: int
    trained: bool


@dataclass(frozen=True, kw_only=True)
class Student:
    """A trainable structure of one pathway.

    Attributes:
        model: The structure; it evaluates (no dropout), and all parameters are frozen as yet.
        pathways: What it computes, one entry per FFN block.
        leaves: Per FFN block, its incoming leaves and the outgoing one.
    """

    model: Any
    pathways: tuple[BlockPathway, ...]
    leaves: tuple[tuple[StudentLeaf, ...], ...]

    def trained_leaves(self) -> Iterator[StudentLeaf]:
        """Yield the leaves that may be trained."""
        for leaves in self.leaves:
            yield from (leaf for leaf in leaves if leaf.trained)


def frozen_copy(model: nn.Module, device: torch.device) -> Any:
    """Return a structure with frozen float32 parameters; what is float32 already is shared."""
    replaced = {
        id(parameter): nn.Parameter(parameter.detach().to(device).float(), requires_grad=False)
        for parameter in model.parameters()
    }
    return copy_structure(model, replaced).to(device).eval()


def make_student(frozen: nn.Module, pathways: Sequence[BlockPathway]) -> Student:
    """Return the student of a pathway.

    Args:
        frozen: The dense model, as ``frozen_copy`` returns it; its parameters are shared.
        pathways: One entry per FFN block.
    """
    model = copy_structure(frozen, {})
    blocks = find_blocks(model)
    leaves = tuple(_shrink(block, kept) for block, kept in zip(blocks, pathways, strict=True))
    return Student(model=model, pathways=tuple(pathways), leaves=leaves)


def everything(frozen: nn.Module) -> tuple[BlockPathway, ...]:
    """Return the pathway of the dense partner, which keeps every neuron."""
    return tuple(
        BlockPathway(keep=torch.ones(block.d_ff, dtype=torch.bool)) for block in find_blocks(frozen)
    )


@torch.no_grad()
def check_student(student: Student, model: Any, batch: Batch, domain: str | None) -> None:
    """Check that an untrained student computes what the model does.

    Raises:
        UnsupportedModelError: It does not: the model's code computes more than its leaves show.
    """
    with evaluation_mode(model):
        expected = run_model(model, batch, domain=domain).float().cpu()[batch.mask]
    found = run_model(student.model, batch).float().cpu()[batch.mask]
    difference = float((expected - found).norm() / expected.norm().clamp_min(1e-30))
    if not difference < _TOLERANCE * (1 if next(model.parameters()).dtype == torch.float32 else 8):
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be healed: the compact form of its FFN blocks differs "
            f"from the pathway by {difference:.1%} of the logits."
        )


def base_weight(frozen: nn.Module, leaf: StudentLeaf) -> Tensor:
    """Return the base's kept rows or columns of a leaf, float32, in ``nn.Linear``'s order."""
    return _kept(frozen.get_submodule(leaf.name), leaf.index, incoming=leaf.incoming)


def reduce_frozen(model: nn.Module) -> None:
    """Hold frozen linear weights in bfloat16, in place: autocast would cast them at every use."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D)) and id(module.weight) not in embeddings:
            for name, parameter in list(module.named_parameters(recurse=False)):
                if not parameter.requires_grad:
                    reduced = nn.Parameter(parameter.detach().bfloat16(), requires_grad=False)
                    setattr(module, name, reduced)


def _shrink(block: FfnBlock, pathway: BlockPathway) -> tuple[StudentLeaf, ...]:
    """Replace a block's leaves by those of its kept neurons, in place."""
    kept = pathway.neurons
    parts = 2 if block.layout.fused else 1
    rows = torch.cat([kept + part * block.d_ff for part in range(parts)])
    whole = block.entangled is not None
    made = []
    for position, name in enumerate(block.layout.incoming):
        small = _incoming(block, position, pathway, rows, whole=whole)
        block.parent.set_submodule(name, small)
        place = f"{block.name}.{name}"
        made.append(
            StudentLeaf(
                name=place,
                place=place,
                index=torch.arange(parts * block.d_ff) if whole else rows,
                incoming=True,
                width=parts * block.d_ff,
                trained=not whole,
            )
        )
    outgoing = _outgoing(block, pathway, kept)
    name = f"{block.name}.{block.layout.outgoing}"
    block.parent.set_submodule(block.layout.outgoing, _Kept(kept, outgoing) if whole else outgoing)
    made.append(
        StudentLeaf(
            name=name,
            place=f"{name}.linear" if whole else name,
            index=kept,
            incoming=False,
            width=block.d_ff,
            trained=True,
        )
    )
    if pathway.bypass is not None:
        _attach_bypass(block, outgoing, pathway.bypass)
    return tuple(made)


def _incoming(
    block: FfnBlock, position: int, pathway: BlockPathway, rows: Tensor, *, whole: bool
) -> nn.Linear:
    """Return an incoming leaf's kept rows with their change; or all rows, the kept ones changed."""
    leaf: Any = block.incoming[position]
    weight = _kept(leaf, None, incoming=True).clone() if whole else _kept(leaf, rows, incoming=True)
    change = pathway.incoming[position] if position < len(pathway.incoming) else None
    if change is not None:
        places = rows if whole else torch.arange(len(rows))
        weight.index_add_(0, places.to(weight.device), as_matrix(change).to(weight))
    bias = leaf.bias
    if bias is not None and not whole:
        bias = bias.detach()[rows.to(bias.device)]
    return _linear(weight, bias)


def _outgoing(block: FfnBlock, pathway: BlockPathway, kept: Tensor) -> nn.Linear:
    """Return the outgoing leaf's kept columns, refit and bias added."""
    leaf: Any = block.outgoing
    weight = _kept(leaf, kept, incoming=False)
    if pathway.delta is not None:
        weight = weight + as_matrix(pathway.delta).to(weight)
    bias = leaf.bias
    if pathway.bias is not None:
        added = pathway.bias.to(weight)
        bias = added if bias is None else bias.detach() + added
    return _linear(weight, bias)


class _Kept(nn.Module):
    """A linear map of the kept neurons of an activation."""

    def __init__(self, kept: Tensor, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("kept", kept, persistent=False)
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """Select the kept neurons and map them."""
        kept: Any = self.kept
        return self.linear(x.index_select(-1, kept.to(x.device)))


def _attach_bypass(block: FfnBlock, outgoing: nn.Linear, bypass: LowRank) -> None:
    """Add a bypass of the block's input to its output, in place; it is not trained."""
    inputs: list[Tensor] = []

    def see(module: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG001
        inputs[:] = [args[0]]

    def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:  # noqa: ARG001
        x = inputs.pop()
        return output + bypass.to(x)(x)

    block.incoming[0].register_forward_pre_hook(see)
    outgoing.register_forward_hook(add)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a frozen float32 linear module with given weights."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return made.eval()


def _kept(leaf: Any, index: Tensor | None, *, incoming: bool) -> Tensor:
    """Return a leaf's weight in ``nn.Linear``'s order, or some of its rows or columns."""
    weight = linear_weight(leaf).detach().float()
    if index is None:
        return weight
    return weight.index_select(0 if incoming else 1, index.to(weight.device))
