"""Dense and sparse generation in turn."""

import json

import pytest
import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import PathwaysError, UnknownNameError
from hf_sparse_pathways.measure.speed.pairs import time_generation
from tests.architectures import random_masks, tiny_llama

SMALL = {"prompt_tokens": 3, "new_tokens": 2, "rounds": 2}


@pytest.fixture
def model():
    dense = tiny_llama()
    pathways = sp.Pathways.from_masks(dense, random_masks(dense))
    return sp.SparsePathwaysForCausalLM.from_dense(dense, pathways, executor="masked")


def test_every_domain_has_a_speed(model):
    speeds = time_generation(model, **SMALL)
    assert [speed.domain for speed in speeds] == model.domains
    for speed in speeds:
        assert len(speed.dense) == len(speed.sparse) == SMALL["rounds"]
        assert speed.executor == "masked"
        assert speed.sparsity == model.pathways.sparsity(speed.domain)
        json.dumps(speed.to_dict(), allow_nan=False)


def test_the_executor_that_ran_is_named(model):
    model.set_executor("compact")
    assert [speed.executor for speed in time_generation(model, ["law"], **SMALL)] == ["compact"]


def test_both_arms_generate_as_many_tokens_and_alternate(model, monkeypatch):
    calls = []
    own = type(model).generate

    def spy(self, input_ids, **options):
        output = own(self, input_ids, **options)
        calls.append((options["domain"], output.shape[1] - input_ids.shape[1]))
        return output

    monkeypatch.setattr(type(model), "generate", spy)
    time_generation(model, ["code"], prompt_tokens=4, new_tokens=3, rounds=3)
    assert [new for _, new in calls] == [3] * len(calls)
    pairs = [{one[0], other[0]} for one, other in zip(calls[::2], calls[1::2], strict=True)]
    assert pairs == [{None, "code"}] * 4, "one round of warming up"
    assert len({calls[i][0] for i in range(0, 8, 2)}) == 2, "which comes first changes"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"domains": ["cod"]}, UnknownNameError),
        ({"rounds": 0}, PathwaysError),
        ({"new_tokens": 0}, PathwaysError),
        ({"prompt_tokens": 0}, PathwaysError),
    ],
    ids=str,
)
def test_wrong_numbers_and_names_are_refused(model, options, error):
    with pytest.raises(error):
        time_generation(model, **{**SMALL, **options})


def test_timing_uses_no_gradients_and_no_global_seed(model):
    state = torch.get_rng_state()
    time_generation(model, ["law"], **SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
