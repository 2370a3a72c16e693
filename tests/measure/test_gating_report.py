"""Tables of gates, beside loops over the gates and the interventions that they are made of."""

import json
from dataclasses import replace

import pytest
import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.measure.analysis import Analysis, analyse
from hf_sparse_pathways.measure.gating import Context
from hf_sparse_pathways.measure.gating_report import (
    Neighbours,
    gating_sections,
    summarise_gating,
)
from hf_sparse_pathways.measure.model_size import ModelSize
from tests.architectures import build
from tests.cli.commands import run_well
from tests.sgatlin.models import FEW, TEXTS, TOKENIZER, make_sgatlin, save_with_texts

TEXT = [*TEXTS["code"], *TEXTS["law"]]


@pytest.fixture(scope="module")
def made():
    model = make_sgatlin()
    return model, summarise_gating(model, TOKENIZER, TEXT)


def test_experts_are_the_strongest_of_those_that_some_tokens_get(made):
    model, found = made
    assert [layer.name for layer in found] == [f"model.layers.{n}.mlp" for n in range(3)]
    gates = sp.read_gates(model, TOKENIZER, TEXT, 1, max_tokens=4096)
    means = {}
    for channel in range(2):
        for expert in range(16):
            own = gates.scores[:, channel][gates.index[:, channel] == expert]
            if 5 <= len(own) <= 0.25 * len(gates.ids):
                means[channel, expert] = float(own.mean())
    shown = [(one.channel, one.expert) for one in found[1].experts]
    assert shown == sorted(means, key=means.__getitem__, reverse=True)[:8]
    for one in found[1].experts:
        chosen = (gates.index[:, one.channel] == one.expert).any(1)
        assert one.share == pytest.approx(chosen.double().mean().item())
        assert one.contexts == tuple(gates.contexts(one.channel, one.expert, 4))


@torch.no_grad()
def test_swaps_are_what_swap_effect_says(made):
    model, found = made
    gates = sp.read_gates(model, TOKENIZER, TEXT, 1, max_tokens=4096)
    for one in found[1].swaps:
        place, partner = one.token.place, one.partner.place
        inside = (gates.starts == gates.starts[place]).nonzero().flatten()
        assert partner in inside
        cosines = gates.cosines(place)[inside]
        assert one.partner.value == pytest.approx(float(cosines.min()))
        start = int(inside[0])
        ids = gates.ids[inside][None]
        before = model(ids).logits[0]
        after = before + sp.swap_effect(model, ids, 1, place - start, partner - start)
        own, changed = before.log_softmax(-1), after.log_softmax(-1)
        divergence = (own.exp() * (own - changed)).sum(-1)
        assert one.divergence == pytest.approx(float(divergence[place - start]), abs=1e-6)
        best = TOKENIZER.decode([int(before[place - start].argmax())])
        assert one.before.startswith(repr(best))
    assert max(one.divergence for one in found[1].swaps) > 1e-3


def test_neighbours_are_those_of_the_gates(made):
    model, found = made
    gates = sp.read_gates(model, TOKENIZER, TEXT, 2, max_tokens=4096)
    for one in found[2].neighbours:
        assert one.token.token == TOKENIZER.decode([int(gates.ids[one.token.place])])
        assert one.alike == tuple(gates.neighbours(one.token.place, 4))


def test_models_without_such_layers_have_none():
    assert summarise_gating(build("llama"), TOKENIZER, TEXT) == ()


def test_nothing_in_a_text_is_obeyed(made):
    _, found = made
    hostile = Context(place=0, before="<script>", token="|\n", value=1.0)
    layer = replace(found[0], neighbours=(Neighbours(token=hostile, alike=(hostile,)),))
    section = list(gating_sections([layer]))[1]
    assert "<script>" not in section.to_html()
    assert "&lt;script&gt;[|\N{RETURN SYMBOL}] 1.00" in section.to_html()
    (row,) = section.rows
    assert len(row) == len(section.header)
    assert "\\<script>[\\|" in section.to_markdown()


def test_it_is_in_the_analysis_and_in_the_page(made, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    model, found = made
    bare, texts = save_with_texts(model, tmp_path)
    run_well("build", bare, *texts, *FEW, "--experts", "0.5", "--output", tmp_path / "x")
    said = run_well("analyze", bare, *texts, *FEW, "--no-plots", "--output", tmp_path / "analysis")
    assert "Gates swapped in model.layers.1.mlp" in said
    report = tmp_path / "analysis" / "analysis.json"
    page = tmp_path / "page.html"
    run_well("report", tmp_path / "x", "--analysis", report, "--html", page)
    html = page.read_text()
    for title in (
        "Experts of model.layers.0.mlp and where their scores are highest",
        "Tokens that model.layers.1.mlp gates alike",
        "Gates swapped in model.layers.2.mlp",
        "Overlap of kept experts (Jaccard)",
    ):
        assert title in html
    assert "Overlap of kept neurons" not in html
    assert "stay dense" not in html
    profile = sp.profile(model, TOKENIZER, TEXTS, max_length=32)
    analysis = analyse(profile, ModelSize.of(model)).with_gating(found)
    assert Analysis.from_dict(json.loads(json.dumps(analysis.to_dict()))).gating == found
