"""Each block is repaired on what the pruned blocks before it give, towards the dense stream."""

from contextlib import ExitStack

import pytest
import torch

from hf_sparse_pathways.discovery.arms import Arm
from hf_sparse_pathways.discovery.layerwise import stacked_layers
from hf_sparse_pathways.discovery.passes import run_decoder
from hf_sparse_pathways.discovery.profiling import profile
from hf_sparse_pathways.discovery.repair import Repair, repair
from hf_sparse_pathways.discovery.selection import select
from hf_sparse_pathways.discovery.sequential import prune_sequentially
from hf_sparse_pathways.discovery.text import read_documents
from hf_sparse_pathways.discovery.trials import computing, mean_loss
from hf_sparse_pathways.discovery.windows import draw_windows, make_batches
from hf_sparse_pathways.ffn.block_pathway import BlockPathway
from hf_sparse_pathways.ffn.blocks import find_blocks
from tests.architectures import build
from tests.discovery.moments import draw_keep
from tests.discovery.untouched import remember
from tests.texts import documents, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ARCHITECTURES = ["llama", "gpt2", "phi3", "opt", "gpt_neox", "falcon", "granite", "deepseek_v3"]
POST_NORM = ["gemma2", "gemma3", "olmo2", "glm4"]


def _windows(domain="code", count=6, seed=0):
    texts = [*documents(domain, count, 25, seed), *documents(domain, 2, 7, seed)]
    options = {"max_tokens": 9999, "max_length": 32, "seed": 0}
    return draw_windows(read_documents(texts), TOKENIZER, **options)


WINDOWS = _windows()
BATCHES = list(make_batches(WINDOWS, 6))


