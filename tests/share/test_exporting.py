"""One domain as a plain checkpoint: what is written computes the pathway, or nothing is written."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse_pathways as sp
from hf_sparse_pathways.errors import (
    HubError,
    MismatchError,
    PathwaysError,
    UnknownNameError,
    UnsupportedModelError,
)
from hf_sparse_pathways.share import exporting, verification
from hf_sparse_pathways.share.plain_card import _describe
from tests.architectures import (
    ARCHITECTURES,
    build,
    compensate,
    prompt,
    random_masks,
    repaired,
    zeroed,
)
from tests.cli.commands import content
from tests.healing.healings import bitnet
from tests.share.exports import NO_BIAS, NO_FORM, fitting, sparse, with_blocks
from tests.texts import tiny_tokenizer

IDS = prompt()
TOLERANCE = 1e-5

WITHOUT_THE_PACKAGE = """
import json, sys
from pathlib import Path

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_sparse_pathways":
            raise ImportError(name)

sys.meta_path.insert(0, Blocker())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

root = Path(sys.argv[1])
ids = load_file(root / "ids.safetensors")["ids"]
found = {}
for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    with torch.no_grad():
        found[folder.name] = AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits
save_file(found, root / "logits.safetensors")
assert not [name for name in sys.modules if name.startswith("hf_sparse")]
"""


def _same(left, right):
    assert (left - right).abs().max().item() <= TOLERANCE


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Every architecture's export, and the logits of a process that cannot import the package."""
    root = tmp_path_factory.mktemp("exports")
    for name in sorted(ARCHITECTURES.keys() - NO_FORM.keys()):
        sp.export(sparse(name), "code", root / name)
    save_file({"ids": IDS}, root / "ids.safetensors")
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load_file(root / "logits.safetensors"), root


@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - NO_FORM.keys()))
def test_it_computes_the_pathway_without_the_package(name, stock):
    logits, root = stock
    dense, pathways = fitting(name)
    with torch.no_grad():
        _same(logits[name], repaired(dense, pathways["code"])(IDS).logits)
    saved = json.loads((root / name / "config.json").read_text())
    assert saved["model_type"] == dense.config.model_type
    assert saved["architectures"] == [type(dense).__name__]
    said = json.loads((root / name / "export.json").read_text())
    assert said["fields"].items() <= saved.items()


@pytest.mark.parametrize("name", sorted(NO_FORM))
def test_without_a_field_for_the_width_it_is_refused(name, tmp_path):
    with pytest.raises(UnsupportedModelError, match=NO_FORM[name]):
        sp.export(sparse(name), "code", tmp_path / "out")
    assert content(tmp_path) == {}


@pytest.mark.parametrize("name", sorted(NO_FORM))
def test_what_keeps_all_neurons_needs_no_field(name, tmp_path):
    dense = build(name)
    masks = random_masks(dense, ["code"])
    shared = [i for i, mask in enumerate(masks["code"]) if name != "deepseek_v3" or len(mask) != 48]
    for index in shared:
        masks["code"][index][:] = True
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, sp.Pathways.from_masks(dense, masks))
    sp.export(model, "code", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        _same(loaded(IDS).logits, zeroed(dense, masks["code"])(IDS).logits)


@pytest.mark.parametrize("name", sorted(NO_BIAS))
def test_a_bias_without_a_place_is_refused_or_dropped(name, tmp_path):
    dense = build(name)
    pathways = with_blocks(compensate(dense, random_masks(dense)), bypass=None)
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, pathways)
    with pytest.raises(UnsupportedModelError, match=r"no place.*--bias drop.*--compensation refit"):
        sp.export(model, "code", tmp_path / "out")
    assert content(tmp_path) == {}
    done = sp.export(model, "code", tmp_path / "out", bias="drop")
    loaded = AutoModelForCausalLM.from_pretrained(done.folder).eval()
    bare = with_blocks(pathways, bias=None)
    with torch.no_grad():
        found = loaded(IDS).logits
        _same(found, repaired(dense, bare["code"])(IDS).logits)
        assert (found - repaired(dense, pathways["code"])(IDS).logits).abs().max() > 0.01
    assert "logits differ by" in done.facts.dropped
    assert done.facts.dropped in (done.folder / "README.md").read_text()


