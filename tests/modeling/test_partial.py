"""A model loaded with one domain's neurons computes what the full one does in that domain."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import peft
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import UnknownNameError
from hf_sparse_pathways.ffn.choices import all_dense
from hf_sparse_pathways.modeling import partial
from hf_sparse_pathways.modeling.partial import _check_supported, current_loading
from tests.architectures import (
    ARCHITECTURES,
    build,
    compensate,
    prompt,
    random_masks,
)
from tests.healing.healings import ENTANGLED, sparse
from tests.pathways.corruption import set_field

IDS = prompt()
TOLERANCE = 1e-5


def _close(left, right):
    assert (left - right).abs().max().item() <= TOLERANCE


def _model(name="llama", compensated=True, domains=("code", "law"), **arguments):
    dense = build(name)
    masks = random_masks(dense, domains)
    paths = compensate(dense, masks) if compensated else sp.Pathways.from_masks(dense, masks)
    return sp.SparsePathwaysForCausalLM.from_dense(dense, paths, **arguments)


def _parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def _expected_parameters(model, domain):
    """What is left of a full model's parameters, and what its compensation adds."""
    count = _parameters(model)
    blocks = zip(model._attachment.blocks, model.pathways[domain].blocks, strict=True)
    for attached, part in blocks:
        *incoming, outgoing = attached.leaves.values()
        removed = attached.block.d_ff - part.kept
        for leaf in incoming:
            biased = leaf.bias is not None
            count -= removed * leaf.rows_per_neuron * (attached.block.d_in + biased)
        count -= removed * attached.block.d_out
        if part.bias is not None and outgoing.bias is None:
            count += attached.block.d_out
        if part.bypass is not None:
            count += part.bypass.outer.numel() + part.bypass.inner.numel()
    return count


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
@torch.no_grad()
def test_it_equals_the_full_model(name, compensated, tmp_path):
    model = _model(name, compensated)
    layouts = {"original": model, "permuted": sp.permute(model)}
    for folder, full in layouts.items():
        full.save_pretrained(tmp_path / folder)
        for domain in ("code", "law"):
            loaded, info = AutoModelForCausalLM.from_pretrained(
                tmp_path / folder, domain=domain, output_loading_info=True
            )
            assert not any(info.values())
            assert type(loaded) is type(model)
            assert loaded.domains == [loaded.config.default_domain] == [domain]
            expected = model(IDS, domain=domain).logits
            _close(loaded(IDS).logits, expected)
            _close(loaded(IDS, domain=domain).logits, expected)
            assert _parameters(loaded) == _expected_parameters(full, domain)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gemma3", "bloom"])
def test_generation_equals_the_full_model(name, tmp_path):
    model = _model(name)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, domain="law")
    arguments = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    expected = model.generate(IDS, domain="law", **arguments)
    assert torch.equal(loaded.generate(IDS, **arguments), expected)
    assert torch.equal(loaded.generate(IDS, domain=["law", "law"], **arguments), expected)
    beams = {**arguments, "num_beams": 3}
    assert torch.equal(
        loaded.generate(IDS, domain="law", **beams), model.generate(IDS, domain="law", **beams)
    )


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "falcon_h1", "gpt2", "deepseek_v3", "moshi"])
@torch.no_grad()
def test_from_a_base_and_pathways_elsewhere(name, tmp_path):
    model = _model(name)
    model.to_dense().save_pretrained(tmp_path / "base")
    model.pathways.save_pretrained(tmp_path / "paths")
    for paths in (tmp_path / "paths", model.pathways):
        loaded = sp.SparsePathwaysForCausalLM.from_pretrained(
            tmp_path / "base", pathways=paths, domain="code"
        )
        _close(loaded(IDS).logits, model(IDS, domain="code").logits)


@torch.no_grad()
def test_sharded_bare_and_from_a_state_dict(tmp_path):
    model = _model()
    expected = model(IDS, domain="code").logits
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    _close(AutoModelForCausalLM.from_pretrained(tmp_path, domain="code")(IDS).logits, expected)
    bare = AutoModel.from_pretrained(tmp_path, domain="code")
    hidden = model.model(IDS).last_hidden_state
    with model.pathway("code"):
        hidden = model(IDS, output_hidden_states=True).hidden_states[-1]
    _close(bare(IDS).last_hidden_state, hidden)
    loaded = type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=model.state_dict(),
        pathways=model.pathways,
        domain="code",
    )
    _close(loaded(IDS).logits, expected)
    assert _parameters(loaded) == _expected_parameters(model, "code")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, domain="code", disable_mmap=True)
    _close(read(IDS).logits, expected)


