"""FFN layers of one kind in the place of a base's FFN blocks.

Blocks are found as for pathways. Where a block is a module that is called with the hidden states
alone, the layer takes its place: ``model.layers.0.mlp``. Elsewhere (leaves that lie in the decoder
layer itself, blocks that add the residual) it takes the place of the outgoing leaf, and gets the
input of the incoming ones: norms, dropout and residual stay the base's own code.
"""

import inspect
import logging
from collections.abc import Callable, Sequence
from threading import local
from typing import Any

from torch import Tensor, nn

from hf_sparse_pathways.errors import PathwaysError, UnsupportedModelError
from hf_sparse_pathways.ffn.blocks import FfnBlock, survey_model
from hf_sparse_pathways.ffn.layouts import find_child
from hf_sparse_pathways.sgatlin.kinds import make_layer
from hf_sparse_pathways.sgatlin.layer import FfnLayer, collect_losses, has_losses
from hf_sparse_pathways.sgatlin.settings import FfnConfig

logger = logging.getLogger(__name__)


def replace_blocks(
    model: nn.Module, config: FfnConfig, numbers: Sequence[int] | None = None
) -> None:
    """Put new layers into the place of a model's FFN blocks, in place.

    Args:
        model: The model.
        config: Of the layers.
        numbers: Which blocks, from 0; None for all.

    Raises:
        UnsupportedModelError: The model has no FFN block, or a layer does not fit into one's place.
        PathwaysError: There is no block of a number.
    """
    survey = survey_model(model)
    if not survey.blocks:
        reasons = "; ".join(f"{refused.name}: {refused.reason}" for refused in survey.refused[:2])
        raise UnsupportedModelError(
            f"{type(model).__name__} has no FFN block that {config.kind} layers could replace "
            f"({reasons}). Take an architecture with dense FFNs."
        )
    if survey.routed:
        logger.warning(
            "%s layers take the place of dense FFNs; routed experts stay as they are: %s",
            config.kind,
            ", ".join(survey.routed),
        )
    chosen = range(len(survey.blocks)) if numbers is None else numbers
    if any(number >= len(survey.blocks) for number in chosen):
        raise PathwaysError(
            f"ffn_blocks={list(chosen)} does not fit: the model has {len(survey.blocks)} FFN "
            "blocks, numbered from 0."
        )
    for number in chosen:
        _replace(model, survey.blocks[number], config)


def find_layers(model: nn.Module) -> list[FfnLayer]:
    """Return the FFN layers of a model, in the order of its own."""
    return [module for module in model.modules() if isinstance(module, FfnLayer)]


def forward_with_losses(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a base's forward; what FFN layers add to the loss is added to its output's, if any.

    Where the loss is a batch's part of that of several, as ``Trainer`` asks for when it adds up
    gradients, so is what is added.
    """
    with collect_losses() as losses:
        output = forward(*args, **kwargs)
    labels, items = kwargs.get("labels"), kwargs.get("num_items_in_batch")
    if not losses or labels is None:
        return output
    added = sum(losses)
    if items is not None:
        added = added * (labels[..., 1:].ne(-100).sum() / items)  # as Trainer counts
    if isinstance(output, tuple):
        return (output[0] + added, *output[1:])
    output.loss = output.loss + added
    return output


def check_checkpointing(ffn: FfnConfig | None, checkpoint: Any) -> None:
    """Check that gradient checkpointing loses no layer's part of the loss.

    Args:
        ffn: The layers'.
        checkpoint: The function, with its settings.

    Raises:
        UnsupportedModelError: It would: what runs without gradients gives none for a loss.
    """
    if has_losses(ffn) and getattr(checkpoint, "keywords", {}).get("use_reentrant", False):
        raise UnsupportedModelError(
            "Reentrant checkpointing would lose the gradients of the experts' load-balancing loss "
            "and z-loss. Use use_reentrant=False, or set both weights to 0."
        )


def refuse(ffn: FfnConfig, what: str) -> PathwaysError:
    """Return the error of something that a model with such layers has not.

    Args:
        ffn: The layers'.
        what: What it is, as the end of a sentence.
    """
    return PathwaysError(
        f"The FFNs of this model are {ffn.kind} layers (ffn={ffn}), and it has no pathways: "
        f"{what}. Models with dense FFNs, routed experts or sgatlin layers can be given some: by "
        "`sparse-pathways build`, or sp.profile, sp.select and model.set_pathways."
    )


def _replace(model: nn.Module, block: FfnBlock, config: FfnConfig) -> None:
    if block.d_in != block.d_out:
        raise UnsupportedModelError(
            f"{block.name} leads from a width of {block.d_in} to {block.d_out}; FFN layers keep it."
        )
    layer = make_layer(config, block.d_in)
    if _takes_one(block):
        model.set_submodule(block.name, layer)
        return
    if block.entangled:
        raise UnsupportedModelError(
            f"{block.name} cannot be replaced by {config.kind} layers: {block.entangled}."
        )
    for name in block.layout.incoming:
        _put(block.parent, name, _Incoming(2 if block.layout.fused else 1))
    _put(block.parent, block.layout.outgoing, _Outgoing(layer))


def _takes_one(block: FfnBlock) -> bool:
    """Whether a block is a module that is called with the hidden states and nothing else."""
    return block.parent is not block.layer and len(_parameters(block.parent)) == 1


def _parameters(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def _put(parent: nn.Module, path: str, module: nn.Module) -> None:
    above, _, name = path.rpartition(".")
    holder = find_child(parent, above) if above else parent
    assert holder is not None  # the layout has matched
    setattr(holder, name, module)


class _Held(local):
    """The input of the block that is running on a thread, from its first leaf to its last."""

    x: Tensor | None = None


_HELD = _Held()


class _Incoming(nn.Module):
    """In an incoming leaf's place: keeps the block's input, and gives zeros that nobody reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        _HELD.x = x
        return x.new_zeros(*x.shape[:-1], self.width)


class _Outgoing(nn.Module):
    """In an outgoing leaf's place: the layer, of the input that was kept."""

    def __init__(self, ffn: FfnLayer) -> None:
        super().__init__()
        self.ffn = ffn

    def forward(self, _: Tensor) -> Tensor:
        x, _HELD.x = _HELD.x, None
        assert x is not None  # the incoming leaves have run
        return self.ffn(x)
