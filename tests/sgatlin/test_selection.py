"""What a profile says of sgatlin layers, which experts a domain keeps, and what that costs."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery.expert_statistics import TENSORS
from hf_sparse_pathways.measure.analysis import Analysis, analyse
from hf_sparse_pathways.measure.model_size import ModelSize
from hf_sparse_pathways.modeling.replacement import find_layers
from tests.architectures import build, prompt
from tests.cli.commands import assert_error, run, run_well
from tests.sgatlin.models import (
    CHANNELS,
    EXPERTS,
    FEW,
    TEXTS,
    TOKENIZER,
    TOP_K,
    make_sgatlin,
    save_with_texts,
)
from tests.texts import documents

IDS = prompt(2, 9)


@pytest.fixture(scope="module")
def model():
    return make_sgatlin()


@pytest.fixture(scope="module")
def profile(model):
    return sp.profile(model, TOKENIZER, TEXTS, max_length=32, batch_size=3)


@torch.no_grad()
def test_statistics_equal_those_of_each_token(model, profile):
    taken, layer = profile["code"], find_layers(model)[1]
    sums = {name: torch.zeros(CHANNELS, EXPERTS).double() for name in TENSORS[:3]}
    activations, tokens = torch.zeros(CHANNELS, EXPERTS).double(), 0
    for window in taken.windows:
        seen = []
        hook = layer.register_forward_pre_hook(lambda _, args, into=seen: into.append(args[0][0]))
        model(torch.tensor([window.ids]))
        hook.remove()
        tokens += len(seen[0])
        for x, scores, index in zip(seen[0], *layer.route(seen[0]), strict=True):
            for c in range(CHANNELS):
                for s, i in zip(scores[c], index[c], strict=True):
                    sums["routed"][c, i] += 1
                    sums["weight_sum"][c, i] += s.item()
                    sums["reap_sum"][c, i] += (s * (layer.u[c, i] @ x) * layer.v[c, i]).norm()
                    activations[c, i] += (layer.u[c, i] @ x).abs()
    found = taken.experts[1]
    assert found.tokens == tokens
    assert int(found.routed.sum()) == tokens * CHANNELS * TOP_K
    for name, value in sums.items():
        torch.testing.assert_close(getattr(found, name), value.flatten(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.abs_sum[:, 0], activations.flatten(), rtol=1e-4, atol=1e-4)
    assert found.output_sum.shape == (CHANNELS * EXPERTS, 0)


def test_batches_and_pathways_do_not_count(model, profile):
    pathways = sp.select(model, profile, experts=0.25)
    sparse = sp.SparsePathwaysForCausalLM.from_dense(model, pathways, default_domain="law")
    texts = {"code": TEXTS["code"]}
    again = sp.profile(sparse, TOKENIZER, texts, max_length=32, batch_size=1)
    for mine, theirs in zip(again["code"].experts, profile["code"].experts, strict=True):
        assert torch.equal(mine.routed, theirs.routed)
        torch.testing.assert_close(mine.reap_sum, theirs.reap_sum, rtol=1e-4, atol=1e-6)
    other = sp.select(sparse, profile, experts=0.25)
    for mine, theirs in zip(other["code"].experts, pathways["code"].experts, strict=True):
        assert torch.equal(mine.keep, theirs.keep)


@pytest.mark.parametrize("score", ["auto", "added", "usage", "reap"])
def test_the_best_of_every_channel_stay(model, profile, score):
    paths = sp.select(model, profile, experts=0.5, expert_score=score)
    assert {*paths.controls} == {"pooled"}
    for domain in paths.domains:
        for kept, own in zip(paths[domain].experts, profile[domain].experts, strict=True):
            keep = kept.keep.view(CHANNELS, EXPERTS)
            assert (keep.sum(1) == EXPERTS // 2).all()
            values = getattr(own, "added" if score == "auto" else score).view(CHANNELS, EXPERTS)
            for channel in range(CHANNELS):
                inside, outside = values[channel][keep[channel]], values[channel][~keep[channel]]
                assert inside.min() >= outside.max()
        assert paths.expert_sparsity(domain) == 0.5
        assert paths[domain].provenance["experts"] == 0.5
    few = sp.select(model, profile, experts=0.01)
    assert (few["law"].experts[0].keep.view(CHANNELS, EXPERTS).sum(1) == TOP_K).all()


def test_profile_and_pathways_are_saved(model, profile, tmp_path):
    profile.save_pretrained(tmp_path / "profile")
    loaded = sp.Profile.from_pretrained(tmp_path / "profile")
    for mine, theirs in zip(loaded["law"].experts, profile["law"].experts, strict=True):
        assert all(torch.equal(getattr(mine, n), getattr(theirs, n)) for n in TENSORS)
    paths = sp.select(model, loaded, experts=0.5)
    paths.save_pretrained(tmp_path / "paths")
    again = sp.Pathways.from_pretrained(tmp_path / "paths")
    assert again.base == paths.base
    assert again.base.experts[0].channels == CHANNELS
    for mine, theirs in zip(again["law"].experts, paths["law"].experts, strict=True):
        assert torch.equal(mine.keep, theirs.keep)


def test_quality_stands_beside_its_controls(model, profile):
    paths = sp.select(model, profile, experts=0.25)
    sparse = sp.SparsePathwaysForCausalLM.from_dense(model, paths)
    texts = {name: documents(name, count=8, seed=7) for name in TEXTS}
    report = sp.evaluate(sparse, TOKENIZER, texts, max_length=32)
    rows = {row.role: row for row in report.of("code")}
    assert {*rows} == {"dense", "pathway", "pooled", "random", "other"}
    assert rows["dense"].experts is None
    assert all(rows[role].experts == 0.25 for role in rows if role != "dense")
    assert rows["random"].divergence > 0
    assert "| expert weights |" in report.to_markdown()
    shown = paths.sections()[-1]
    assert shown.rows[0][1] == "3 of 16 x 1, 2 times"
    assert "code 75.0% (0.00154 M left)" in shown.note


def test_usage_is_analysed(model, profile):
    size = ModelSize.of(model)
    assert size.experts == 3 * model.config.ffn.flops(32) // 2
    assert size.parameters == model.num_parameters()
    analysis = Analysis.from_dict(json.loads(json.dumps(analyse(profile, size).to_dict())))
    for layer in analysis.experts:
        for domain in TEXTS:
            assert sum(layer.usage[domain]) == pytest.approx(layer.top_k)
            assert layer.closest(domain) is None
        usage = torch.tensor([*layer.usage.values()])
        used = usage[:, usage.sum(0) > 0]
        often = used.amax(0) / used.mean(0) > 1.25
        assert layer.specialised == pytest.approx(often.double().mean().item())
    titles = [section.title for section in analysis.sections()]
    assert titles == [
        "Routed experts on code",
        "Routed experts on law",
        "Routed experts over domains",
    ]


def test_what_does_not_fit_is_refused(model, profile):
    with pytest.raises(sp.PathwaysError, match="say how many stay with"):
        sp.select(model, profile)
    with pytest.raises(sp.PathwaysError, match="single neurons"):
        sp.select(model, profile, experts=0.5, expert_neurons=0.5)
    with pytest.raises(sp.PathwaysError, match="about FFN blocks: sparsity"):
        sp.select(model, profile, experts=0.5, sparsity=0.5)
    with pytest.raises(sp.PathwaysError, match="Made for"):
        sp.select(build("llama"), profile, experts=0.5)


def test_by_commands(model, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    bare, texts = save_with_texts(model, tmp_path)
    folder = tmp_path / "x"
    asked = ("build", bare, *texts, *FEW, "--output", folder)
    assert_error(run(*asked), "--experts")
    assert_error(run(*asked, "--experts", "0.5", "--expert-neurons", "0.5"), "single neurons")
    run_well(*asked, "--experts", "0.25")
    facts = json.loads(run_well("info", folder, "--json"))
    assert facts["domains"]["code"]["expert_sparsity"] == 0.75
    assert "3 of 16 x 1, 2 times" in run_well("info", folder)
    measured = ("evaluate", folder, *texts, "--max-tokens", "200", "--json", "--no-plots")
    rows = json.loads(run_well(*measured))["rows"]
    assert {row["role"] for row in rows} == {"dense", "pathway", "random", "pooled", "other"}
    said = run_well("analyze", bare, *texts, *FEW, "--no-experiments", "--no-plots")
    assert "specialised" in said
    assert run_well(
        "generate", folder, "--domain", "law", "--prompt", "def", "--max-new-tokens", "2"
    )
    again = run_well("build", folder, *texts, *FEW, "--experts", "0.5", "--output", tmp_path / "y")
    assert again
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "y")
    assert loaded.pathways.expert_sparsity("law") == 0.5
    sp.write_html_report(folder, tmp_path / "page.html", plots=False)
    page = (tmp_path / "page.html").read_text()
    assert "Routed experts kept" in page
    assert "the experts that it needs" in page
    assert ">0.0%<" not in page
    assert "FFN neurons" not in page
