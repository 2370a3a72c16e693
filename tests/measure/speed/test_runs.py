"""A timed call does what its workload says, in the arm's own pathway."""

import pytest
import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.measure.speed import clock
from hf_sparse_pathways.measure.speed.arms import line_up
from hf_sparse_pathways.measure.speed.runs import make_runs, random_ids
from hf_sparse_pathways.measure.speed.workloads import Workload
from tests.architectures import build, random_masks

ARCHITECTURES = ("llama", "gpt2", "gemma3", "bloom", "qwen3_moe")


def _lineup(name):
    dense = build(name)
    return line_up(dense, sp.Pathways.from_masks(dense, random_masks(dense)), ["code"])


@pytest.fixture
def counting(monkeypatch):
    """A clock on which every look takes one second."""
    looks = iter(range(10**6))
    monkeypatch.setattr(clock, "now", lambda _device: float(next(looks)))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_decoding_counts_the_steps_after_the_first_token(counting, name, batch):  # noqa: ARG001
    workload = Workload(kind="decode", batch=batch, tokens=4)
    runs = make_runs(_lineup(name), workload, 5)
    assert [run() for run in runs.values()] == [batch] * len(runs), "a look per token"


@pytest.mark.parametrize("kind", ["prefill", "ffn"])
def test_a_pass_counts_all_its_tokens(counting, kind):  # noqa: ARG001
    runs = make_runs(_lineup("llama"), Workload(kind=kind, batch=2, tokens=9), 5)
    assert [run() for run in runs.values()] == [18.0] * len(runs)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_arm_generates_as_many_tokens_in_its_own_pathway(name, monkeypatch):
    lineup, seen = _lineup(name), []
    for arm in lineup.arms:
        model = lineup.model(arm)
        own = model.generate

        def spy(ids, own=own, **options):
            output = own(ids, **options)
            seen.append((options.get("domain", "plain"), output.shape[1] - ids.shape[1]))
            return output

        monkeypatch.setattr(model, "generate", spy)
        make_runs(lineup, Workload(kind="decode", tokens=4), 3)[arm.label]()
        monkeypatch.undo()
    expected = ["plain" if arm.executor is None else arm.pathway for arm in lineup.arms]
    assert seen == [(domain, 3) for domain in expected]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_prefill_keeps_no_cache_and_gives_the_last_logits(name):
    lineup, outputs = _lineup(name), []
    runs = make_runs(lineup, Workload(kind="prefill", tokens=9), 0)
    for arm in lineup.arms:
        hook = lineup.model(arm).register_forward_hook(lambda *call: outputs.append(call[-1]))
        runs[arm.label]()
        hook.remove()
    assert {output.logits.shape[1] for output in outputs} == {1}
    assert not any(output.get("past_key_values") for output in outputs)
    dense = {name: o.logits for name, o in zip(runs, outputs, strict=True)}
    assert torch.equal(dense["dense"], dense["plug-in, no domain"])
    assert not torch.allclose(dense["dense"], dense["compact, code"], atol=1e-3)
    assert torch.allclose(dense["masked, code"], dense["compact, code"], atol=1e-3)


def _outputs_of_first_block(model, run):
    seen = []
    first = model.get_submodule(find_blocks(model)[0].name)
    hook = first.register_forward_hook(lambda *call: seen.append(call[-1].clone()))
    run()
    hook.remove()
    return seen


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_ffn_alone_computes_what_it_does_in_the_model(name):
    lineup = _lineup(name)
    alone = make_runs(lineup, Workload(kind="ffn", tokens=9), 0)
    whole = make_runs(lineup, Workload(kind="prefill", tokens=9), 0)
    dense = None
    for arm in lineup.arms:
        model = lineup.model(arm)
        (one,) = _outputs_of_first_block(model, alone[arm.label])
        (other,) = _outputs_of_first_block(model, whole[arm.label])
        assert torch.equal(one, other)
        dense = one if dense is None else dense
        assert torch.equal(one, dense) == (arm.pathway is None)


def test_every_block_is_called_once(still):
    lineup = _lineup("llama")
    for block in find_blocks(lineup.dense):
        still.after(block.parent, 2.0)
    run = make_runs(lineup, Workload(kind="ffn", tokens=9), 0)["dense"]
    assert run() == 9 / (3 * 2.0)


def test_blocks_that_are_no_modules_of_their_own_cannot_be_called_alone():
    assert make_runs(_lineup("opt"), Workload(kind="ffn", tokens=9), 0) == {}


def test_token_ids_are_the_same_every_time_and_known_to_the_model():
    model, workload = build("llama"), Workload(kind="prefill", batch=3, tokens=50)
    ids = random_ids(model, workload)
    assert torch.equal(ids, random_ids(model, workload))
    assert ids.shape == (3, 50)
    assert 0 <= ids.min() < ids.max() < model.get_input_embeddings().num_embeddings
