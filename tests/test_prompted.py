"""Oracles: what follows a prompt equals a model whose other neurons are zeroed, everywhere."""

import pytest
import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.native import product
from tests.architectures import ARCHITECTURES, build, prompt, random_masks
from tests.prompted import griffin_masks, reference
from tests.test_exactness import EXECUTORS, TOLERANCE

LENGTH = 11
IDS = prompt(3, LENGTH)
STEPS = 4

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
    """A model with pathways, and what each row should give by itself."""
    dense = build(request.param)
    dense.generation_config.pad_token_id = 0
    dense.generation_config.eos_token_id = None
    paths = sp.Pathways.from_masks(dense, random_masks(dense))
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, paths)
    return dense, model, [griffin_masks(dense, row[None]) for row in IDS]


def _expected(dense, masks, **arguments):
    """Return what each row gives by itself, on a plain model."""
    pairs = zip(IDS[: len(masks)], masks, strict=True)
    plain = [_logits(reference(dense, own, LENGTH), r[None], **arguments)[0] for r, own in pairs]
    return torch.cat(plain)


def _difference(left, right):
    return (left - right).abs().max().item()


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("rows", [1, 3])
def test_what_follows_equals_zeroed_weights(case, executor, rows):
    dense, model, masks = case
    model.set_executor(executor)
    assert model.execution.executor == executor, model.execution.reason
    found, output = _logits(model, IDS[:rows], domain="prompt")
    for row, pathway in enumerate(output.picked.pathways):
        assert all(map(torch.equal, pathway.keep, masks[row]))
    assert _difference(found, _expected(dense, masks[:rows])) <= 10 * TOLERANCE
    before = _logits(dense, IDS[:rows])[0]
    assert _difference(found[:, 0], before[:, 0]) <= TOLERANCE, "the prompt is dense"
    assert _difference(found[:, 1:], before[:, 1:]) > 1e-2
    assert "prompt" not in model.resident


def test_without_a_cache_it_is_the_same(case):
    dense, model, masks = case
    model.set_executor("compact")
    found, _ = _logits(model, IDS, domain="prompt", use_cache=False)
    assert _difference(found, _expected(dense, masks, use_cache=False)) <= 10 * TOLERANCE
