"""Models whose FFNs are layers of another kind: built, saved, loaded, generating."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
)

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import ArtefactError
from hf_sparse_pathways.ffn.blocks import find_blocks
from hf_sparse_pathways.modeling.replacement import find_layers
from tests.architectures import ARCHITECTURES, LLAMA_LIKE, build, prompt
from tests.replaced import EVERY_KIND, IDS, KINDS, SGATLIN, make

# -- built from a configuration, in any architecture -------------------------------------------


@EVERY_KIND
def test_the_layer_takes_the_block_s_place(ffn):
    model = make(ffn)
    layers = [layer.mlp for layer in model.model.layers]
    assert find_layers(model) == layers
    assert [layer.config for layer in layers] == [ffn] * 3
    assert not any("gate_proj" in name for name in model.state_dict())


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_layers_stand_where_the_blocks_stood(name):
    """A layer that computes ``x @ m`` gives the logits of a base whose blocks' outputs are that."""
    base = build(name)
    model = make(SGATLIN, base.config)
    model.load_state_dict(base.state_dict(), strict=False)
    blocks, layers = find_blocks(base), find_layers(model)
    assert len(blocks) == len(layers)
    matrices = [torch.randn(block.d_in, block.d_in) * 0.2 for block in blocks]
    for block, layer, matrix in zip(blocks, layers, matrices, strict=True):
        _give(block, matrix)
        layer.compute = matrix.__rmatmul__
    ids = prompt()
    assert torch.allclose(model(ids).logits, base(ids).logits, atol=1e-4, rtol=1e-4)


