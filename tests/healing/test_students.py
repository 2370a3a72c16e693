"""The compact student computes what the pathway does, and what it learns folds back exactly."""

import peft
import pytest
import torch
from transformers.pytorch_utils import Conv1D

import hf_sparse_pathways as sp
from hf_sparse_pathways.ffn.block_pathway import LowRank
from hf_sparse_pathways.healing.adapters import add_lora, lora_change, make_adapter
from hf_sparse_pathways.healing.cutting import cut
from hf_sparse_pathways.healing.folding import add_changes, fold
from hf_sparse_pathways.healing.students import (
    base_weight,
    everything,
    frozen_copy,
    make_student,
)
from tests.architectures import build, prompt
from tests.healing.healings import ARCHITECTURES, ENTANGLED, QUICK, sparse, student

IDS = prompt(2, 9)


def _logits(model, **arguments):
    with torch.no_grad():
        return model(IDS, use_cache=False, **arguments).logits


def _disturb(model):
    """Change everything that is trained at random, as if it had been."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def _trainable(made, train, **settings):
    chosen = sp.HealingSettings(**{**QUICK, "train": train, **settings})
    if train == "lora":
        add_lora(made, chosen)
    else:
        for leaf in made.trained_leaves():
            made.model.get_submodule(leaf.place).weight.requires_grad_(True)
    _disturb(made.model)
    return chosen


def _healed(model, blocks):
    pathway = sp.Pathway(blocks=blocks)
    pathways = sp.Pathways(base=model.pathways.base, by_domain={"code": pathway})
    return sp.SparsePathwaysForCausalLM.from_dense(model.to_dense(), pathways)


@pytest.mark.parametrize("name", [*ARCHITECTURES, "qwen3_moe", "bloom", "falcon", ENTANGLED])
def test_a_student_computes_its_pathway(name):
    model = sparse(name)
    made, _ = student(model)
    expected = _logits(model, domain="code")
    scale = expected.abs().max()
    assert torch.allclose(_logits(made.model), expected, atol=1e-5 * float(scale))


def test_a_student_computes_its_kept_neurons_only():
    model = sparse("phi3")
    made, frozen = student(model)
    for leaves, block in zip(made.leaves, model.pathways["code"].blocks, strict=True):
        shapes = [tuple(made.model.get_submodule(leaf.place).weight.shape) for leaf in leaves]
        assert shapes == [(2 * block.kept, 32), (32, block.kept)]
    own = {id(parameter) for parameter in frozen.parameters()}
    shared = [parameter for parameter in made.model.parameters() if id(parameter) in own]
    assert len(shared) == len(own) - 2 * len(made.leaves)
    assert not any(parameter.requires_grad for parameter in made.model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters()), "left as it was"


@pytest.mark.parametrize("train", ["lora", "weights"])
@pytest.mark.parametrize("name", [*ARCHITECTURES, "qwen3_moe", "starcoder2", ENTANGLED])
def test_what_was_learnt_folds_into_the_pathway(name, train):
    model = sparse(name)
    made, frozen = student(model)
    before = _logits(made.model)
    settings = _trainable(made, train)
    expected = _logits(made.model)
    scale = float(expected.abs().max())
    assert not torch.allclose(expected, before, atol=1e-3 * scale)
    healed = _healed(model, fold(made, frozen, settings, torch.float32))
    for executor in ("masked", "compact"):
        healed.set_executor(executor)
        found = _logits(healed, domain="code")
        assert torch.allclose(found, expected, atol=2e-5 * scale), executor
    assert torch.equal(_logits(healed), _logits(model)), "dense stays dense"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_adapter_computes_what_the_student_does(name, tmp_path):
    model = sparse(name)
    made, _ = student(model)
    settings = _trainable(made, "lora", attention=True, keep="lora")
    make_adapter(made, model, settings).save_pretrained(tmp_path)
    expected = _logits(made.model)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path)
    found = _logits(adapted, domain="code")
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))


def test_an_entangled_block_trains_its_outgoing_leaf_only():
    made, _ = student(sparse(ENTANGLED))
    for leaves in made.leaves:
        assert [leaf.trained for leaf in leaves] == [False, False, True]
        weight = made.model.get_submodule(leaves[0].place).weight
        assert weight.shape == (48, 32), "a norm reads every neuron"


def test_the_partner_keeps_everything():
    dense = build("llama")
    frozen = frozen_copy(dense, torch.device("cpu"))
    made = make_student(frozen, everything(frozen))
    assert torch.allclose(_logits(made.model), _logits(dense), atol=1e-5)


def test_a_half_precision_model_is_trained_in_float32():
    model = sparse().to(torch.bfloat16)
    made, _ = student(model)
    assert {parameter.dtype for parameter in made.model.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("train", ["lora", "weights"])
@pytest.mark.parametrize("name", [*ARCHITECTURES, ENTANGLED])
def test_a_cut_keeps_what_the_dense_model_has_learnt(name, train):
    """The oracle is the pathway of a model whose FFN weights were tuned themselves."""
    model = sparse(name)
    frozen = frozen_copy(model.to_dense(), torch.device("cpu"))
    settings = sp.HealingSettings(train=train, rank=3)
    dense = make_student(frozen, everything(frozen))
    if train == "lora":
        add_lora(dense, settings)
    for leaf in dense.trained_leaves() if train == "weights" else ():
        dense.model.get_submodule(leaf.place).weight.requires_grad_(True)
    _disturb(dense.model)
    tuned = frozen_copy(model.to_dense(), torch.device("cpu"))
    for leaf in dense.trained_leaves():
        if train == "lora":
            weight = base_weight(frozen, leaf) + lora_change(dense, leaf.place).product()
        else:
            weight = dense.model.get_submodule(leaf.place).weight.detach()
        target = tuned.get_submodule(leaf.name)
        own = weight.T if isinstance(target, Conv1D) else weight
        target.weight = torch.nn.Parameter(own.clone(), requires_grad=False)
    blocks = model.pathways["code"].blocks
    expected = _logits(make_student(tuned, blocks).model)
    found = make_student(frozen, blocks)
    if train == "lora":
        add_lora(found, settings)
    untuned = _logits(found.model)
    state = {n: p.detach() for n, p in dense.model.named_parameters() if p.requires_grad}
    cut(found, dense, state, frozen)
    scale = float(expected.abs().max())
    assert torch.allclose(_logits(found.model), expected, atol=1e-4 * scale)
    assert not torch.allclose(untuned, expected, atol=1e-2 * scale)


@pytest.mark.parametrize("rank", [1, 30])
def test_changes_add_up(rank):
    def low(rank):
        return LowRank(torch.randn(8, rank), torch.randn(rank, 6))

    matrix, first, second = torch.randn(8, 6), low(rank), low(1)
    assert add_changes(None, second) is second
    together = add_changes(first, second)
    assert isinstance(together, LowRank) == (rank == 1)
    found = together.product() if isinstance(together, LowRank) else together
    assert torch.allclose(found, first.product() + second.product(), atol=1e-5)
    assert torch.allclose(add_changes(matrix, second), matrix + second.product())
