"""Metrics and saliencies equal those of plain backward passes over single documents."""

import pytest
import torch
from torch.nn import functional

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery import sensitivity
from hf_sparse_pathways.discovery.sensitivity import measure_metrics, measure_saliency
from hf_sparse_pathways.discovery.text import read_documents
from hf_sparse_pathways.discovery.windows import draw_windows
from hf_sparse_pathways.ffn.blocks import find_blocks
from tests.architectures import build, random_masks, tiny_llama
from tests.discovery.untouched import remember
from tests.texts import documents, tiny_tokenizer

ARCHITECTURES = ["llama", "gpt2", "phi3", "gemma3", "gpt_neox", "deepseek_v3", "opt"]
TEXTS = [text for words in (3, 9, 17, 24) for text in documents("code", 2, words)]
WINDOWS = draw_windows(
    read_documents(TEXTS), tiny_tokenizer(), max_tokens=10_000, max_length=32, seed=0
)
TOKENS = sum(len(window.ids) for window in WINDOWS)


def _likeliest(predicted, _generator):
    return predicted.argmax(-1)


def _passes(model, labels_of):
    """Yield, per window, each block's activation, its gradient and that of its output."""
    for window in WINDOWS:
        ids = torch.tensor([window.ids])
        seen = {}
        handles = []
        for index, block in enumerate(find_blocks(model)):

            def keep(_module, args, output, index=index, seen=seen):
                args[0].retain_grad()
                output.retain_grad()
                seen[index] = (args[0], output)

            handles.append(block.outgoing.register_forward_hook(keep))
        logits = model(ids).logits[0]
        labels = labels_of(logits, ids[0])
        functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100).backward()
        for handle in handles:
            handle.remove()
        yield [
            tuple(part.flatten(0, -2).double() for part in (a.detach(), a.grad, out.grad))
            for a, out in seen.values()
        ]
    model.zero_grad()


def _naive_metrics(model):
    blocks = find_blocks(model)
    totals = [torch.zeros(block.d_out, block.d_out).double() for block in blocks]
    for blocks_seen in _passes(model, lambda logits, _: logits.argmax(-1)):
        for total, (_, _, gradient) in zip(totals, blocks_seen, strict=True):
            for token in gradient:
                total += torch.outer(token, token) / TOKENS
    for total in totals:
        total += sensitivity.SHRINKAGE * total.diagonal().mean() * torch.eye(len(total)).double()
    return totals


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_metric_is_the_mean_outer_product_of_gradients(architecture, monkeypatch):
    monkeypatch.setattr(sensitivity, "_draw_labels", _likeliest)
    expected = _naive_metrics(build(architecture))
    metrics = measure_metrics(build(architecture), WINDOWS)
    assert len(metrics) == len(expected)
    for metric, naive in zip(metrics, expected, strict=True):
        assert metric.dtype == torch.float32
        scale = float(naive.abs().max())
        torch.testing.assert_close(metric.double(), naive, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_saliency_is_the_sum_of_gradient_times_activation(architecture):
    def following(_, ids):
        return torch.cat([ids[1:], torch.tensor([-100])])

    model = build(architecture)
    signed = [torch.zeros(block.d_ff).double() for block in find_blocks(model)]
    absolute = [torch.zeros_like(total) for total in signed]
    for seen in _passes(model, following):
        for index, (activation, gradient, _) in enumerate(seen):
            signed[index] += (activation * gradient).sum(0)
            absolute[index] += (activation * gradient).abs().sum(0)
    for mine, total, size in zip(measure_saliency(model, WINDOWS), signed, absolute, strict=True):
        scale = float(size.max())
        torch.testing.assert_close(mine.signed, total, rtol=1e-3, atol=1e-4 * scale)
        torch.testing.assert_close(mine.absolute, size, rtol=1e-3, atol=1e-4 * scale)


def test_a_saliency_foretells_the_loss_without_a_neuron():
    """Scaling a neuron's column by 1 + h changes the loss by about h times the saliency."""
    model, step = build("llama"), 0.02
    saliency = measure_saliency(model, WINDOWS)

    @torch.no_grad()
    def loss(column, factor):
        before, total = column.clone(), 0.0
        column *= factor
        for window in WINDOWS:
            ids = torch.tensor([window.ids])
            logits = model(ids).logits[0, :-1].double()
            total += float(functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        column.copy_(before)
        return total

    for index, block in enumerate(find_blocks(model)):
        neuron = int(saliency[index].signed.abs().argmax())
        column = block.outgoing.weight.data[:, neuron]
        change = (loss(column, 1 + step) - loss(column, 1 - step)) / (2 * step)
        assert change == pytest.approx(float(saliency[index].signed[neuron]), rel=0.02)


@pytest.mark.parametrize("measure", [measure_metrics, measure_saliency])
def test_only_the_first_tokens_are_used(measure, monkeypatch):
    monkeypatch.setattr(sensitivity, "SAMPLE_TOKENS", (len(WINDOWS[0].ids) + 1,) * 2)
    mine, theirs = measure(tiny_llama(), WINDOWS), measure(tiny_llama(), WINDOWS[:2])
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(*(getattr(part, "signed", part) for part in (one, other)))


def test_metrics_are_seeded_and_leave_the_global_generator_alone():
    model = tiny_llama()  # which seeds the global generator
    state = torch.get_rng_state()
    first, again, other = (measure_metrics(model, WINDOWS, seed=s) for s in (0, 0, 1))
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_labels_are_drawn_as_the_model_predicts():
    logits = torch.tensor([[2.0, 0.0, -40.0, 1.0]]).expand(20_000, 4)
    drawn = sensitivity._draw_labels(logits.softmax(-1), torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(shares, logits[0].softmax(-1), atol=0.02, rtol=0)


def _measured(model):
    measure_metrics(model, WINDOWS)
    measure_saliency(model, WINDOWS)


def _interrupted(measure):
    def run(model):
        calls = []

        def fail(*_):
            calls.append(None)
            if len(calls) == 2:
                raise KeyboardInterrupt

        handle = find_blocks(model)[1].layer.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            measure(model, WINDOWS)
        handle.remove()

    return run


RUNS = {
    "measured": _measured,
    "metric interrupted": _interrupted(measure_metrics),
    "saliency interrupted": _interrupted(measure_saliency),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_model_is_left_as_it_was(run, mode):
    model = build("gpt2").train(mode == "train")
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 > 0)
    model.get_input_embeddings().register_forward_hook(lambda *_: None)
    check = remember(model)
    RUNS[run](model)
    check()


def test_it_works_where_gradients_are_off():
    with torch.no_grad():
        mine = measure_metrics(tiny_llama(), WINDOWS)
        assert not torch.is_grad_enabled()
    for one, other in zip(mine, measure_metrics(tiny_llama(), WINDOWS), strict=True):
        assert torch.equal(one, other)


def test_a_model_with_pathways_is_measured_densely():
    dense = build("llama")
    pathways = sp.Pathways.from_masks(dense, random_masks(dense))
    sparse = sp.SparsePathwaysForCausalLM.from_dense(dense, pathways, default_domain="law")
    for one, other in zip(*(measure_metrics(m, WINDOWS) for m in (sparse, dense)), strict=True):
        assert torch.equal(one, other)