def _give(block, matrix):
    """Let a block of a plain model give its input times a matrix."""
    seen = []
    block.incoming[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    block.outgoing.register_forward_hook(lambda *_: seen.pop() @ matrix)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_any_architecture_is_saved_loaded_and_generates(name, tmp_path):
    model = make(SGATLIN, build(name).config)
    for layer in find_layers(model):
        layer.v.mul_(20.0)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert torch.allclose(again(IDS).logits, model(IDS).logits, atol=1e-5)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    found = again.generate(IDS, **options)
    assert torch.equal(found, model.generate(IDS, **options))
    assert found.shape == (2, 11)


def test_routed_experts_stay_and_that_is_said(caplog):
    model = make(SGATLIN, build("qwen3_moe").config)
    assert "routed experts stay as they are: model.layers.1.mlp.experts" in caplog.text
    assert [type(layer.mlp).__name__ for layer in model.model.layers] == [
        "PathwaySgatlinFFN",
        "Qwen3MoeSparseMoeBlock",
        "PathwaySgatlinFFN",
    ]


def test_a_base_without_dense_blocks_is_refused():
    config = build("qwen3_moe").config
    config.mlp_only_layers = []
    with pytest.raises(sp.PathwaysError, match="no FFN block that sgatlin layers could replace"):
        make(SGATLIN, config)


def test_the_headless_model():
    config = sp.SparsePathwaysConfig.from_base(LlamaConfig(**LLAMA_LIKE), ffn=SGATLIN)
    model = AutoModel.from_config(config)
    assert len(find_layers(model)) == 3
    assert model(IDS).last_hidden_state.shape == (2, 7, 32)


def test_weights_are_drawn_by_the_seed_and_as_the_layers_say():
    one, two, other = make(seed=1), make(seed=1), make(seed=2)
    assert torch.equal(one(IDS).logits, two(IDS).logits)
    assert not torch.equal(one(IDS).logits, other(IDS).logits)
    one.init_weights()
    for layer in find_layers(one):
        assert abs(layer.u.std().item() - 0.25) < 0.02, "1 / sqrt(16 experts)"


# -- the configuration --------------------------------------------------------------------------


def _ways(config, folder):
    config.save_pretrained(folder)
    yield copy.deepcopy(config)
    yield copy.copy(config)
    yield pickle.loads(pickle.dumps(config))
    yield type(config).from_dict(config.to_dict())
    yield sp.SparsePathwaysConfig.from_dict(config.to_dict())
    yield sp.SparsePathwaysConfig.from_dict(json.loads(config.to_json_string()))
    yield AutoConfig.from_pretrained(folder)
    yield sp.SparsePathwaysConfig.from_pretrained(folder)
    yield type(config).from_pretrained(folder)
    yield sp.SparsePathwaysConfig.from_base(config.base_config, ffn=config.ffn)


@EVERY_KIND
def test_the_layers_survive_every_way_of_a_configuration(ffn, tmp_path):
    config = sp.SparsePathwaysConfig.from_base(LlamaConfig(**LLAMA_LIKE), ffn=ffn)
    assert config.ffn == ffn
    for found in _ways(config, tmp_path):
        assert type(found) is type(config)
        assert found.ffn == ffn
        assert found.hidden_size == 32
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["ffn"] == ffn.to_dict()
    assert "ffn" not in vars(config.base_config)
    assert repr(config)


def test_a_configuration_without_layers_is_saved_as_before():
    config = sp.SparsePathwaysConfig.from_base(LlamaConfig(**LLAMA_LIKE))
    assert config.ffn is None
    assert "ffn" not in config.to_dict()
    assert "ffn" not in config.to_diff_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ffn": "sgatlin"}, r"such as sp\.SgatlinConfig"),
        ({"ffn": {"kind": "sgatlin"}}, "ffn takes"),
        ({"fnn": SGATLIN}, "Did you mean 'ffn'"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(sp.PathwaysError, match=message):
        sp.SparsePathwaysConfig.from_base(LlamaConfig(**LLAMA_LIKE), **fields)


def test_a_damaged_configuration_is_refused(tmp_path):
    make().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    for ffn in (5, "sgatlin", {"kind": "sgatlin", "n_experts": 15}, {"kind": "other"}):
        path.write_text(json.dumps({**fields, "ffn": ffn}))
        for load in (AutoConfig, AutoModelForCausalLM, type(make())):
            with pytest.raises(ArtefactError, match=r"config\.json has ffn"):
                load.from_pretrained(tmp_path)


# -- saved and loaded ---------------------------------------------------------------------------


@EVERY_KIND
@torch.no_grad()
def test_saved_and_loaded(ffn, tmp_path):
    model = make(ffn)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "pathways.json").exists()
    for load in (AutoModelForCausalLM, sp.SparsePathwaysForCausalLM, type(model)):
        again = load.from_pretrained(tmp_path)
        assert torch.allclose(again(IDS).logits, model(IDS).logits, atol=1e-6)
        assert again.num_parameters() == model.num_parameters()
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    errors = (half(IDS).logits.float() - model(IDS).logits).abs()
    assert errors.median() < 0.05 * model(IDS).logits.abs().max()
    made = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_copies_compute_alone():
    model = make()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert torch.equal(other(IDS).logits, model(IDS).logits)
        find_layers(other)[0].v.zero_()
        assert not torch.equal(other(IDS).logits, model(IDS).logits)


def test_missing_weights_are_drawn_as_new_ones_are(tmp_path):
    make().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    kept = weights["model.layers.0.mlp.v"].clone()
    del weights["model.layers.0.mlp.u"]
    save_file(weights, path, {"format": "pt"})
    layer = AutoModelForCausalLM.from_pretrained(tmp_path).model.layers[0].mlp
    assert torch.equal(layer.v, kept)
    assert abs(layer.u.std().item() - 0.25) < 0.02


def test_number_of_parameters_by_hand():
    model = make(sp.SgatlinConfig(n_experts=16, n_channels=2, top_k=3, d_key=8))
    own = 2 * 2 * 16 * 32 + 8 * 32 + 2 * 2 * 4 * 8
    plain = build("llama").num_parameters() - 3 * 3 * 32 * 48
    assert model.num_parameters() == plain + 3 * own


# -- what pathways can do, and models of other layers than sgatlin cannot -------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda m: m(IDS, domain="code"),
        lambda m: m(IDS, domain=["code", None]),
        lambda m: m(IDS, domain=torch.tensor([0, -1])),
        lambda m: m.generate(IDS, domain="code"),
        lambda m: m.generate(IDS, domain="auto"),
        lambda m: m.pathway("code").__enter__(),
        lambda m: m.route(IDS),
        lambda m: m.pathways,
        lambda m: m.set_pathways(None),
        lambda m: m.to_dense(),
        lambda m: m.set_executor("compact"),
        lambda m: m.execution,
        lambda m: m.prepare("code"),
        lambda m: sp.SparsePathwaysForCausalLM.from_dense(m, None),
        lambda m: sp.profile(m, None, {"code": ["text"]}),
        lambda m: sp.evaluate(m, None, {"code": ["text"]}),
        lambda m: sp.export(m, "code", "nowhere"),
    ],
)
def test_pathways_are_refused_with_the_reason(use):
    with pytest.raises(sp.PathwaysError, match="peer layers"):
        use(make(KINDS["peer"]))


@pytest.mark.parametrize("kind", ["peer", "sgatlin"])
def test_loading_for_a_domain_is_refused(kind, tmp_path):
    make(KINDS[kind]).save_pretrained(tmp_path)
    for options in ({"domain": "code"}, {"default_domain": "code"}):
        for load in (AutoModelForCausalLM, sp.SparsePathwaysForCausalLM):
            with pytest.raises(sp.PathwaysError, match=f"{kind} layers.*it has no pathways"):
                load.from_pretrained(tmp_path, **options)


