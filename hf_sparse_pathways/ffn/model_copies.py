"""All copies of one model's weights: what they take, made, looked at, dropped."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_pathways.ffn.attached_block import AttachedBlock
from hf_sparse_pathways.ffn.attached_experts import AttachedExperts
from hf_sparse_pathways.ffn.attached_linear import attach_experts
from hf_sparse_pathways.ffn.blocks import FfnBlock, survey_model
from hf_sparse_pathways.ffn.choices import ModelKey
from hf_sparse_pathways.ffn.copies import (
    WHOLE,
    Key,
    copy_bytes,
    copy_keys,
    drop_copies,
    kept_weights,
)
from hf_sparse_pathways.ffn.executors import EXECUTORS
from hf_sparse_pathways.ffn.forms import PACKED, Form
from hf_sparse_pathways.ffn.leaves import PathwayLeaf
from hf_sparse_pathways.ffn.picking import Picking
from hf_sparse_pathways.ffn.residents import Residents
from hf_sparse_pathways.ffn.rest import REST, RestLeaves
from hf_sparse_pathways.ffn.slices import has_views
from hf_sparse_pathways.ffn.stored import stored_tensor


class ModelCopies:
    """The leaves of one model that may have copies, and the books of what is resident.

    Attributes:
        residents: Which keys have copies.
        blocks: One entry per FFN block, in layer order.
        experts: One entry per layer with routed experts.
        rest: The linear leaves outside of them.
        clustered: The pathways that have clusters of tokens.
        skipping: The pathways that skip neurons token by token.
        grouped: The pathways that have groups of neurons.
        executor: The executor that the copies are for.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[FfnBlock], key: ModelKey) -> None:
        """Swap the leaves of a model's FFN blocks, and its routed experts, in place."""
        self.residents = Residents(self.size, self._drop)
        self.blocks = tuple(AttachedBlock(block, key, self.residents) for block in blocks)
        self.experts = tuple(attach_experts(found, key) for found in survey_model(model).experts)
        routers = [attached.router for attached in self.experts]
        self.rest = RestLeaves(model, key, self.residents, routers)
        self.clustered: frozenset[int] = frozenset()
        self.skipping: frozenset[int] = frozenset()
        self.grouped: frozenset[int] = frozenset()
        self.executor = "compact"
        self._samples: Tensor | None = None

    @property
    def by_token(self) -> frozenset[int]:
        """The pathways that compute different neurons for different tokens."""
        return self.routed | self.skipping

    @property
    def routed(self) -> frozenset[int]:
        """The pathways that look at a block's input to choose what computes a token."""
        return self.clustered | self.grouped

    def size(self, key: Key | Picking) -> int:
        """Return how many bytes the copies of a pathway take, or those of another key."""
        if isinstance(key, Picking):
            return key.size(EXECUTORS[self.executor].form)
        return self.form_bytes(key, EXECUTORS[self.executor].form)

    def reduce(self, leaves: Sequence[Sequence[nn.Module]]) -> None:
        """Have no FFN blocks any more, in place: only leaves that hold one pathway's neurons.

        Args:
            leaves: Of each block.
        """
        self.blocks, self.experts = (), ()
        self.rest.reduced = tuple(map(tuple, leaves))

    def most(self, form: Form, among: Iterable[int] | None = None) -> int:
        """Return how many bytes the copies of the largest pathway take; of all, or among some."""
        own = self._pathways if among is None else among
        return max((self.form_bytes(index, form) for index in own), default=0)

    def total(self) -> int:
        """Return how many bytes everything takes that ``packed-all`` packs for all pathways."""
        return sum(self.form_bytes(key, PACKED) for key in (*self._pathways, REST))

    def form_bytes(self, key: Key, form: Form) -> int:
        """Return how many bytes the copies of a key take in a form."""
        own = _of_leaf(key)
        size = sum(copy_bytes(leaf, own, form) for leaf in self._leaves_of(key))
        return size + sum(one.copy_bytes(pathway) for one, pathway in self._experts_of(key))

    def make(self, key: Key, form: Form) -> None:
        """Make the copies of a key that are not there or out of date."""
        for leaf in self._leaves_of(key):
            for own in copy_keys(leaf, _of_leaf(key), form):
                kept_weights(leaf, own, form)
        for attached, pathway in self._experts_of(key):
            attached.make(pathway)

    def are_possible(self) -> bool:
        """Whether any block can be computed with copies, as of the last ``settle``."""
        return bool(self.experts) or any(attached.compact_leaves for attached in self.blocks)

    def are_traceable(self, pathway: int) -> bool:
        """Whether all copies of a pathway are there, in a form that a graph can hold.

        Of those that route tokens a graph computes everything, and masks it.
        """
        return (
            pathway not in self.routed
            and all(
                pathway in leaf.copies and leaf.copies[pathway].form.traceable
                for leaf in self._leaves_of(pathway)
            )
            and all(attached.state.has_copy(pathway) for attached in self.experts)
        )

    def are_views(self) -> bool:
        """Whether every pathway can be computed on views of the weights alone."""
        narrowed = any(one.copy_bytes(own) for one in self.experts for own in self._pathways)
        views = (has_views(leaf, own) for leaf in self.compact_leaves for own in self._pathways)
        return not narrowed and all(views)

    def drop(self) -> None:
        """Forget all copies; they are made again when needed."""
        for leaf in (*self.leaves, *self.rest.leaves):
            leaf.drop_copies()
        for attached in self.experts:
            attached.state.drop()
        self.residents.clear()

    def _drop(self, key: Key | Picking) -> None:
        if isinstance(key, Picking):
            key.drop()
            return
        for leaf in self.rest.leaves if key == REST else self.leaves:
            drop_copies(leaf, _of_leaf(key))
        for attached, pathway in self._experts_of(key):
            attached.state.drop(pathway)

    def check(self) -> None:
        """Drop copies whose weights were written past autograd's version counter.

        ``parameter.data`` (merging an adapter, averaging weights) leaves no trace that a copy's
        stamp could show. Samples of the weights do, unless a write touches single entries only:
        after such a write call ``set_executor``, ``train`` or ``eval``, which drop all copies.
        """
        holders: tuple[Any, ...] = (*self.experts, *self.compact_leaves, *self.rest.leaves)
        weights = [holder.weight for holder in holders if not holder.weight.is_meta]
        if torch.compiler.is_compiling() or not weights:
            return
        samples = torch.stack([_sample(weight) for weight in weights])
        if self._samples is not None:  # leaves outside the blocks come and go, at the end
            common = min(len(samples), len(self._samples))
            if not torch.equal(samples[:common], self._samples[:common]):
                self.drop()
        self._samples = samples

    def _leaves_of(self, key: Key) -> Sequence[PathwayLeaf]:
        """Return the leaves that have copies of a key."""
        if key == REST:
            return self.rest.candidates
        leaves = self.compact_leaves
        if self.executor == "sliced" and isinstance(key, int) and key != WHOLE:
            return [leaf for leaf in leaves if not has_views(leaf, key)]
        return leaves

    def _experts_of(self, key: Key) -> list[tuple[AttachedExperts, int]]:
        """Return the routed experts that have copies of a key, and the pathway that it is."""
        if not isinstance(key, int) or key < 0:
            return []
        return [(attached, key) for attached in self.experts]

    @property
    def _pathways(self) -> range:
        holders: tuple[AttachedBlock | AttachedExperts, ...] = (*self.blocks, *self.experts)
        return range(len(holders[0].state.pathways))

    @property
    def weight(self) -> Any:
        """A weight that stands for all, by its dtype and device."""
        holders: tuple[Any, ...] = (*self.ffn_leaves, *self.experts, *self.rest.candidates)
        return holders[0].weight

    @property
    def leaves(self) -> list[PathwayLeaf]:
        """The leaves of all FFN blocks."""
        return [leaf for attached in self.blocks for leaf in attached.leaves.values()]

    @property
    def ffn_leaves(self) -> list[Any]:
        """The same, or those that hold one pathway's neurons alone."""
        return [*self.leaves, *itertools.chain(*self.rest.reduced)]

    @property
    def compact_leaves(self) -> list[PathwayLeaf]:
        """Those of which there may be copies."""
        return [leaf for attached in self.blocks for leaf in attached.compact_leaves]


def _of_leaf(key: Key) -> Key:
    """Return the key of a leaf's copies: of a leaf outside the FFN blocks there is but one."""
    return WHOLE if key == REST else key


@torch.no_grad()
def _sample(weight: Tensor) -> Tensor:
    """Return a weighted sum of about a hundred entries of a weight, on the CPU."""
    values = stored_tensor(weight).detach().flatten()
    values = values[:: max(1, len(values) // 101)].float()
    return (values * torch.arange(1, len(values) + 1, device=values.device)).sum().cpu()
