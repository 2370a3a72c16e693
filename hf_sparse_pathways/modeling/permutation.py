"""A model's neurons in an order in which each domain's kept set is few contiguous runs.

Kept neurons that stand together can be computed as slices of the weights and read from a file as
ranges. The order is found block by block (``ffn/permutation.py``); weights and pathways move
together, and a digest of the orders goes into the configuration and into what is saved, so that
pathways, masks and profiles of one order are refused by a model of another.
"""

import copy
import hashlib
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_sparse_pathways.errors import PathwaysError, UnsupportedModelError
from hf_sparse_pathways.ffn.permutation import order_neurons
from hf_sparse_pathways.ffn.reordering import can_reorder, reorder_pathway, reorder_weights
from hf_sparse_pathways.modeling.model import SparsePathwaysModel
from hf_sparse_pathways.modeling.structure import check_undispatched, copy_structure
from hf_sparse_pathways.pathways.base import BaseModel
from hf_sparse_pathways.pathways.pathway import Pathway, Pathways

if TYPE_CHECKING:
    from hf_sparse_pathways.ffn.blocks import FfnBlock


def permute(model: Any) -> Any:
    """Return a model whose neurons stand in an order that suits its domains. Pure.

    It computes what the given one computes, dense and in every domain, up to the order in which
    numbers are summed. The weights of its FFN blocks are copies, so neither the given model nor a
    dense one that shares its weights changes; all other weights are shared with it.

    Args:
        model: A model with pathways, of ``from_dense`` or ``from_pretrained``.

    Returns:
        A model of the same class, with the same pathways in the new order.

    Raises:
        PathwaysError: It has no pathways.
        UnsupportedModelError: It is dispatched, or adapters, quantisation or shared weights leave
            no plain weights to move.
    """
    if not isinstance(model, SparsePathwaysModel) or not model.domains:
        raise PathwaysError(
            f"permute orders neurons by the domains that keep them, and {type(model).__name__} has "
            "none. Give it a model of SparsePathwaysForCausalLM with pathways."
        )
    model.check_no_adapters("their matrices stand in the neurons' old order")
    blocks = _plain_blocks(model)
    pathways = model.pathways
    orders = tuple(_order(block, index, pathways) for index, block in enumerate(blocks))
    config = copy.deepcopy(model.config)
    digest = _digest(config, orders)
    if digest is not None:
        config.neuron_order = digest
    replaced: dict[int, Any] = {id(model.config): config, id(model._pathways): None}
    for block, order in zip(blocks, orders, strict=True):
        replaced |= reorder_weights(block, order)
    permuted = copy_structure(model, {**replaced, **model._attachment.without_pathways})
    permuted._shape = BaseModel.of(permuted)
    permuted.set_pathways(_reordered(pathways, permuted._shape, orders))
    return permuted


def _plain_blocks(model: SparsePathwaysModel) -> "list[FfnBlock]":
    """Return the blocks of a model whose leaves hold their own plain weights.

    Raises:
        UnsupportedModelError: Some do not.
    """
    check_undispatched(model)
    model._attachment.settle()
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    for attached in model._attachment.blocks:
        leaves = attached.leaves.values()
        shared = any(uses[id(p)] > 1 for leaf in leaves for p in leaf.parameters())
        if shared or (attached.state.masked_only and attached.block.entangled is None):
            raise UnsupportedModelError(
                f"The neurons of {attached.block.name} cannot be permuted: an adapter, a quantiser "
                "or another module has a part in its weights. Merge or unload adapters, and "
                "permute before quantising."
            )
    return [attached.block for attached in model._attachment.blocks]


def _order(block: "FfnBlock", index: int, pathways: Pathways) -> Tensor:
    if not can_reorder(block):
        return torch.arange(block.d_ff)
    keeps = [pathway.keep[index] for pathway in pathways.by_domain.values()]
    return order_neurons(keeps, turn=index)


def _digest(config: Any, orders: tuple[Tensor, ...]) -> str | None:
    """Identify orders of neurons, on top of the one that a model has already."""
    earlier: str | None = getattr(config, "neuron_order", None)
    if all(torch.equal(order, torch.arange(len(order))) for order in orders):
        return earlier
    digest = hashlib.sha256((earlier or "").encode())
    for order in orders:
        digest.update(order.numpy().astype("<i8").tobytes())
    return digest.hexdigest()[:24]


def _reordered(pathways: Pathways, base: BaseModel, orders: tuple[Tensor, ...]) -> Pathways:
    """Return pathways for their base in another order."""

    def moved(pathway: Pathway) -> Pathway:
        pairs = zip(pathway.blocks, orders, strict=True)
        return replace(pathway, blocks=tuple(reorder_pathway(part, order) for part, order in pairs))

    return replace(
        pathways,
        base=replace(pathways.base, neuron_order=base.neuron_order),
        by_domain={name: moved(pathway) for name, pathway in pathways.by_domain.items()},
        controls={name: moved(pathway) for name, pathway in pathways.controls.items()},
    )
