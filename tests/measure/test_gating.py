"""Contexts of experts, tokens gated alike and swapped gates, beside loops over single tokens."""

import pytest
import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.measure.gating import swap_gates
from tests.architectures import prompt
from tests.sgatlin.models import TEXTS, TOKENIZER, make_sgatlin

LAYER = 1
IDS = prompt(1, 9)


@pytest.fixture(scope="module")
def model():
    return make_sgatlin()


@pytest.fixture(scope="module")
def gates(model):
    return sp.read_gates(model, TOKENIZER, TEXTS["code"], LAYER, batch_size=2)


@torch.no_grad()
def test_gates_are_those_of_one_text_at_a_time(model, gates):
    assert len(gates.ids) == len(gates.scores) == len(gates.index) == len(gates.starts)
    layer, first = model.model.layers[LAYER].mlp, 0
    for start in gates.starts.unique().tolist():
        own = gates.starts == start
        seen = []
        hook = layer.register_forward_pre_hook(lambda _, args, into=seen: into.append(args[0][0]))
        model(gates.ids[own][None])
        hook.remove()
        scores, index = layer.route(seen[0])
        torch.testing.assert_close(gates.scores[own], scores, rtol=1e-4, atol=1e-5)
        assert torch.equal(gates.index[own], index)
        first += int(own.sum())
    assert first == len(gates.ids)


def test_an_expert_s_contexts_are_those_of_its_highest_scores(gates):
    channel, expert = 1, int(gates.index[0, 1, 0])
    found = gates.contexts(channel, expert, count=4)
    values = {
        t: float(score)
        for t in range(len(gates.ids))
        for score, i in zip(gates.scores[t, channel], gates.index[t, channel], strict=True)
        if i == expert
    }
    assert [one.value for one in found] == sorted(values.values(), reverse=True)[:4]
    for one in found:
        assert values[one.place] == one.value
        assert one.token == TOKENIZER.decode(gates.ids[one.place : one.place + 1])
        start = max(int(gates.starts[one.place]), one.place - 8)
        assert one.before == TOKENIZER.decode(gates.ids[start : one.place])
    assert len(gates.contexts(channel, expert, count=10_000)) == len(values)


def test_neighbours_are_by_the_cosine_of_all_scores(gates):
    dense = torch.zeros(len(gates.ids), 2, 16).scatter(2, gates.index, gates.scores).flatten(1)
    cosines = torch.cosine_similarity(dense, dense[3][None])
    cosines[3] = -2
    found = gates.neighbours(3, count=5)
    assert [one.value for one in found] == pytest.approx(cosines.topk(5).values.tolist(), abs=1e-5)
    assert all(one.place != 3 for one in found)


@torch.no_grad()
def test_a_swap_changes_the_token_s_gates_and_nothing_else(model):
    layer = model.model.layers[LAYER].mlp
    x = torch.randn(5, 32)
    scores, index = layer.route(x)
    expected = layer(x)
    rows = layer.u[torch.arange(2)[:, None], index[4]]
    gated = scores[4] * (rows @ x[1])
    expected[1] = (gated[..., None] * layer.v[torch.arange(2)[:, None], index[4]]).sum((0, 1))
    with swap_gates(model, LAYER, {1: (scores[4], index[4])}):
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.route(x)[0], scores)


@torch.no_grad()
def test_the_effect_begins_at_the_token(model):
    effect = sp.swap_effect(model, IDS, LAYER, 4, 2)
    assert effect.shape == (9, 99)
    assert (effect[:4] == 0).all()
    assert (effect[4:].abs().amax(1) > 0).all()
    assert (sp.swap_effect(model, IDS, LAYER, 4, 4).abs() < 1e-5).all(), "its own gates"


def test_what_does_not_fit_is_refused(model):
    with pytest.raises(sp.PathwaysError, match="no layer 3: the model has 3"):
        sp.read_gates(model, TOKENIZER, TEXTS["code"], 3)
    for ids, place in ((IDS, 9), (IDS[0], 1), (IDS.repeat(2, 1), 1)):
        with pytest.raises(sp.PathwaysError, match="two places among them"):
            sp.swap_effect(model, ids, 0, place, 0)


def test_there_are_as_many_experts_as_there_are(model, gates):
    channels, experts = gates.index.shape[1], gates.n_experts
    for call, told in (
        (lambda: gates.contexts(channels, 0), f"no channel {channels}"),
        (lambda: gates.contexts(-1, 0), "no channel -1"),
        (lambda: gates.contexts(0, experts), f"there are {experts}, from 0"),
        (lambda: gates.neighbours(10**6), "no token 1000000"),
        (lambda: gates.neighbours(-1), "no token -1"),
        (lambda: gates.neighbours(0, -1), "count .* got -1"),
        (lambda: gates.contexts(0, 0, -1), "count .* got -1"),
    ):
        with pytest.raises(sp.PathwaysError, match=told):
            call()
    scores, index = gates.scores[0], gates.index[0]
    for own, told in (
        ((scores, index + experts), "no expert"),
        ((scores, index - experts), "no expert"),
        ((scores[:1], index[:1]), "n_channels, top_k"),
    ):
        with pytest.raises(sp.PathwaysError, match=told), swap_gates(model, LAYER, {0: own}):
            pass