@torch.no_grad()
def test_whatever_is_converted_on_the_way_is_cut_afterwards(tmp_path, monkeypatch):
    model = _model("phi3")
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(partial, "find_sources", lambda *_: {})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, domain="code")
    _close(loaded(IDS).logits, model(IDS, domain="code").logits)
    assert _parameters(loaded) == _expected_parameters(model, "code")


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_leaf_is_read_in_part(name, tmp_path, monkeypatch):
    model = _model(name, compensated=False)
    model.save_pretrained(tmp_path)
    wanted, reserve = [], partial.ReducedBlock.reserve

    def spy(self, leaf, parameter, *rest):
        wanted.append((id(leaf), parameter))
        reserve(self, leaf, parameter, *rest)

    monkeypatch.setattr(partial.ReducedBlock, "reserve", spy)
    AutoModelForCausalLM.from_pretrained(tmp_path, domain="code")
    leaves = [leaf for one in model._attachment.blocks for leaf in one.leaves.values()]
    biases = [leaf for leaf in leaves if leaf.bias is not None and leaf.neuron_dim == 0]
    assert len(set(wanted)) == len(wanted) == len(leaves) + len(biases)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, "auto"])
@torch.no_grad()
def test_dtype(dtype, tmp_path):
    model = _model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, domain="code", dtype=dtype)
    full = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, executor="compact")
    assert {p.dtype for p in loaded.parameters()} == {full.dtype}
    assert torch.equal(loaded(IDS).logits, full(IDS, domain="code").logits)


CHANGES = {
    "double": lambda model: model.double().float(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "executor": lambda model: (model.set_executor("masked"), model)[1],
    "train": lambda model: model.train().eval(),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_what_becomes_of_it(change, tmp_path):
    model = _model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, domain="code")
    changed = CHANGES[change](loaded)
    assert changed.domains == ["code"]
    for executor in ("auto", "masked", "compact", "sliced"):
        changed.set_executor(executor)
        _close(changed(IDS, domain="code").logits, model(IDS, domain="code").logits)
        assert changed.resident == {}
        assert not changed.prepare("code")
    assert changed.max_resident_bytes > 0
    with pytest.raises(UnknownNameError):
        changed.set_executor("mask")
    with pytest.raises(sp.PathwaysError, match="without domain="):
        changed(IDS, domain=None)


def test_it_trains_as_the_full_model_does(tmp_path):
    model = _model(executor="masked")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, domain="code")
    for one in (model, loaded):
        one.gradient_checkpointing_enable()
        one.train()
        one(IDS, labels=IDS, domain="code").loss.backward()
    _close(loaded.model.embed_tokens.weight.grad, model.model.embed_tokens.weight.grad)
    keep = model.pathways["code"].blocks[1].keep
    mine, theirs = (one.model.layers[1].mlp.up_proj.weight.grad for one in (loaded, model))
    _close(mine, theirs[keep])


@torch.no_grad()
def test_compiled(tmp_path):
    _model().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, domain="code")
    torch._dynamo.reset()
    compiled = torch.compile(loaded.forward, backend="eager", fullgraph=True)
    _close(compiled(IDS).logits, loaded(IDS).logits)


def test_threads(tmp_path):
    _model().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, domain="code")
    arguments = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    inputs = [prompt(seed=seed) for seed in range(4)]
    expected = [loaded.generate(ids, **arguments) for ids in inputs]

    def work(index):
        for _ in range(4):
            assert torch.equal(loaded.generate(inputs[index], **arguments), expected[index])
        return index

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("partial")
    _model().save_pretrained(place)
    return place