def test_dropping_a_bias_that_is_not_there_changes_nothing(tmp_path):
    model = sparse("qwen3")
    kept, dropped = (sp.export(model, "code", tmp_path / b, bias=b) for b in ("keep", "drop"))
    assert dropped.facts.dropped is None
    weights = [load_file(each.folder / "model.safetensors") for each in (kept, dropped)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("multiple", [1, 8, 32])
def test_blocks_have_the_width_of_the_widest_rounded_up(multiple, tmp_path):
    dense, pathways = fitting("llama")
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, pathways)
    done = sp.export(model, "code", tmp_path / "out", multiple_of=multiple)
    kept = [block.kept for block in pathways["code"].blocks]
    width = -(-max(kept) // multiple) * multiple
    loaded = AutoModelForCausalLM.from_pretrained(done.folder)
    assert loaded.config.intermediate_size == width
    assert done.facts.padded == sum(width - number for number in kept)
    weights = load_file(done.folder / "model.safetensors")
    for index, number in enumerate(kept):
        name = f"model.layers.{index}.mlp"
        assert weights[f"{name}.down_proj.weight"].shape == (32, width)
        assert not weights[f"{name}.down_proj.weight"][:, number:].any()
        assert not weights[f"{name}.up_proj.weight"][number:].any()
        assert not weights[f"{name}.gate_proj.bias"].any()
        assert torch.equal(
            weights[f"{name}.down_proj.bias"], pathways["code"].blocks[index].bias
        ), "all of it"
    assert done.facts.parameters == (model.num_parameters(), loaded.num_parameters())


@pytest.mark.parametrize(("multiple", "kept"), [(1, 48), (48, 20), (64, 20)])
def test_what_would_be_no_narrower_is_refused(multiple, kept, tmp_path):
    dense = build("llama")
    masks = {"code": [torch.arange(48) < number for number in (kept, 20, 20)]}
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, sp.Pathways.from_masks(dense, masks))
    with pytest.raises(PathwaysError, match=r"no narrower.*48 neurons.*reselect"):
        sp.export(model, "code", tmp_path / "out", multiple_of=multiple)
    assert content(tmp_path) == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype, tmp_path):
    dense, pathways = fitting("llama")
    model = sp.SparsePathwaysForCausalLM.from_dense(dense.to(dtype), pathways)
    done = sp.export(model, "code", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(done.folder)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert 0.0 < done.facts.error < verification.TOLERANCES[dtype] / 2


def test_two_widths_have_a_field_each(tmp_path):
    """Shared experts have a field of their own here, and dense layers another."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    from tests.architectures import LLAMA_LIKE

    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        **LLAMA_LIKE,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=40,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
    )
    dense = Qwen2MoeForCausalLM(config).eval()
    masks = random_masks(dense, ["code"])
    model = sp.SparsePathwaysForCausalLM.from_dense(dense, sp.Pathways.from_masks(dense, masks))
    done = sp.export(model, "code", tmp_path / "out")
    first, dense_layer, last = (int(mask.sum()) for mask in masks["code"])
    fields = {field: after for field, (_, after) in done.facts.fields.items()}
    assert fields == {
        "shared_expert_intermediate_size": max(first, last),
        "intermediate_size": dense_layer,
    }


def test_permuted_models_and_tied_embeddings(tmp_path):
    dense = build("llama")
    dense.config.tie_word_embeddings = True
    dense.tie_weights()
    masks = random_masks(dense)
    pathways = sp.Pathways.from_masks(dense, masks)
    permuted = sp.permute(sp.SparsePathwaysForCausalLM.from_dense(dense, pathways))
    sp.export(permuted, "law", tmp_path / "out")
    assert "neuron_order" not in (tmp_path / "out" / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with torch.no_grad():
        _same(loaded(IDS).logits, zeroed(dense, masks["law"])(IDS).logits)


def test_the_model_is_left_as_it_was(tmp_path):
    model = sparse("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        logits = model(IDS, domain="code").logits
        sp.export(model, "code", tmp_path / "out")
        assert torch.equal(model(IDS, domain="code").logits, logits)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert model.config.intermediate_size == 48


def _entangled():
    dense = bitnet()
    masks = random_masks(dense)
    return sp.SparsePathwaysForCausalLM.from_dense(dense, sp.Pathways.from_masks(dense, masks))


def _bypassed():
    dense = build("llama")
    return sp.SparsePathwaysForCausalLM.from_dense(dense, compensate(dense, random_masks(dense)))


def _quantised():
    model = sparse("llama")
    model.config.quantization_config = {"quant_method": "some"}
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_entangled, "removed neurons"),
        (_bypassed, "linear bypass"),
        (_quantised, "weights are quantised"),
    ],
)
def test_what_a_plain_ffn_has_no_place_for_is_refused(make, words, tmp_path):
    with pytest.raises(UnsupportedModelError, match=words):
        sp.export(make(), "code", tmp_path / "out")
    assert content(tmp_path) == {}


def test_wrong_calls(tmp_path):
    model = sparse("llama")
    with pytest.raises(UnknownNameError, match="'code'"):
        sp.export(model, "cod", tmp_path / "out")
    with pytest.raises(UnknownNameError, match="drop"):
        sp.export(model, "code", tmp_path / "out", bias="lose")
    with pytest.raises(PathwaysError, match="multiple_of"):
        sp.export(model, "code", tmp_path / "out", multiple_of=0)
    with pytest.raises(PathwaysError, match="has none"):
        sp.export(build("llama"), "code", tmp_path / "out")
    model.save_pretrained(tmp_path / "full")
    part = AutoModelForCausalLM.from_pretrained(tmp_path / "full", domain="code")
    with pytest.raises(PathwaysError, match="'code' only"):
        sp.export(part, "code", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _spoil(plain):
    with torch.no_grad():
        plain.model.layers[1].mlp.down_proj.weight[:, 3] += 1.0


def _lose(plain):
    plain.config.mlp_bias = False


@pytest.mark.parametrize("damage", [_spoil, _lose])
def test_what_does_not_compute_the_pathway_leaves_what_was_there(damage, tmp_path, monkeypatch):
    model, own = sparse("llama"), exporting.bake
    sp.export(model, "law", tmp_path / "there")
    before = content(tmp_path)

    def bake(*arguments, **options):
        plain, form = own(*arguments, **options)
        damage(plain)
        return plain, form

    monkeypatch.setattr(exporting, "bake", bake)
    for name in ("there", "new"):
        with pytest.raises(MismatchError):
            sp.export(model, "code", tmp_path / name, overwrite=True)
    assert content(tmp_path) == before


def test_an_interruption_leaves_what_was_there(tmp_path, monkeypatch):
    model = sparse("llama")
    sp.export(model, "law", tmp_path / "there")
    before = content(tmp_path)

    def interrupt(folder, *_):
        assert (folder / "model.safetensors").is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "check_checkpoint", interrupt)
    for name in ("there", "new"):
        with pytest.raises(KeyboardInterrupt):
            sp.export(model, "code", tmp_path / name, overwrite=True)
    assert content(tmp_path) == before


def test_only_an_earlier_export_is_replaced(tmp_path):
    model = sparse("llama")
    model.save_pretrained(tmp_path / "full")
    with pytest.raises(PathwaysError, match="left alone"):
        sp.export(model, "code", tmp_path / "full", overwrite=True)
    sp.export(model, "code", tmp_path / "out")
    with pytest.raises(PathwaysError, match="--overwrite"):
        sp.export(model, "law", tmp_path / "out")
    sp.export(model, "law", tmp_path / "out", overwrite=True)
    assert json.loads((tmp_path / "out" / "export.json").read_text())["domain"] == "law"


def test_a_folder_comes_with_its_tokenizer_licence_and_generation_and_no_path(tmp_path):
    model = sparse("llama")
    model.generation_config.max_new_tokens = 5
    tiny_tokenizer().save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "full")
    (tmp_path / "full" / "README.md").write_text("---\nlicense: mit\n---\n# mine\n")
    done = sp.export(tmp_path / "full", "code", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(done.folder)
    assert loaded.generation_config.max_new_tokens == 5
    tokenizer = AutoTokenizer.from_pretrained(done.folder)
    assert tokenizer("court judge").input_ids == tiny_tokenizer()("court judge").input_ids
    card = (done.folder / "README.md").read_text()
    assert "license: mit" in card
    for words in ("LlamaForCausalLM", "*code*", "| `intermediate_size` | 48 |"):
        assert words in card
    for path in done.folder.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


@pytest.mark.usefixtures("hub")
def test_it_is_pushed_and_used_from_the_hub(tmp_path):
    model = sparse("llama")
    model.push_to_hub("me/full")
    tiny_tokenizer().push_to_hub("me/full")
    done = sp.export("me/full", "code", tmp_path / "out", repo_id="me/code", private=True)
    assert done.address.startswith("http")
    loaded = AutoModelForCausalLM.from_pretrained("me/code").eval()
    assert type(loaded).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        _same(loaded(IDS).logits, model(IDS, domain="code").logits)
    assert 'from_pretrained("me/code")' in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(PathwaysError, match="repository of its own"):
        sp.export(model, "code", tmp_path / "second", repo_id="me/full")
    with pytest.raises(HubError):
        sp.export(model, "code", tmp_path / "third", repo_id="you/code")
    assert (tmp_path / "third" / "model.safetensors").is_file(), "what is verified stays"


@pytest.mark.usefixtures("hub")
def test_another_push_leaves_no_weights_of_the_first_and_somebody_elses_card(tmp_path, hub):
    from huggingface_hub import HfApi

    model = sparse("llama")
    HfApi().create_repo("me/code")
    for path in ("model-00001-of-00002.safetensors", "README.md", "notes.txt"):
        HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo=path, repo_id="me/code")
    sp.export(model, "code", tmp_path / "out", repo_id="me/code")
    files = hub.repos["me/code"].at("main").files
    assert "model-00001-of-00002.safetensors" not in files
    assert files["README.md"].content == files["notes.txt"].content == b"mine"


def test_ctranslate2_decodes_the_same_tokens(tmp_path):
    """An engine that nobody here has written."""
    import ctranslate2

    model = sparse("llama")
    tokenizer = tiny_tokenizer()
    folder = sp.export(model, "code", tmp_path / "plain", tokenizer=tokenizer).folder
    converter = ctranslate2.converters.TransformersConverter(str(folder))
    converter.convert(str(tmp_path / "ct2"))
    engine = ctranslate2.Generator(str(tmp_path / "ct2"), device="cpu")
    length = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    for row in IDS % len(tokenizer):
        expected = model.generate(input_ids=row[None], domain="code", **length)
        (found,) = engine.generate_batch(
            [tokenizer.convert_ids_to_tokens(row)],
            max_length=12,
            min_length=12,
            include_prompt_in_result=False,
        )
        assert found.sequences_ids[0] == expected[0, len(row) :].tolist()


@pytest.mark.parametrize("text", ["`<img src=x>`", "x\n# Owned", "![x](http://evil/x.png)"])
def test_a_provenance_is_words_in_a_card(text):
    made = {"method": text, "compensation": text, "text": {"tokens": text}, "healing": []}
    told = _describe(made)
    assert text not in told
    assert told.count("`") == 4
    assert "\n" not in told
