"""Oracles: what follows a prompt equals a model whose other neurons are zeroed, everywhere."""

import pytest
import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.native import product
from tests.architectures import ARCHITECTURES, build, prompt, random_masks
from tests.prompted import griffin_masks, reference
from tests.test_exactness import EXECUTORS, TOLERANCE

LENGTH = 11
IDS = prompt(2, LENGTH)
STEPS = 3

pytestmark = pytest.mark.usefixtures("every_form_pays")


@pytest.fixture(autouse=True)
def _torch_multiplies(monkeypatch):
    """Let ``indexed`` gather rows: torch multiplies in them and in the oracles."""
    monkeypatch.setattr(product, "MOST_INPUTS", 0)


def _logits(model, ids, **arguments):
    """Return the logits of some greedy steps, ``(rows, steps, vocabulary)``, and the tokens."""
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=STEPS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **arguments,
    )
    return torch.stack(output.logits, dim=1), output


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def case(request):
    """A model with pathways, the masks of each row's prompt, and what rows give by themselves."""
    dense = build(request.param)
    dense.generation_config.pad_token_id = 0
    dense.generation_config.eos_token_id = None
    paths = sp.Pathways.from_masks(dense, random_masks(dense))
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths)
    model.set_prompt_pathways(rule="griffin")
    masks = [griffin_masks(dense, row[None]) for row in IDS]
    plain = [reference(dense, own, LENGTH) for own in masks]
    expected = {
        cached: torch.cat(
            [_logits(own, r[None], use_cache=cached)[0] for own, r in zip(plain, IDS, strict=True)]
        )
        for cached in (True, False)
    }
    return _logits(dense, IDS)[0], model, masks, expected


def _difference(left, right):
    return (left - right).abs().max().item()


@pytest.mark.parametrize("executor", EXECUTORS)
def test_what_follows_equals_zeroed_weights(case, executor):
    dense, model, masks, expected = case
    model.set_executor(executor)
    assert model.execution.executor == executor, model.execution.reason
    found, output = _logits(model, IDS, domain="prompt")
    for row, pathway in enumerate(output.picked.pathways):
        assert all(map(torch.equal, pathway.keep, masks[row]))
    assert _difference(found, expected[True]) <= 10 * TOLERANCE
    assert _difference(found[:, 0], dense[:, 0]) <= TOLERANCE, "the prompt is dense"
    assert _difference(found[:, 1:], dense[:, 1:]) > 1e-2
    assert "prompt" not in model.resident


@pytest.mark.parametrize("executor", EXECUTORS)
def test_one_row_alone(case, executor):
    _, model, _, expected = case
    model.set_executor(executor)
    found, _ = _logits(model, IDS[:1], domain="prompt")
    assert _difference(found, expected[True][:1]) <= 10 * TOLERANCE


def test_without_a_cache_it_is_the_same(case):
    _, model, _, expected = case
    model.set_executor("compact")
    found, _ = _logits(model, IDS, domain="prompt", use_cache=False)
    assert _difference(found, expected[False]) <= 10 * TOLERANCE
