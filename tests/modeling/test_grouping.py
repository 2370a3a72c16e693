"""Requests are grouped into the fewest batches, with few domains in each."""

import random

import pytest

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import PathwaysError, UnknownNameError
from hf_sparse_pathways.modeling.grouping import group_rows
from tests.architectures import random_masks, tiny_llama


@pytest.mark.parametrize("seed", range(20))
def test_every_request_is_served_once_in_the_fewest_batches(seed):
    draw = random.Random(seed)
    domains = draw.choices(["a", "b", "c", None], k=draw.randint(0, 40))
    size = draw.randint(1, 9)
    batches = group_rows(domains, size)
    assert sorted(index for batch in batches for index in batch) == list(range(len(domains)))
    assert all(1 <= len(batch) <= size for batch in batches)
    assert len(batches) == -(-len(domains) // size)
    for domain in set(domains):
        alone = [batch for batch in batches if {domains[index] for index in batch} == {domain}]
        assert len(alone) >= domains.count(domain) // size
        served = [i for batch in batches for i in batch if domains[i] == domain]
        assert served == sorted(served)


def test_domains_stay_together_where_they_can():
    domains = ["a", "b", "c", "a", "b", "a", "c", "a"]
    assert group_rows(domains, 4) == [[0, 3, 5, 7], [1, 4, 2, 6]]
    assert group_rows(["a", "b", "a", "b", "a", "b"], 3) == [[0, 2, 4], [1, 3, 5]]


def test_a_model_groups_what_it_knows():
    dense = tiny_llama()
    paths = sp.Pathways.from_masks(dense, random_masks(dense))
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths)
    assert model.group_by_domain(["law", "code", None, "law"], max_batch=2) == [[0, 3], [1, 2]]
    with pytest.raises(UnknownNameError, match="'lwa'"):
        model.group_by_domain(["lwa"], max_batch=2)
    with pytest.raises(PathwaysError, match=r"model\.route"):
        model.group_by_domain(["law", "auto"], max_batch=2)
    with pytest.raises(PathwaysError, match="max_batch"):
        model.group_by_domain(["law"], max_batch=0)
