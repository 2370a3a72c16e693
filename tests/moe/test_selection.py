"""What a profile says of routed experts, and which of them a selection keeps."""

import pytest
import torch

import hf_sparse_pathways as sp
from hf_sparse_pathways.discovery.expert_profiling import compute_expert
from hf_sparse_pathways.discovery.expert_selection import choose_experts, score_neurons
from hf_sparse_pathways.discovery.expert_statistics import TENSORS
from hf_sparse_pathways.discovery.passes import run_decoder
from hf_sparse_pathways.discovery.windows import make_batches
from hf_sparse_pathways.errors import PathwaysError, UnknownNameError, UnsupportedModelError
from hf_sparse_pathways.ffn.blocks import survey_model
from hf_sparse_pathways.ffn.expert_layouts import find_parameter
from hf_sparse_pathways.ffn.kept_experts import ExpertsShape
from tests.architectures import build
from tests.moe.architectures import MOE, build_moe
from tests.texts import documents, tiny_tokenizer

TEXTS = {name: documents(name, 8, 30) for name in ("code", "law")}


def take(model, **options):
    return sp.profile(model, tiny_tokenizer(), TEXTS, max_length=32, batch_size=4, **options)


@pytest.fixture(scope="module", params=["mixtral", "deepseek_v3", "gpt_oss", "dbrx", "nemotron_h"])
def case(request):
    model = build_moe(request.param)
    return model, take(model)


def test_statistics_equal_those_of_each_token(case):
    model, profile = case
    for domain in profile.domains:
        taken = profile[domain]
        expected = _by_token(model, taken.windows)
        assert len(taken.experts) == len(profile.base.experts) == len(expected)
        for found, sums in zip(taken.experts, expected, strict=True):
            assert found.tokens == sum(len(window.ids) for window in taken.windows)
            assert int(found.routed.sum()) == found.tokens * profile.base.experts[0].top_k
            for name, value in sums.items():
                torch.testing.assert_close(getattr(found, name), value, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def _by_token(model, windows):
    """Return routed, weight_sum and reap_sum, from each window alone and each token's experts."""
    layers = survey_model(model).experts
    sums = [
        {name: torch.zeros(one.packed.experts).double() for name in TENSORS[:3]} for one in layers
    ]
    seen = []
    hooks = [
        one.module.register_forward_pre_hook(lambda _, args, n=n: seen.append((n, args)))
        for n, one in enumerate(layers)
    ]
    for batch in make_batches(windows, 1):
        run_decoder(model, batch)
    for hook in hooks:
        hook.remove()
    for n, (hidden, index, weights) in seen:
        hidden = hidden.reshape(-1, hidden.shape[-1])
        for token, experts in enumerate(index.tolist()):
            for place, expert in enumerate(experts):
                weight = weights[token, place : place + 1].unsqueeze(0)
                chosen = torch.tensor([[expert]])
                output = layers[n].module(hidden[token : token + 1], chosen, weight)
                sums[n]["routed"][expert] += 1
                sums[n]["weight_sum"][expert] += weight.item()
                sums[n]["reap_sum"][expert] += output.double().norm()
    return sums


def test_tokens_of_every_expert_are_drawn(case):
    _, profile = case
    layers = sp.summarise_experts(profile)
    figure = sp.plot(profile, "experts")
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in panels] == profile.domains
    for axes, name in zip(panels, profile.domains, strict=True):
        drawn = axes.images[0].get_array().filled(torch.nan).tolist()
        for row, layer in zip(drawn, layers, strict=True):
            own = torch.tensor(row)
            assert own[~own.isnan()].tolist() == pytest.approx(layer.usage[name])
            assert own[~own.isnan()].sum().item() == pytest.approx(layer.top_k)
    if not profile.base.blocks:
        assert sp.plot(profile).get_suptitle() == figure.get_suptitle()
        with pytest.raises(PathwaysError, match="which has experts"):
            sp.plot(profile, "skippable")


