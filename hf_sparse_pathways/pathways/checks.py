"""Whether what a pathway keeps fits the base model's blocks and routed experts."""

from typing import TYPE_CHECKING

from hf_sparse_pathways.errors import MismatchError
from hf_sparse_pathways.ffn.clusters import Kept
from hf_sparse_pathways.ffn.kept_experts import KeptExperts
from hf_sparse_pathways.pathways.base import BaseModel, BlockShape

if TYPE_CHECKING:
    from hf_sparse_pathways.pathways.pathway import Pathway


def check_pathway(name: str, pathway: "Pathway", base: BaseModel) -> None:
    """Check that a domain's pathway fits a base model.

    Raises:
        MismatchError: It does not; the message names the domain and the block.
    """
    if len(pathway.blocks) != len(base.blocks):
        raise MismatchError(
            f"Domain {name!r} has {len(pathway.blocks)} masks, but {base.name!r} has "
            f"{len(base.blocks)} FFN blocks. Give one mask per block, in layer order."
        )
    for block, shape in zip(pathway.blocks, base.blocks, strict=True):
        check_block(name, block, shape)
    if pathway.experts:
        check_experts(name, pathway.experts, base)


def check_block(name: str, block: Kept, shape: BlockShape) -> None:
    """Check that what a domain's pathway keeps of a block fits it; see ``BlockPathway.check``.

    Raises:
        MismatchError: It does not; the message names the domain and the block.
    """
    try:
        block.check(shape.name, shape.d_in, shape.d_ff, shape.d_out, shape.branches)
    except MismatchError as error:
        raise MismatchError(f"Domain {name!r}: {error}") from error


def check_experts(name: str, experts: tuple[KeptExperts, ...], base: BaseModel) -> None:
    """Check that what a domain's pathway keeps of routed experts fits them.

    Raises:
        MismatchError: It does not; the message names the domain and the layer.
    """
    if len(experts) != len(base.experts):
        raise MismatchError(
            f"Domain {name!r} keeps experts of {len(experts)} layers, but {base.name!r} has "
            f"{len(base.experts)} layers with routed experts. Give one entry per layer."
        )
    for kept, shape in zip(experts, base.experts, strict=True):
        if not isinstance(kept, KeptExperts):
            raise MismatchError(
                f"Domain {name!r}: a layer's entry has to be sp.KeptExperts(keep=mask), got "
                f"{kept!r:.200}."
            )
        try:
            kept.check(shape)
        except MismatchError as error:
            raise MismatchError(f"Domain {name!r}: {error}") from error
