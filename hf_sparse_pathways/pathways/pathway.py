"""A pathway is one domain's kept neurons; pathways are a base model's pathways together.

Both are values: frozen, without a link to a live model. A pathway holds one ``BlockPathway`` per
FFN block, in layer order, or a ``ClusteredBlock`` where tokens have different experts; and in
mixture-of-experts models one ``KeptExperts`` per layer with routed experts, if it says anything of
them. Besides the domains' pathways there may be *controls* (``pooled``: all domains' statistics
together), which stand beside them in every measurement and are no domains.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from hf_sparse_pathways.errors import MismatchError, UnknownNameError, UnsupportedModelError
from hf_sparse_pathways.ffn.block_pathway import BlockPathway
from hf_sparse_pathways.ffn.clusters import Kept, experts_of
from hf_sparse_pathways.ffn.kept_experts import KeptExperts
from hf_sparse_pathways.pathways.base import BaseModel
from hf_sparse_pathways.pathways.checks import check_pathway
from hf_sparse_pathways.pathways.entry import write_adapter_files
from hf_sparse_pathways.pathways.expert_summary import describe_experts
from hf_sparse_pathways.pathways.names import check_domain_name
from hf_sparse_pathways.pathways.signature import Signature
from hf_sparse_pathways.pathways.summary import describe_pathways
from hf_sparse_pathways.shares import format_share
from hf_sparse_pathways.tables import ShownAsTables, Table

if TYPE_CHECKING:
    from os import PathLike


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Pathway:
    """One domain's kept neurons.

    Attributes:
        blocks: One entry per FFN block, in layer order.
        provenance: How it was made (text sources, tokens, score, ...); plain JSON values.
        signature: What tells the domain's text, for ``domain="auto"``; None if that is not known.
        experts: What is kept of routed experts, one entry per layer that has some; none where all
            of them are kept.
    """

    blocks: tuple[Kept, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    signature: Signature | None = None
    experts: tuple[KeptExperts, ...] = ()

    def __repr__(self) -> str:
        layers = f", {len(self.experts)} layers of routed experts" if self.experts else ""
        method = self.provenance.get("method", "of unknown origin")
        return f"Pathway({len(self.blocks)} FFN blocks{layers}, {method})"

    @classmethod
    def from_keep(cls, keep: Iterable[Tensor], provenance: Mapping[str, Any] | None = None) -> Self:
        """Build from keep masks alone."""
        blocks = tuple(BlockPathway(keep=mask.detach().cpu().clone()) for mask in keep)
        return cls(blocks=blocks, provenance=dict(provenance or {}))

    @property
    def keep(self) -> tuple[Tensor, ...]:
        """The keep masks, one ``(d_ff,)`` bool tensor per block; of clusters their union."""
        return tuple(block.keep for block in self.blocks)

    @property
    def clusters(self) -> int:
        """Most experts that a block has; 1 where all tokens have the same neurons."""
        return max((len(experts_of(block)) for block in self.blocks), default=1)

    @property
    def skipped(self) -> float:
        """The share of its kept neurons that a token skips, on calibration text."""
        experts = [expert for block in self.blocks for expert in experts_of(block)]
        shares = [_active(expert) for expert in experts]
        kept = [expert.kept for expert in experts]
        active = sum(share * own for share, own in zip(shares, kept, strict=True))
        return 1.0 - active / sum(kept) if kept else 0.0

    def unclustered(self, name: str, instead: str) -> tuple[BlockPathway, ...]:
        """Return the blocks, for what can only be done where all tokens have the same neurons.

        Args:
            name: The pathway's.
            instead: What to do instead, a sentence.

        Raises:
            UnsupportedModelError: They have not.
        """
        blocks = tuple(block for block in self.blocks if isinstance(block, BlockPathway))
        if any(expert.skipping for block in self.blocks for expert in experts_of(block)):
            raise UnsupportedModelError(f"Pathway {name!r} skips neurons token by token. {instead}")
        if any(block.groups for block in blocks):
            raise UnsupportedModelError(
                f"Pathway {name!r} has groups of neurons, of which each token has some. {instead}"
            )
        if len(blocks) < len(self.blocks):
            raise UnsupportedModelError(
                f"Pathway {name!r} has {self.clusters} clusters of tokens with neurons of their "
                f"own. {instead}"
            )
        return blocks


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Pathways(ShownAsTables):
    """The pathways of one base model.

    Attributes:
        base: The base model's identity and the shapes of its FFN blocks.
        by_domain: Domain name -> pathway.
        controls: Control name -> pathway; for measurements only.

    Raises:
        PathwaysError: A name cannot be a domain.
        MismatchError: A mask does not fit the base.
    """

    base: BaseModel
    by_domain: Mapping[str, Pathway]
    controls: Mapping[str, Pathway] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.by_domain:
            check_domain_name(name)
        for name, pathway in [*self.by_domain.items(), *self.controls.items()]:
            check_pathway(name, pathway, self.base)

    @classmethod
    def from_masks(cls, model: nn.Module, masks: Mapping[str, Sequence[Tensor]]) -> Self:
        """Build from your own keep masks.

        Args:
            model: The dense base model; only its shapes are read.
            masks: Domain name -> one bool tensor ``(d_ff,)`` per FFN block, in layer order.

        Raises:
            UnsupportedModelError: The model has no FFN blocks.
            MismatchError: A mask's number, shape or dtype does not fit.
        """
        return cls(
            base=BaseModel.of(model),
            by_domain={
                name: Pathway.from_keep(
                    (torch.as_tensor(mask) for mask in keep), {"method": "given masks"}
                )
                for name, keep in masks.items()
            },
        )

    @classmethod
    def from_pretrained(
        cls, source: "str | PathLike[str]", *, only: str | None = None, **hub: Any
    ) -> Self:
        """Read the pathways in a folder or Hub repository.

        Args:
            source: A folder, or a Hub repository id.
            only: A domain, to read its pathway alone.
            hub: ``revision``, ``subfolder``, ``token``, ``cache_dir``, ``local_files_only``,
                ``force_download``, as everywhere in Transformers.

        Raises:
            ArtefactError: There are none, or they are corrupt, truncated or of a newer format.
            UnknownNameError: There is no such domain.
        """
        from hf_sparse_pathways.pathways.storage import read_pathways

        return read_pathways(cls, source, only, **hub)

    def save_pretrained(self, folder: "str | PathLike[str]") -> None:
        """Write ``pathways.json`` and ``pathways.safetensors``; the base is named, not copied.

        Each file is written beside its place and then renamed. Where no weights are, a small
        configuration makes the folder load as a model, with the base's weights.
        """
        from hf_sparse_pathways.pathways.storage import write_pathways

        write_pathways(self, Path(folder))
        write_adapter_files(self.base, Path(folder))

    def push_to_hub(self, repo_id: str, **push: Any) -> str:
        """Upload the pathways, without weights, in place of those in a Hub repository.

        ``sp.add_domains`` adds some to those that are there.

        Args:
            repo_id: Such as ``"me/smollm2-code-law"``; it is created if needed.
            push: ``token``, ``private``, ``revision``, ``create_pr``, ``commit_message`` and
                ``commit_description``, as everywhere in Transformers; and ``card``, an
                ``sp.CardSettings``.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            HubError: The Hub cannot be reached, or refuses.
        """
        from hf_sparse_pathways.share.pushing import push_pathways

        return push_pathways(self, repo_id, **push)

    @property
    def domains(self) -> list[str]:
        """The domains' names, in the order of their indices."""
        return list(self.by_domain)

    @property
    def routed(self) -> list[str]:
        """The domains whose text is known, between which ``domain="auto"`` chooses."""
        return [name for name, pathway in self.by_domain.items() if pathway.signature is not None]

    def __getitem__(self, name: str) -> Pathway:
        """Return a domain's or a control's pathway.

        Raises:
            UnknownNameError: There is none of that name.
        """
        if name in self.by_domain:
            return self.by_domain[name]
        if name in self.controls:
            return self.controls[name]
        raise UnknownNameError("domain", name, self.by_domain)

    def sparsity(self, domain: str, *, per_block: bool = False) -> Any:
        """Return the fraction of neurons removed, in [0, 1); of clusters the mean over tokens.

        Args:
            domain: A domain's (or control's) name.
            per_block: Return a list with one fraction per FFN block instead of the overall one.
        """
        pathway = self[domain]
        if per_block:
            return [
                1.0 - block.kept / shape.d_ff
                for block, shape in zip(pathway.blocks, self.base.blocks, strict=True)
            ]
        total = sum(shape.d_ff for shape in self.base.blocks)
        return 1.0 - sum(block.kept for block in pathway.blocks) / total if total else 0.0

    def expert_sparsity(self, domain: str) -> float:
        """Return the fraction of the routed experts' neurons removed, in [0, 1).

        Those of experts that the router may not choose are removed, too.
        """
        pathway, shapes = self[domain], self.base.experts
        if not pathway.experts:
            return 0.0
        kept = sum(
            experts.kept * (shape.d_ff if experts.width is None else experts.width)
            for experts, shape in zip(pathway.experts, shapes, strict=True)
        )
        return 1.0 - kept / sum(shape.experts * shape.d_ff for shape in shapes)

    def expert_weights(self, domain: str) -> int:
        """Return how many weights of routed experts a pathway keeps, biases and routers apart."""
        total = sum(shape.weights for shape in self.base.experts)
        return round((1.0 - self.expert_sparsity(domain)) * total)

    def flops(self, domain: str) -> float:
        """Return the FFN FLOPs of a pathway as a fraction of the dense FFN's.

        Everything that the pathway computes is counted: kept neurons, and whatever compensation
        or routing it carries. Where it says something of routed experts, they are counted: a
        token has ``top_k`` of them, however many are kept.
        """
        pathway, base = self[domain], self.base
        own = sum(s.flops(block) for block, s in zip(pathway.blocks, base.blocks, strict=True))
        dense = sum(shape.dense_flops for shape in base.blocks)
        for kept, shape in zip(pathway.experts, base.experts, strict=bool(pathway.experts)):
            full = shape.top_k * shape.weights // shape.experts
            own += full if kept.width is None else full * kept.width / shape.d_ff
            dense += full
        return own / dense if dense else 1.0

    def check_fits(self, model: nn.Module, *, allow_transfer: bool = False) -> None:
        """Check that a model is the one that these pathways were made for.

        Args:
            model: It, dense or with pathways.
            allow_transfer: Whether another one with the same FFN blocks will do.

        Raises:
            MismatchError: It is another one; the message names both, or shows both shapes.
        """
        self.base.check_origin(BaseModel.of(model), allow_transfer=allow_transfer)

    def with_controls(self, controls: Mapping[str, Pathway]) -> Self:
        """Return a copy with more controls. Pure."""
        return replace(self, controls={**self.controls, **controls})

    def with_experts(self, experts: Mapping[str, Iterable[KeptExperts]]) -> Self:
        """Return a copy in which some domains keep some of the routed experts. Pure.

        Args:
            experts: Domain name -> one entry per layer with routed experts, in layer order; none
                to keep all of them.

        Raises:
            UnknownNameError: An unknown domain.
            MismatchError: An entry does not fit its layer, or leaves too few to the router.
        """
        for name, kept in experts.items():
            if not isinstance(kept, Iterable):
                raise MismatchError(
                    f"Domain {name!r}: give a list of sp.KeptExperts, one per layer with routed "
                    f"experts, or an empty one to keep all of them; got {kept!r:.200}."
                )
        own = {
            name: replace(self._domain(name), experts=tuple(kept)) for name, kept in experts.items()
        }
        return replace(self, by_domain={**self.by_domain, **own})

    def subset(self, domains: Iterable[str]) -> Self:
        """Return a copy with some of the domains, and all controls. Pure."""
        return replace(self, by_domain={name: self._domain(name) for name in domains})

    def merged(self, other: "Pathways") -> Self:
        """Return a copy with another artefact's domains added, the other's winning. Pure.

        Raises:
            MismatchError: The other was made for another base.
        """
        self.base.check_same(other.base)
        base = self.base.with_experts_of(other.base)
        return replace(self, base=base, by_domain={**self.by_domain, **other.by_domain})

    def sections(self) -> list[Table]:
        """Return the tables that a notebook shows."""
        return [describe_pathways(self), *describe_experts(self)]

    def _domain(self, name: str) -> Pathway:
        if name not in self.by_domain:
            raise UnknownNameError("domain", name, self.by_domain)
        return self.by_domain[name]

    def __repr__(self) -> str:
        removed = self.sparsity if self.base.blocks else self.expert_sparsity
        shares = {name: format_share(1.0 - removed(name)) for name in self.by_domain}
        kept = ", ".join(f"{name} {share}" for name, share in shares.items())
        return (
            f"Pathways(base={self.base.name!r}, {len(self.base.blocks)} FFN blocks, "
            f"kept: {kept or 'no domains'})"
        )


def _active(block: BlockPathway) -> float:
    """Return the share of its kept neurons that a block computes for a token, on average."""
    if block.groups is not None:
        return block.groups.active / block.kept
    return 1.0 if block.skipping is None else float(block.skipping.active)
