"""What may compute a block's tokens, numbered: pathways, experts of clusters, groups of neurons."""

import pytest
import torch

from hf_sparse_pathways.ffn.block_pathway import BlockPathway
from hf_sparse_pathways.ffn.clusters import ClusteredBlock, TokenRouter
from hf_sparse_pathways.ffn.members import Members
from hf_sparse_pathways.ffn.neuron_groups import NeuronGroups

D_IN, D_FF = 4, 8


def _keeping(*neurons):
    keep = torch.zeros(D_FF, dtype=torch.bool)
    keep[list(neurons)] = True
    return BlockPathway(keep=keep)


def _clustered(*experts, shared=None):
    count = len(experts)
    router = TokenRouter(
        weight=torch.zeros(count, D_IN), bias=torch.zeros(count), share=torch.full((count,), 0.5)
    )
    return ClusteredBlock(router=router, experts=experts, shared=shared)


def _grouped():
    group = torch.tensor([-1, -1, 0, 0, 1, 1])
    groups = NeuronGroups(
        group=group.int(),
        weight=torch.zeros(2, D_IN),
        bias=torch.zeros(2),
        share=torch.full((2,), 0.5),
        top_k=1,
    )
    keep = torch.tensor([True] * 6 + [False] * 2)
    return BlockPathway(keep=keep, groups=groups)


@pytest.fixture
def members():
    shared = torch.zeros(D_IN, D_FF)
    clustered = _clustered(_keeping(0, 2, 4), _keeping(1), shared=shared)
    return Members([_keeping(5, 6), clustered, _grouped(), _keeping()])


def test_experts_and_groups_come_after_the_pathways(members):
    assert members.clustered == {1: 4}
    assert members.grouped == {2: 6}
    assert members.widths == (2, 3, 6, 0, 3, 1, 2, 2, 2)
    assert [own.tolist() for own in members.kept] == [
        [5, 6],
        [0, 2, 4],
        [0, 1, 2, 3, 4, 5],
        [],
        [0, 2, 4],
        [1],
        [0, 1],
        [2, 3],
        [4, 5],
    ]
    assert members.whole == (0, 1, 2, 3, 4, 5)
    assert members.routed
    assert not members.skips


def test_copies_of_a_pathway_are_its_members(members):
    ranges = [members.of_pathway(index) for index in range(4)]
    assert ranges == [range(1), range(4, 6), range(6, 9), range(3, 4)]
    assert members.of_pathway(9) == range(9, 10), "of what had copies and is no more"
    assert members.of_pathway(-1) == range(-1, 0), "and of none"


def test_one_refit_is_shared_by_a_pathway_s_experts(members):
    assert [members.shared(member) for member in range(9)] == [None] * 4 + [1, 1] + [None] * 3
    own = Members([_clustered(_keeping(0), _keeping(1))])
    assert own.shared(1) is None


def test_only_what_is_the_same_for_all_tokens_has_runs(members):
    assert [runs is not None for runs in members.runs] == [True, False, False, True]
    assert members.by_token == {1, 2}
    assert not Members(()).routed