def _half(index, task):
    """Keep half of a block at random, refitted."""
    d_ff = task.gram.d_ff
    return repair(task, draw_keep(d_ff, d_ff // 2, seed=index), Repair(bypass_rank=2))


def _prune(model, prune, batches=BATCHES):
    return prune_sequentially(model, [Arm(name="code", batches=batches, prune=prune)])["code"]


@torch.no_grad()
def _pass(model, pathways):
    """Run the model with pathways for its first blocks.

    Returns:
        Per block its z, per layer the hidden states behind it, both of real tokens only, and per
        block the number of its layer.
    """
    blocks = find_blocks(model)
    layers = stacked_layers(model, [block.layer for block in blocks])
    parts, behind = [([], []) for _ in blocks], [[] for _ in layers]
    with ExitStack() as stack:
        stack.enter_context(computing(blocks[: len(pathways)], pathways))
        rows = None

        def keep(kept, values):
            kept.append(values.flatten(0, -2)[rows].double())

        for block, (activations, inputs) in zip(blocks, parts, strict=True):
            for leaf, kept in ((block.outgoing, activations), (block.incoming[0], inputs)):
                handle = leaf.register_forward_pre_hook(
                    lambda _, args, kept=kept: keep(kept, args[0])
                )
                stack.callback(handle.remove)
        for module, kept in zip(layers, behind, strict=True):
            handle = module.register_forward_hook(
                lambda _m, _a, output, kept=kept: keep(
                    kept, output[0] if isinstance(output, tuple) else output
                )
            )
            stack.callback(handle.remove)
        for batch in BATCHES:
            rows = batch.mask.flatten()
            run_decoder(model, batch)
    ones = torch.ones(sum(len(window.ids) for window in WINDOWS), 1).double()
    cat = [[torch.cat(part) for part in block] for block in parts]
    z = [torch.cat([*block, ones], 1) if len(block[0]) == len(ones) else None for block in cat]
    places = [layers.index(block.layer) for block in blocks]
    return z, [torch.cat(part) for part in behind], places


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_task_is_what_plain_passes_through_the_pruned_model_give(architecture):
    model, tasks = build(architecture), []

    def prune(index, task):
        tasks.append(task)
        return _half(index, task)

    pathways = _prune(model, prune)
    gain = getattr(model.config, "residual_multiplier", 1.0)
    _, dense, places = _pass(model, ())
    for index, (task, block) in enumerate(zip(tasks, find_blocks(model), strict=True)):
        z, pruned, _ = _pass(model, pathways[:index])
        z, scale = z[index], float(task.gram.total.abs().max())
        total = task.gram.total.double()
        torch.testing.assert_close(total / scale, z.T @ z / scale, rtol=1e-3, atol=1e-5)
        error = (dense[places[index]] - pruned[places[index]]) / gain
        missing = error.T @ z / len(z)
        assert index == 0 or missing.abs().max() > 1e-3
        tolerance = 1e-3 * float(missing.abs().max()) + 1e-5
        torch.testing.assert_close(task.missing.double(), missing, rtol=1e-2, atol=tolerance)
        weight = block.outgoing.weight
        assert torch.equal(task.weight, weight if weight.shape == task.weight.shape else weight.T)


@pytest.mark.parametrize("repaired", [False, True], ids=["masked", "repaired"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *POST_NORM])
def test_keeping_everything_leaves_the_output_as_it_is(architecture, repaired):
    model, tasks = build(architecture), []

    def everything(_, task):
        tasks.append(task)
        keep = torch.ones(task.gram.d_ff, dtype=torch.bool)
        return repair(task, keep, Repair(bypass_rank=2)) if repaired else BlockPathway(keep=keep)

    pathways = _prune(model, everything)
    assert len(pathways) == len(find_blocks(model))
    assert all(task.missing.abs().max() < 1e-4 for task in tasks)
    losses = [mean_loss(model, WINDOWS, arm, find_blocks(model)) for arm in (None, pathways)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_model_is_left_as_it_was(mode):
    model = build("gpt2").train(mode == "train")
    check = remember(model)
    _prune(model, _half)
    check()


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("at", [0, 2])
def test_an_error_while_pruning_leaves_the_model_as_it_was(at, architecture):
    model = build(architecture).train()
    check = remember(model)

    def fail(index, task):
        if index == at:
            raise KeyboardInterrupt
        return _half(index, task)

    with pytest.raises(KeyboardInterrupt):
        _prune(model, fail)
    check()


def test_a_pathway_that_does_not_fit_leaves_the_model_as_it_was():
    model = build("llama")
    check = remember(model)

    def unfit(_, task):
        return BlockPathway(keep=torch.ones(task.gram.d_ff + 1, dtype=torch.bool))

    with pytest.raises((IndexError, ValueError, RuntimeError)):
        _prune(model, unfit)
    check()


def test_arms_do_not_see_each_other():
    model, law = build("llama"), list(make_batches(_windows("law"), 4))
    arms = [
        Arm(name="code", batches=BATCHES, prune=_half),
        Arm(name="law", batches=law, prune=_half),
        Arm(name="both", batches=[BATCHES[0], *law[1:]], prune=_half),
    ]
    together = prune_sequentially(model, arms)
    assert list(together) == ["code", "law", "both"]
    for arm in arms:
        alone = _prune(model, _half, arm.batches)
        for mine, theirs in zip(together[arm.name], alone, strict=True):
            parts = theirs.parts()
            assert all(torch.equal(part, parts[name]) for name, part in mine.parts().items())


def _final_error(model, pathways):
    """Return the relative error of the last hidden states."""
    _, dense, _ = _pass(model, ())
    _, pruned, _ = _pass(model, pathways)
    return float((pruned[-1] - dense[-1]).square().sum() / dense[-1].square().sum())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gpt_neox", "falcon", "gemma3"])
def test_in_sequence_the_error_at_the_end_is_smaller_than_at_once(architecture):
    model = build(architecture)
    texts = [*documents("code", 12, 25), *documents("code", 3, 7)]
    taken = profile(model, TOKENIZER, {"code": texts}, max_length=32, validation_tokens=0)
    errors = {
        order: _final_error(
            model,
            select(model, taken, sparsity=0.3, order=order, allocation="uniform")["code"].blocks,
        )
        for order in ("sequential", "one-shot")
    }
    assert 0 < errors["sequential"] < errors["one-shot"]


@pytest.mark.parametrize("architecture", POST_NORM)
def test_with_norms_behind_the_ffn_repair_still_helps(architecture):
    model = build(architecture)

    def plain(index, task):
        return BlockPathway(keep=_half(index, task).keep)

    def refit(index, task):
        return repair(task, plain(index, task).keep, Repair())

    repaired, masked = (_final_error(model, _prune(model, prune)) for prune in (refit, plain))
    assert repaired < masked


@pytest.mark.parametrize("architecture", POST_NORM)
def test_with_norms_behind_the_ffn_tokens_are_weighted(architecture):
    tasks = []

    def prune(index, task):
        tasks.append(task)
        return _half(index, task)

    _prune(build(architecture), prune)
    count = sum(len(window.ids) for window in WINDOWS)
    for task in tasks:
        assert task.gram.tokens > 0
        assert abs(task.gram.tokens / count - 1) > 1e-3
        assert task.missing.isfinite().all()
