"""The shape of a timing, not its numbers."""

import json
from functools import partial

import pytest
import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import PathwaysError, UnknownNameError
from hf_sparse_pathways.measure import speed
from hf_sparse_pathways.measure.speed import benchmark, compare_generation, time_switch
from tests.architectures import prompt, random_masks, tiny_llama

SMALL = {"prompt_tokens": 3, "new_tokens": 2, "rounds": 2}


@pytest.fixture
def model():
    dense = tiny_llama()
    pathways = sp.Pathways.from_masks(dense, random_masks(dense))
    return sp.SparsePathwaysForCausalLM.from_dense(dense, pathways, executor="masked")


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(speed, "time_switch", partial(time_switch, pairs=4))


def test_a_benchmark_has_a_report_per_domain_and_a_switch(model):
    reports, switch = benchmark(model, **SMALL)
    assert [report.domain for report in reports] == model.domains
    assert len(switch) == 4
    for report in reports:
        assert len(report.dense) == len(report.sparse) == SMALL["rounds"]
        assert min(*report.dense, *report.sparse) > 0
        assert report.executor == "masked"
        assert report.sparsity == model.pathways.sparsity(report.domain)
        json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize(("executor", "shown"), [("auto", "compact"), ("compact", "compact")])
def test_the_executor_that_ran_is_named(model, executor, shown):
    model.set_executor(executor)
    reports, _ = benchmark(model, ["law"], **SMALL)
    assert reports[0].executor == shown


def test_chosen_domains_alone_are_timed(model):
    reports, switch = benchmark(model, ["law"], **SMALL)
    assert [report.domain for report in reports] == ["law"]
    assert switch == ()


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_random_masks_of_a_sparsity_can_be_timed(model, sparsity):
    reports, _ = benchmark(model, sparsity=sparsity, **SMALL)
    kept = int((1 - sparsity) * 48 + 1e-6)
    assert [report.sparsity for report in reports] == pytest.approx([1 - kept / 48] * 2)


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("default", [None, "law"])
def test_the_model_is_left_as_it_was(model, monkeypatch, failing, default):
    pathways = model.pathways
    model.config.default_domain = default
    if failing:
        monkeypatch.setattr(speed, "compare_generation", _fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            benchmark(model, ["code"], sparsity=0.5, **SMALL)
    else:
        benchmark(model, ["code"], sparsity=0.5, **SMALL)
    assert model.pathways is pathways
    assert model.config.domains == ["code", "law"]
    assert model.config.default_domain == default
    assert not model.training


def _fail(*_args, **_kwargs):
    raise RuntimeError("in the middle")


def test_both_arms_generate_as_many_tokens_and_alternate(model, monkeypatch):
    calls = []
    own = type(model).generate

    def spy(self, input_ids, **options):
        output = own(self, input_ids, **options)
        calls.append((options["domain"], output.shape[1] - input_ids.shape[1]))
        return output

    monkeypatch.setattr(type(model), "generate", spy)
    compare_generation(model, prompt(1, 4), "code", new_tokens=3, rounds=3)
    assert [new for _, new in calls] == [3] * len(calls)
    pairs = [{one[0], other[0]} for one, other in zip(calls[::2], calls[1::2], strict=True)]
    assert pairs == [{None, "code"}] * 4, "one round of warming up"
    assert len({calls[i][0] for i in range(0, 8, 2)}) == 2, "which comes first changes"


def test_switching_really_switches(model, monkeypatch):
    seen = []
    own = type(model).forward

    def spy(self, *args, **options):
        seen.append(options["domain"])
        return own(self, *args, **options)

    monkeypatch.setattr(type(model), "forward", spy)
    time_switch(model, "code", "law", pairs=6)
    assert seen == ["code", "law", *["law", "law", "code", "code", "code", "law"] * 3]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"domains": ["cod"]}, UnknownNameError),
        ({"sparsity": 1.0}, PathwaysError),
        ({"sparsity": -0.1}, PathwaysError),
        ({"rounds": 0}, PathwaysError),
        ({"new_tokens": 0}, PathwaysError),
        ({"prompt_tokens": 0}, PathwaysError),
    ],
    ids=str,
)
def test_wrong_numbers_and_names_are_refused(model, options, error):
    pathways = model.pathways
    with pytest.raises(error):
        benchmark(model, **{**SMALL, **options})
    assert model.pathways is pathways


def test_timing_uses_no_gradients_and_no_global_seed(model):
    state = torch.get_rng_state()
    benchmark(model, ["law"], **SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