@torch.no_grad()
def test_activations_are_those_that_the_outgoing_weights_see(case):
    model, _ = case
    found = survey_model(model).experts[0]
    hidden = torch.randn(5, found.packed.d_in)
    output, activation = compute_expert(found, 2, hidden)
    packing = found.packed.packings[0]
    weight = packing.apart(find_parameter(found.module, packing.name))[2]
    weight = weight if packing.dim == 1 else weight.T
    bias = find_parameter(found.module, f"{packing.name}_bias")
    expected = activation @ weight + (0 if bias is None else bias[2])
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_usage_and_reap_keep_what_they_say(case):
    model, profile = case
    for score in ("usage", "reap"):
        paths = sp.select(model, profile, experts=0.5, expert_score=score, **_dense(profile))
        assert {*paths.controls} == {"pooled"}
        for domain in paths.domains:
            layers = zip(
                paths[domain].experts, profile[domain].experts, paths.base.experts, strict=True
            )
            for kept, statistics, shape in layers:
                assert kept.kept == max(shape.experts // 2, shape.groups * shape.least_per_group)
                values = getattr(statistics, score)
                if shape.groups == 1:
                    assert values[kept.keep].min() >= values[~kept.keep].max()
            assert paths[domain].provenance["expert_score"] == score
            assert paths.expert_sparsity(domain) == 0.5
    assert sp.SparsePathwaysForCausalLM.from_dense(model, paths).domains == ["code", "law"]


def _dense(profile):
    return {"sparsity": 0.0} if profile.base.blocks else {}


def test_neurons_are_the_strongest_of_each_expert(case):
    model, profile = case
    paths = sp.select(model, profile, experts=0.5, expert_neurons=0.5, **_dense(profile))
    found = survey_model(model).experts
    for layer, kept in enumerate(paths["code"].experts):
        width = round(0.5 * found[layer].packed.d_ff)
        assert kept.width == width
        scores = score_neurons(found[layer], profile["code"].experts[layer])
        for expert in kept.keep.nonzero().flatten():
            own = kept.neurons[expert]
            assert scores[expert][own].min() >= scores[expert][~own].max()
        assert not kept.neurons[~kept.keep].any()
    assert paths.flops("code") < 0.9 if not profile.base.blocks else 1.0


def test_profiles_and_pathways_are_saved(case, tmp_path):
    model, profile = case
    profile.save_pretrained(tmp_path / "profile")
    loaded = sp.Profile.from_pretrained(tmp_path / "profile")
    for domain in profile.domains:
        for mine, theirs in zip(loaded[domain].experts, profile[domain].experts, strict=True):
            assert mine.tokens == theirs.tokens
            assert all(torch.equal(getattr(mine, n), getattr(theirs, n)) for n in TENSORS)
    paths = sp.select(model, loaded, experts=0.5, expert_neurons=0.5, **_dense(profile))
    paths.save_pretrained(tmp_path / "paths")
    again = sp.Pathways.from_pretrained(tmp_path / "paths")
    assert again.base == paths.base
    for name in ("code", "law", "pooled"):
        for mine, theirs in zip(again[name].experts, paths[name].experts, strict=True):
            assert torch.equal(mine.keep, theirs.keep)
            assert torch.equal(mine.neurons, theirs.neurons)


def test_merged_profiles_add_up(case):
    model, profile = case
    texts = {"code": documents("code", 6, 30, seed=1)}
    other = sp.profile(model, tiny_tokenizer(), texts, max_length=32, batch_size=4)
    both = profile.merged(other)["code"].experts[0]
    parts = (profile["code"].experts[0], other["code"].experts[0])
    assert both.tokens == sum(part.tokens for part in parts)
    assert torch.equal(both.routed, parts[0].routed + parts[1].routed)


def test_padding_and_batches_do_not_count(case):
    model, profile = case
    texts = {"code": TEXTS["code"]}
    alone = sp.profile(model, tiny_tokenizer(), texts, max_length=32, batch_size=1)
    for mine, theirs in zip(alone["code"].experts, profile["code"].experts, strict=True):
        assert torch.equal(mine.routed, theirs.routed)
        torch.testing.assert_close(mine.abs_sum, theirs.abs_sum, rtol=1e-4, atol=1e-4)


def test_gated_shared_experts_are_pruned_in_sequence():
    """Their input is flattened to tokens, and what they give enters the layer by a gate."""
    model = build_moe("qwen2_moe")
    paths = sp.select(model, take(model), sparsity=0.3, experts=0.5, order="sequential")
    assert paths["code"].provenance["order"] == "sequential"
    assert 0.2 < paths.sparsity("code") < 0.4
    assert paths.expert_sparsity("code") == 0.5


def test_groups_keep_enough():
    found = survey_model(build_moe("deepseek_v2")).experts[0]
    shape = ExpertsShape.of(found, "")
    scores = torch.arange(shape.experts).float()
    keep = choose_experts(scores, shape, 0.1)
    assert keep.view(shape.groups, -1).sum(1).tolist() == [shape.least_per_group] * shape.groups
    sp.KeptExperts(keep=keep).check(shape)


def test_what_is_refused():
    moe, dense = build_moe("mixtral"), build("llama")
    profile = take(moe)
    with pytest.raises(UnsupportedModelError, match="--experts"):
        sp.select(moe, profile)
    with pytest.raises(PathwaysError, match="share that stays"):
        sp.select(moe, profile, experts=0.0)
    with pytest.raises(UnknownNameError, match="reap"):
        sp.select(moe, profile, experts=0.5, expert_score="raep")
    with pytest.raises(PathwaysError, match="routed experts alone"):
        sp.select(moe, profile, experts=0.5, sparsity=0.3)
    for options in ({"clusters": 4}, {"skip": 0.5}, {"mixture": 4}, {"score": "wanda"}):
        with pytest.raises(PathwaysError, match=rf"about FFN blocks: {next(iter(options))} \(--"):
            sp.select(moe, profile, experts=0.5, **options)
    for options in ({"experts": "x"}, {"experts": True}, {"experts": 0.5, "target_error": "x"}):
        with pytest.raises(PathwaysError, match=r"'x'|True"):
            sp.select(moe, profile, **options)
    with pytest.raises(UnsupportedModelError, match="no routed experts"):
        sp.select(dense, take(dense), experts=0.5)
    few = torch.zeros(8, dtype=torch.bool)
    few[0] = True
    paths = sp.select(moe, profile, experts=0.5)
    with pytest.raises(PathwaysError, match="1 of the 8 experts"):
        paths.with_experts({"code": [sp.KeptExperts(keep=few)] * 2})
    own = paths["code"].experts
    assert paths.with_experts({"code": iter(own)})["code"].experts == own
    with pytest.raises(PathwaysError, match="KeptExperts"):
        paths.with_experts({"code": [[0, 1], [0, 1]]})
    with pytest.raises(PathwaysError, match="one entry per layer"):
        paths.with_experts({"code": [sp.KeptExperts(keep=~few)]})
    with pytest.raises(PathwaysError, match="empty one to keep all of them; got None"):
        paths.with_experts({"code": None})
    assert paths.with_experts({"code": ()})["code"].experts == ()


@pytest.mark.parametrize("name", sorted(MOE))
def test_every_architecture_is_profiled_and_selected(name):
    model = build_moe(name)
    profile = take(model, grams=False)
    options = {"sparsity": 0.0, "method": "wanda"} if profile.base.blocks else {}
    paths = sp.select(model, profile, experts=0.5, expert_neurons=0.5, **options)
    sparse = sp.SparsePathwaysForCausalLM.from_dense(model, paths)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert not torch.equal(sparse(ids, domain="code").logits, model(ids).logits)
