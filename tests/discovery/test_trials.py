"""Pathways tried out on a dense model compute what the model with these pathways does."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery.text import read_documents
from hf_sparse_pathways.discovery.trials import computing, mean_loss
from hf_sparse_pathways.discovery.windows import draw_windows
from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.ffn.choices import all_dense
from hf_sparse_pathways.measure.quality import evaluate
from tests.architectures import build, compensate, prompt, random_masks
from tests.discovery.untouched import remember
from tests.texts import documents, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXTS = [text for words in (2, 9, 15) for text in documents("code", 3, words)]
WINDOWS = draw_windows(read_documents(TEXTS), TOKENIZER, max_tokens=9999, max_length=64, seed=0)
IDS = prompt()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "falcon", "deepseek_v3"])
def test_the_loss_is_that_of_an_evaluation(architecture):
    dense = build(architecture)
    pathways = compensate(dense, random_masks(dense))
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, pathways)
    report = evaluate(model, TOKENIZER, {"code": TEXTS}, controls=False, max_length=64)
    perplexities = {row.pathway: row.perplexity for row in report.rows}
    arms = {None: None, "code": pathways["code"].blocks}
    assert set(perplexities) == set(arms)
    for name, blocks in arms.items():
        for batch_size in (1, 4):
            loss = mean_loss(dense, WINDOWS, blocks, find_blocks(dense), batch_size=batch_size)
            assert math.exp(loss) == pytest.approx(perplexities[name], rel=1e-5)


@torch.no_grad()
def test_within_the_scope_blocks_compute_pathways_even_under_a_dense_one():
    dense = build("gpt2")
    pathways = compensate(dense, random_masks(dense))
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, pathways, executor="compact")
    expected, before = model(IDS, domain="law").logits, dense(IDS).logits
    with all_dense(), computing(find_blocks(dense), pathways["law"].blocks):
        assert torch.equal(dense(IDS).logits, expected)
    assert torch.equal(dense(IDS).logits, before)


def _partly():
    ffn = sp.SgatlinConfig(n_experts=16, n_channels=2, top_k=3, d_key=8)
    config = sp.SparsePathwaysConfig.from_base(build("llama").config, ffn=ffn, ffn_blocks=[1])
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def test_beside_layers_of_its_own_a_model_tries_out_what_its_other_blocks_keep():
    """Its leaves are swapped already, and are as they were afterwards."""
    partly = _partly()
    blocks, before = find_blocks(partly), partly(IDS).logits
    pathways = compensate(partly, random_masks(partly))
    model = sp.SparsePathwaysForCausalLM.from_dense(partly, pathways, executor="compact")
    expected = model(IDS, domain="law").logits
    leaves = [dict(leaf.__dict__) for block in blocks for leaf in block.leaves]
    for _ in range(2):
        with computing(blocks, pathways["law"].blocks):
            assert torch.equal(partly(IDS).logits, expected)
        assert torch.equal(partly(IDS).logits, before)
    for leaf, own in zip((leaf for b in blocks for leaf in b.leaves), leaves, strict=True):
        assert leaf.__dict__ == own


def test_it_is_pruned_and_healed():
    partly, texts = _partly(), {name: documents(name, 30, 40) for name in ("code", "law")}
    profile = sp.profile(partly, TOKENIZER, texts, max_length=32)
    made = sp.select(partly, profile, sparsity=0.3, clusters=2)
    healed = sp.heal(
        sp.SparsePathwaysForCausalLM.from_dense(partly, sp.select(partly, profile, sparsity=0.3)),
        TOKENIZER,
        texts,
        settings=sp.HealingSettings(tokens=400),
    )
    assert made.domains == healed.pathways.domains == ["code", "law"]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_model_is_left_as_it_was(mode):
    dense = build("gpt2").train(mode == "train")
    blocks, pathways = find_blocks(dense), compensate(dense, random_masks(dense))
    check = remember(dense)
    mean_loss(dense, WINDOWS, pathways["code"].blocks, blocks)
    check()
    with pytest.raises(KeyboardInterrupt), computing(blocks, pathways["code"].blocks):
        raise KeyboardInterrupt
    check()


def test_pathways_of_another_number_leave_the_model_as_it_was():
    dense = build("llama")
    blocks, pathways = find_blocks(dense), compensate(dense, random_masks(dense))
    check = remember(dense)
    with pytest.raises(ValueError, match="zip"):
        mean_loss(dense, WINDOWS, pathways["code"].blocks[:-1], blocks)
    check()


def test_scopes_of_different_blocks_may_lie_in_each_other():
    dense = build("llama")
    blocks, pathways = find_blocks(dense), compensate(dense, random_masks(dense))["code"].blocks
    check = remember(dense)
    with torch.no_grad():
        with computing(blocks, pathways):
            together = dense(IDS).logits
        with computing(blocks[:1], pathways[:1]), computing(blocks[1:], pathways[1:]):
            assert torch.equal(dense(IDS).logits, together)
    check()
