"""Rules from a prompt's activations to what is kept, against their definitions."""

import pytest
import torch

from hf_sparse_pathways.errors import UnsupportedModelError
from hf_sparse_pathways.ffn import prompt_rules
from hf_sparse_pathways.ffn.attached_block import AttachedBlock
from hf_sparse_pathways.ffn.block_pathway import BlockPathway
from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.ffn.choices import ModelKey
from hf_sparse_pathways.ffn.prompt_rules import PRIOR_TOKENS, PSEUDO_TOKENS, Picker
from tests.architectures import build

D_FF = 48


@pytest.fixture(scope="module")
def attached():
    return AttachedBlock(find_blocks(build("llama"))[0], ModelKey())


def _activations(tokens, seed=0):
    """Activations in a few directions, some neurons far stronger than others."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tokens, 6, generator=generator) @ torch.randn(6, D_FF, generator=generator)
    values += 0.1 * torch.randn(tokens, D_FF, generator=generator) + 0.5
    return values * torch.logspace(-1, 1, D_FF)


def _pick(attached, rule, activations, sparsity=0.5, prior=None):
    priors = [None if prior is None else (prior,)]
    picker = Picker(rule=rule, sparsity=sparsity, blocks=[attached], priors=priors)
    return picker(0, 0, activations)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.999])
def test_griffin_keeps_the_largest_shares(attached, sparsity):
    activations = _activations(20).double()
    used = (activations / activations.norm(dim=1, keepdim=True)).square().sum(0)
    count = max(1, int(D_FF * (1 - sparsity) + 1e-6))
    found = _pick(attached, "griffin", activations.float(), sparsity)
    assert {*found.keep.nonzero().flatten().tolist()} == {*used.topk(count).indices.tolist()}
    assert not found.compensated


def test_one_loud_token_does_not_outvote_the_others(attached):
    activations = torch.zeros(10, D_FF)
    activations[:9, 3] = 1.0
    activations[9, 7] = 1000.0
    found = _pick(attached, "griffin", activations, 1 - 1 / D_FF)
    assert found.keep.nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("tokens", [5, 20, 100])
@pytest.mark.parametrize("with_prior", [False, True])
def test_the_refit_is_the_least_of_its_sum(attached, tokens, with_prior, monkeypatch):
    monkeypatch.setattr(prompt_rules, "PSEUDO_MEAN", 0)
    activations, weight = _activations(tokens), attached.block.outgoing.weight.detach().double()
    start, pseudo = _pick(attached, "griffin", activations), PSEUDO_TOKENS
    if with_prior:
        keep = torch.arange(D_FF) % 3 > 0
        delta = torch.randn(32, int(keep.sum()), generator=torch.Generator().manual_seed(1)) * 0.1
        start, pseudo = BlockPathway(keep=keep, delta=delta, bias=torch.ones(32)), PRIOR_TOKENS
    found = _pick(attached, "refit", activations, prior=start if with_prior else None)
    assert torch.equal(found.keep, start.keep)
    own = activations.double()[:, start.keep]
    before = 0.0 if start.delta is None else start.delta.double()
    change = (found.delta.double() - before).requires_grad_()
    bias = found.bias.double().requires_grad_()
    target = activations.double() @ weight.T
    output = own @ (weight[:, start.keep] + before + change).T + bias
    ridge = pseudo * own.square().mean()
    loss = (target - output).square().sum() + ridge * change.square().sum()
    loss.backward()
    scale = ridge * change.detach().abs().max()
    assert change.grad.abs().max() < 1e-3 * scale
    assert bias.grad.abs().max() < 1e-3 * scale


def test_it_fits_the_prompt_better_and_a_short_one_changes_little(attached):
    weight = attached.block.outgoing.weight.detach()
    changes = []
    for tokens in (2, 200):
        activations = _activations(tokens)
        found = _pick(attached, "refit", activations)
        own, target = activations[:, found.keep], activations @ weight.T
        plain = own @ weight[:, found.keep].T
        fitted = own @ (weight[:, found.keep] + found.delta).T + found.bias
        assert (target - fitted).square().sum() < 0.9 * (target - plain).square().sum()
        changes.append(found.delta.norm())
    assert changes[0] < changes[1]


def test_a_block_that_never_fires_is_kept_as_it_is(attached):
    found = _pick(attached, "refit", torch.zeros(10, D_FF))
    assert found.keep.sum() == D_FF // 2
    assert not found.delta.any()
    assert not found.bias.any()


def test_half_precision_and_autocast_are_computed_in_full(attached):
    activations = _activations(40).bfloat16()
    expected = _pick(attached, "refit", activations.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = _pick(attached, "refit", activations)
    assert torch.equal(found.delta, expected.delta)


def test_weights_elsewhere_are_refused_with_what_to_do(attached, monkeypatch):
    monkeypatch.setattr(attached.state, "masked_outside", True)
    with pytest.raises(UnsupportedModelError, match="rule='griffin'"):
        _pick(attached, "refit", _activations(10))
    assert _pick(attached, "griffin", _activations(10)).keep.any()