def test_executors_and_domains_of_other_layers_are_refused(tmp_path):
    make(KINDS["peer"]).save_pretrained(tmp_path)
    for load in (AutoModelForCausalLM, sp.SparsePathwaysForCausalLM):
        with pytest.raises(sp.PathwaysError, match="ffn=PeerConfig"):
            load.from_pretrained(tmp_path, executor="indexed")
    config = sp.SparsePathwaysConfig.from_base(
        LlamaConfig(**LLAMA_LIKE), ffn=KINDS["peer"], domains=["code"]
    )
    with pytest.raises(sp.PathwaysError, match="domains does not go together with ffn"):
        AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    "announced", [{"domains": ["code"]}, {"default_domain": "auto"}, {"default_domain": "prompt"}]
)
def test_domains_that_were_announced_have_to_come_before_a_model_is_saved(announced, tmp_path):
    config = sp.SparsePathwaysConfig.from_base(LlamaConfig(**LLAMA_LIKE), ffn=SGATLIN, **announced)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(sp.PathwaysError, match=r"sp\.select and model\.set_pathways"):
        model.save_pretrained(tmp_path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("fields", [{}, {"ffn": SGATLIN}])
def test_an_unknown_executor_is_refused_before_a_model_is_made(fields):
    with pytest.raises(sp.PathwaysError, match="Unknown executor 'zzz'"):
        sp.SparsePathwaysConfig.from_base(LlamaConfig(**LLAMA_LIKE), executor="zzz", **fields)


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model(IDS, domain="prompt"),
        lambda model: model.set_prompt_pathways(sparsity=0.5),
        sp.adapt,
    ],
    ids=["domain", "settings", "adapt"],
)
@pytest.mark.parametrize("kind", ["swiglu", "sgatlin"])
def test_neurons_of_other_layers_are_not_picked_from_prompts(use, kind):
    with pytest.raises(sp.PathwaysError, match=f"FFNs are {kind} layers"):
        use(make(KINDS[kind]))


def test_other_layers_do_not_stand_in_for_the_blocks_of_those_before():
    config = LlamaConfig(**LLAMA_LIKE)
    partly = sp.SparsePathwaysConfig.from_base(config, ffn=SGATLIN, ffn_blocks=range(1, 3))
    assert partly.ffn_blocks == [1, 2]
    other = sp.SparsePathwaysConfig.from_base(partly, ffn=KINDS["mlp"])
    assert other.ffn_blocks is None
    assert sp.SparsePathwaysConfig.from_base(partly).ffn_blocks == [1, 2]


@EVERY_KIND
@torch.no_grad()
def test_dense_is_all_that_a_domain_may_be(ffn):
    model = make(ffn)
    expected = model(IDS).logits
    assert torch.equal(model(IDS, domain=None).logits, expected)
    assert torch.equal(model(IDS, domain=[None, None]).logits, expected)
    assert model.domains == []
    assert not model.has_router
    with model.pathway(None):
        assert torch.equal(model(IDS).logits, expected)


# -- generating ---------------------------------------------------------------------------------


@EVERY_KIND
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"cache_implementation": "static", "disable_compile": True},
        {"use_cache": False},
    ],
    ids=["greedy", "beams", "returned", "static", "uncached"],
)
@torch.no_grad()
def test_generation_is_the_naive_one_s(ffn, options):
    """A row alone and without cache gives the same tokens as the padded batch."""
    model = make(ffn)
    for layer in find_layers(model):
        for parameter in layer.parameters():
            parameter.mul_(1.5)
    ids = torch.cat([torch.zeros(2, 3, dtype=torch.int64), IDS], 1)
    ids[1, :3] = torch.tensor([5, 9, 11])
    mask = (ids != 0).long()
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    found = model.generate(ids, attention_mask=mask, **settings, **options)
    beams = {k: v for k, v in options.items() if "beams" in k or "return" in k}
    each = options.get("num_return_sequences", 1)
    for row, start in ((0, 3), (1, 0)):
        alone = model.generate(ids[row : row + 1, start:], **settings, use_cache=False, **beams)
        assert torch.equal(found[row * each : (row + 1) * each, start:], alone)


@torch.no_grad()
def test_compiled_whole():
    torch._dynamo.reset()
    model = make()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(IDS).logits, model(IDS).logits, atol=1e-6)


@torch.no_grad()
def test_compiled_where_leaves_are_replaced():
    torch._dynamo.reset()
    model = make(base=build("opt").config)
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(compiled(IDS).logits, model(IDS).logits, atol=1e-6)
