"""The fused loss and its gradient are those of autograd's own operations."""

import pytest
import torch
from torch.nn import functional

from hf_sparse_pathways.discovery import predictions
from hf_sparse_pathways.discovery.windows import Window, make_batches
from hf_sparse_pathways.healing.losses import Objective, count_scored
from tests.architectures import build, prompt

TERMS = [
    {"lm": 1.0},
    {"kl": 1.0},
    {"lm": 0.5, "kl": 2.0},
    {"hidden": 1.0},
    {"lm": 1.0, "hidden": 3.0},
]


def _batch():
    rows = prompt(3, 11).tolist()
    return next(make_batches([Window(tuple(r[: 11 - 3 * i])) for i, r in enumerate(rows)], 3))


def _plain(terms, model, teacher, batch):
    """The same loss, window by window, of plain operations."""
    total = torch.zeros(())
    for window in batch.windows:
        ids = torch.tensor([window.ids])
        own = model(ids, output_hidden_states=True)
        theirs = teacher(ids, output_hidden_states=True)
        mine, expected = own.logits[0, :-1], theirs.logits[0, :-1].detach()
        lm = functional.cross_entropy(mine, ids[0, 1:], reduction="sum")
        p = expected.softmax(-1)
        kl = (p * (p.log() - mine.log_softmax(-1))).sum()
        total = total + terms.get("lm", 0.0) * lm + terms.get("kl", 0.0) * kl
        pairs = zip(own.hidden_states[1:], theirs.hidden_states[1:], strict=True)
        for a, b in pairs:
            b = b.detach()[0, :-1]
            distance = ((a[0, :-1] - b).square().sum(-1) / b.square().sum(-1)).sum()
            total = total + terms.get("hidden", 0.0) * distance / (len(own.hidden_states) - 1)
    return total


def _gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("terms", TERMS, ids=lambda terms: "+".join(terms))
@pytest.mark.parametrize("chunk", [1, 600, 10**6])
def test_loss_and_gradient_are_those_of_plain_operations(terms, chunk, monkeypatch):
    monkeypatch.setattr(predictions, "CHUNK_VALUES", chunk)
    model, teacher, batch = build("llama"), build("llama"), _batch()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.1)
    loss = Objective(terms=terms, teacher=teacher)(model, batch)
    expected = _plain(terms, model, teacher, batch)
    assert torch.allclose(loss, expected, rtol=1e-4)
    found, plain = _gradients(model, 0.5 * loss), _gradients(model, 0.5 * expected)
    scale = max(gradient.abs().max() for gradient in plain.values())
    for name, gradient in plain.items():
        own = found.get(name, torch.zeros_like(gradient))  # the head, of hidden states alone
        assert torch.allclose(own, gradient, atol=1e-5 * float(scale)), name
    assert not any(parameter.grad is not None for parameter in teacher.parameters())


def test_every_token_but_the_first_is_scored():
    batch = _batch()
    assert count_scored(batch) == sum(len(window.ids) - 1 for window in batch.windows)
