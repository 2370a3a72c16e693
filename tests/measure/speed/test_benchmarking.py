"""A whole benchmark on tiny models: what it holds, not what it measures."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import PathwaysError, UnknownNameError
from hf_sparse_pathways.ffn.executors import EXECUTORS
from hf_sparse_pathways.measure.speed import benchmarking
from hf_sparse_pathways.measure.speed.arms import Arm
from hf_sparse_pathways.measure.speed.timing import TimingSettings
from hf_sparse_pathways.measure.speed.workloads import Workload, plan_workloads
from tests.architectures import build, random_masks

QUICK = TimingSettings(budget=0.0, rounds=2, new_tokens=3)
SMALL = {"settings": QUICK, "workloads": plan_workloads((1,), (9,), prompt_tokens=4)}


def _sparse(name="llama", **options):
    dense = build(name)
    pathways = sp.Pathways.from_masks(dense, random_masks(dense))
    return sp.SparsePathwaysForCausalLM.from_dense(dense, pathways, **options)


@pytest.fixture
def model():
    return _sparse()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "phi3", "qwen3_moe"])
def test_every_executor_is_timed_in_every_workload(name):
    report = sp.benchmark(_sparse(name), **SMALL)
    timed = {arm.executor for arm in report.arms} - {None}
    assert timed | set(report.unavailable) == set(EXECUTORS)
    assert {"masked", "compact"} <= timed
    assert [timing.workload for timing in report.timings] == list(SMALL["workloads"])
    for timing in report.timings:
        assert list(timing.rates) == [arm.label for arm in report.arms]
        assert {len(rates) for rates in timing.rates.values()} == {2}
        assert all(rate > 0 for rates in timing.rates.values() for rate in rates)
    assert report.timing("decode", 1).new_tokens == 3
    assert set(report.timing("decode", 1).shares) == {arm.partner for arm in report.arms}
    assert report.auto.executor in EXECUTORS
    json.dumps(report.to_dict(), allow_nan=False)


def test_the_first_domain_is_timed_and_the_second_is_switched_to(model):
    report = sp.benchmark(model, **SMALL)
    assert {arm.pathway for arm in report.arms} == {None, "code"}
    compact = next(cost for cost in report.switches if cost.executor == "compact")
    assert (compact.first, compact.second) == ("code", "law")
    assert len(compact.seconds) == 10
    copies = {copy.pathway: copy.bytes for copy in report.copies if copy.executor == "compact"}
    model.set_executor("compact")
    model.prepare("law")
    assert set(copies) == {"code", "law"}
    assert copies["law"] == model.resident["law"]


@pytest.mark.parametrize("domains", [["law"], ["law", "code"]])
def test_chosen_domains_alone_are_timed(model, domains):
    report = sp.benchmark(model, domains, executors=["compact"], **SMALL)
    assert [arm.pathway for arm in report.arms if arm.pathway] == domains


@pytest.mark.parametrize("sparse", [True, False])
def test_random_masks_are_timed_beside_saved_pathways_or_alone(sparse):
    model = _sparse() if sparse else build("llama")
    report = sp.benchmark(model, sparsities=[0.25, 0.5], executors=["compact"], **SMALL)
    found = {arm.pathway: arm.sparsity for arm in report.arms if arm.pathway}
    assert found.pop("code", None) == (model.pathways.sparsity("code") if sparse else None)
    assert found == {"random 0.25": 0.25, "random 0.5": 0.5}


def test_one_pathway_is_switched_with_dense():
    report = sp.benchmark(build("llama"), sparsities=[0.5], executors=["compact"], **SMALL)
    assert [(cost.first, cost.second) for cost in report.switches] == [("random 0.5", None)]


def _fail(*_args, **_kwargs):
    raise RuntimeError("in the middle")


@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_left_as_it_was(monkeypatch, failing):
    model = _sparse(executor="masked", default_domain="law").train()
    pathways, limit = model.pathways, model.max_resident_bytes
    state = torch.get_rng_state()
    if failing:
        monkeypatch.setattr(benchmarking, "alternate", _fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            sp.benchmark(model, sparsities=[0.5], **SMALL)
    else:
        sp.benchmark(model, sparsities=[0.5], **SMALL)
    assert model.pathways is pathways
    assert (model.config.executor, model.config.default_domain) == ("masked", "law")
    assert (model.max_resident_bytes, model.resident, model.training) == (limit, {}, True)
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_without_a_budget_the_least_is_measured(model):
    workloads = plan_workloads((1,), (), prompt_tokens=4)
    settings = TimingSettings(budget=0.0)
    report = sp.benchmark(model, executors=["compact"], workloads=workloads, settings=settings)
    assert report.timings[0].new_tokens == 8
    assert len(report.timings[0].rates["dense"]) == 3


def test_usual_workloads_are_those_that_fit_the_positions(model):
    report = sp.benchmark(model, executors=["compact"], settings=QUICK)
    labels = [timing.workload.label for timing in report.timings]
    assert labels[:3] == [f"decode, batch {batch}" for batch in (1, 4, 8)]
    assert labels[3:] == ["prefill, 128 tokens", "FFN blocks alone, 128 tokens"], "of 128"


def test_blocks_that_cannot_run_alone_are_noted():
    report = sp.benchmark(_sparse("opt"), executors=["compact"], **SMALL)
    assert [timing.workload.kind for timing in report.timings] == ["decode", "prefill"]
    assert report.notes[0].startswith("FFN blocks alone, 9 tokens: not timed")


@pytest.mark.parametrize(
    ("options", "error", "part"),
    [
        ({"domains": ["cod"]}, UnknownNameError, "'code'"),
        ({"executors": ["compct"]}, UnknownNameError, "'compact'"),
        ({"sparsities": [1.0]}, PathwaysError, "sparsity"),
        ({"sparsities": [-0.1]}, PathwaysError, "sparsity"),
        ({"workloads": ()}, PathwaysError, "No workload"),
        ({"workloads": (Workload(kind="prefill", tokens=200),)}, PathwaysError, "128"),
        ({"workloads": (Workload(kind="decode", tokens=126),)}, PathwaysError, "129"),
    ],
    ids=str,
)
def test_wrong_numbers_and_names_are_refused(model, options, error, part):
    with pytest.raises(error, match=part):
        sp.benchmark(model, **{**SMALL, **options})


def test_a_dense_model_without_random_masks_has_nothing_to_time():
    with pytest.raises(PathwaysError, match="--sparsity"):
        sp.benchmark(build("llama"), **SMALL)


def test_workloads_share_the_budget_by_weight_and_what_one_leaves_is_the_others(still):
    shares = {}

    class Session(benchmarking._Session):
        def time(self, workload, share):
            shares[workload.label] = share
            still.time += share / 2

    workloads = plan_workloads((1, 4), (9,), prompt_tokens=4)
    Session(None, TimingSettings(budget=100.0), 0.0).time_all(workloads)
    assert list(shares) == [
        "prefill, 9 tokens",
        "FFN blocks alone, 9 tokens",
        "decode, batch 4",
        "decode, batch 1",
    ]
    first = 90.0 / 5.5
    second = (90.0 - first / 2) * 0.5 / 4.5
    third = (90.0 - first / 2 - second / 2) / 4
    last = 90.0 - (first + second + third) / 2
    assert list(shares.values()) == pytest.approx([first, second, third, last])


def test_measuring_where_the_time_goes_counts_against_a_workloads_share(still, monkeypatch):
    def shares(*_):
        still.time += 8.0

    def run():
        still.time += 1.0
        return 1.0

    class Lineup:
        dense_partners = (Arm(label="dense"), Arm(label="packed, dense"))

    monkeypatch.setattr(benchmarking, "measure_shares", shares)
    monkeypatch.setattr(benchmarking, "make_runs", lambda *_: {"dense": run})
    session = benchmarking._Session(Lineup(), TimingSettings(budget=100.0), 0.0)
    timing = session.time(Workload(kind="prefill", tokens=9), 27.0)
    assert len(timing.rates["dense"]) == 10
    assert still.time == 27.0


@pytest.mark.usefixtures("hub")
def test_what_was_pushed_is_timed_under_the_name_of_its_base(caplog):
    build("llama").push_to_hub("me/base")
    dense = AutoModelForCausalLM.from_pretrained("me/base")
    pathways = sp.Pathways.from_masks(dense, random_masks(dense))
    sp.SparsePathwaysForCausalLM.from_dense(dense, pathways).push_to_hub("me/full")
    model = AutoModelForCausalLM.from_pretrained("me/full")
    caplog.clear()
    report = sp.benchmark(model, executors=["masked"], **SMALL)
    assert report.base == "me/base"
    assert not [message for message in caplog.messages if "Made for" in message]