REFUSED = {
    "another domain": lambda m: m(IDS, domain="law"),
    "dense": lambda m: m(IDS, domain=None),
    "a dense row": lambda m: m(IDS, domain=["code", None]),
    "a row of another": lambda m: m.generate(IDS, domain=["code", "law"]),
    "an index": lambda m: m(IDS, domain=torch.tensor([0, 1])),
    "generate densely": lambda m: m.generate(IDS, domain=None, max_new_tokens=1),
    "a scope": lambda m: m.pathway("law").__enter__(),
    "prepare": lambda m: m.prepare("law"),
    "pathways": lambda m: m.pathways,
    "set_pathways": lambda m: m.set_pathways(_model().pathways),
    "save": lambda m: m.save_pretrained("nowhere"),
    "to_dense": lambda m: m.to_dense(),
    "permute": sp.permute,
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_needs_all_neurons_is_refused(kind, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(folder, domain="code")
    with pytest.raises(sp.PathwaysError, match=r"'code' only.*[Ll]oad the full model.*without dom"):
        REFUSED[kind](loaded)
    assert not list(tmp_path.iterdir())
    with torch.no_grad():
        loaded(IDS, domain="code")


def test_code_that_chooses_dense_for_every_model_is_refused(folder):
    loaded = AutoModelForCausalLM.from_pretrained(folder, domain="code")
    with all_dense(), pytest.raises(sp.PathwaysError, match="the dense model"):
        loaded(IDS)


def test_wrong_domains_at_load_time(folder):
    load = AutoModelForCausalLM.from_pretrained
    with pytest.raises(UnknownNameError, match="Did you mean 'code'"):
        load(folder, domain="coed")
    with pytest.raises(UnknownNameError, match="Did you mean 'code'"):
        load(folder, domain="coed", pathways=_model().pathways)
    for pathways in (None, _model().pathways):
        with pytest.raises(UnknownNameError, match=r"Unknown domain \['code'\]"):
            load(folder, domain=["code"], pathways=pathways)
    with pytest.raises(sp.PathwaysError, match="default_domain='law' is another"):
        sp.SparsePathwaysForCausalLM.from_pretrained(folder, domain="code", default_domain="law")
    full = load(folder)
    assert full.domains == ["code", "law"]


def test_pathways_of_another_base_leave_nothing_behind(tmp_path):
    build("qwen2").save_pretrained(tmp_path)
    load = sp.SparsePathwaysForCausalLM.from_pretrained
    with pytest.raises(sp.PathwaysError, match="Made for"):
        load(tmp_path, pathways=_model().pathways, domain="code")
    assert current_loading() is None


def test_how_it_cannot_be_loaded(folder, tmp_path):
    with pytest.raises(sp.PathwaysError, match=r"'disk'.*without domain="):
        AutoModelForCausalLM.from_pretrained(
            folder,
            domain="code",
            device_map={"model": "disk", "lm_head": "cpu"},
            offload_folder=tmp_path,
        )
    for name, what in (("hf_quantizer", "quantisation"), ("device_mesh", "tensor parallelism")):
        config = {"device_map": None, "hf_quantizer": None, "device_mesh": None, name: object()}
        with pytest.raises(sp.PathwaysError, match=what):
            _check_supported(SimpleNamespace(**config))


def test_shared_ffn_weights_are_refused(folder, monkeypatch):
    from transformers import LlamaForCausalLM

    init = LlamaForCausalLM.__init__

    def sharing(self, config):
        init(self, config)
        self.model.layers[0].mlp.up_proj.weight = self.model.layers[2].mlp.up_proj.weight

    monkeypatch.setattr(LlamaForCausalLM, "__init__", sharing)
    with pytest.raises(sp.PathwaysError, match=r"layers\.0\.mlp shares its weights"):
        AutoModelForCausalLM.from_pretrained(folder, domain="code")


@torch.no_grad()
def test_a_norm_over_the_neurons(tmp_path):
    model = sparse(ENTANGLED)
    model.save_pretrained(tmp_path)
    for domain in model.domains:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, domain=domain)
        _close(loaded(IDS).logits, model(IDS, domain=domain).logits)
    assert torch.equal(
        sp.permute(model)(IDS, domain=domain).logits, model(IDS, domain=domain).logits
    )


@torch.no_grad()
def test_an_adapter_on_top(folder):
    loaded = AutoModelForCausalLM.from_pretrained(folder, domain="code", device_map="cpu")
    expected = loaded(IDS).logits
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["down_proj", "up_proj"])
    adapted = peft.get_peft_model(loaded, config)
    assert torch.equal(adapted(input_ids=IDS).logits, expected)
    with torch.enable_grad():
        adapted(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


@torch.no_grad()
def test_entangled_blocks_keep_their_width(tmp_path, monkeypatch):
    from hf_sparse_pathways.ffn import blocks

    monkeypatch.setattr(blocks, "_entanglement", lambda *_: "all of them are counted")
    model = _model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, domain="code")
    _close(loaded(IDS).logits, model(IDS, domain="code").logits)
    assert loaded.model.layers[0].mlp.up_proj.out_features == 48


def test_only_the_chosen_pathway_is_read(folder):
    everything = sp.Pathways.from_pretrained(folder)
    one = sp.Pathways.from_pretrained(folder, only="law")
    assert one.domains == ["law"]
    assert one.base == everything.base
    for mine, theirs in zip(one["law"].blocks, everything["law"].blocks, strict=True):
        assert mine.parts().keys() == theirs.parts().keys()
        assert all(torch.equal(part, theirs.parts()[name]) for name, part in mine.parts().items())
    with pytest.raises(UnknownNameError, match="'law'"):
        sp.Pathways.from_pretrained(folder, only="pooled")


@pytest.mark.parametrize("damaged", [None, 3, [], [[]], ["law"], [{"name": "law"}]])
def test_a_damaged_list_of_domains_is_an_error(folder, tmp_path, damaged):
    for name in ("pathways.json", "pathways.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    set_field(tmp_path / "pathways.json", ("domains",), damaged)
    with pytest.raises(sp.PathwaysError):
        sp.Pathways.from_pretrained(tmp_path, only="law")


def test_a_truncated_file_is_an_error(folder, tmp_path):
    for name in ("pathways.json", "pathways.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes()[:-1])
    (tmp_path / "pathways.json").write_bytes((folder / "pathways.json").read_bytes())
    with pytest.raises(sp.PathwaysError, match="SHA-256"):
        sp.Pathways.from_pretrained(tmp_path, only="law")
